"""The command `dp-ilg compare`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from dp_ilg.experiments.config.kinds import MEASURES

_SHOWN = 5  # cells that are not done


def compare(
    sweep: Annotated[str, tyro.conf.Positional],
    *,
    out: str | None = None,
    data_dir: str | None = None,
    workers: int | None = None,
    report_only: bool = False,
    retry_failed: bool = False,
    extend: bool = False,
    json: bool = False,
) -> Callable[[], None]:
    """Compares methods over tasks, epsilons and seeds, each tuned as much; resumable.

    Args:
        sweep: a TOML file, for example configs/sweeps/digits.toml.
        out: the folder of the results; by default runs/compare-NAME.
        data_dir: a folder of data files (NAME.npz or IDX files).
        workers: processes at a time; by default what the sweep says.
        report_only: run nothing, report what is there.
        retry_failed: run again what is on file as failed.
        extend: go on in a folder that was begun with another version of the sweep.
        json: print one JSON object.

    Returns:
        What does it; it ends with 1 where no run of any cell came to an end.

    Example:
        >>> compare("no/such.toml")()
        Traceback (most recent call last):
        ValueError: The sweep no/such.toml cannot be read: No such file or directory.
    """

    def work() -> None:
        from dp_ilg.experiments.sweeps import compare as comparing  # slow to import

        options = comparing.CompareOptions(
            out=None if out is None else Path(out),
            data_dir=None if data_dir is None else Path(data_dir),
            workers=workers,
            report_only=report_only,
            retry_failed=retry_failed,
            extend=extend,
        )
        found = comparing.compare(Path(sweep), options)
        _show(found, json)
        if not report_only and all(cell["mean"] is None for cell in found["cells"]):
            raise SystemExit(1)  # each cell's reason is shown and in the report

    return work


def _show(found: Mapping[str, Any], json: bool) -> None:
    from dp_ilg.experiments.cli.studies import show_rows

    if json:
        show_rows(found, True)
        return
    rows = [_row(cell) for cell in found["cells"]]
    notes = [*_not_done(found["missing"]), *found["columns"]]
    if any(cell["status"] == "failed" for cell in found["cells"]):
        notes.append("--retry-failed runs again what failed.")
    notes.append(f"Report: {found['report']}")
    kinds = {MEASURES[cell["measure"]] for cell in found["cells"]}
    names = " or ".join(sorted(kind.words + kind.in_units for kind in kinds))
    title = f"{found['sweep']}: test {names}"
    show_rows({"title": title, "rows": rows, "notes": notes}, False)


def _not_done(missing: Sequence[str]) -> list[str]:
    """How many cells are not done, which, and why: a few here, all in the report."""
    if not missing:
        return []
    count = "1 cell is" if len(missing) == 1 else f"{len(missing)} cells are"
    more = len(missing) - _SHOWN
    rest = [f"And {more} more, in the report."] if more > 0 else []
    return [f"{count} not done:", *missing[:_SHOWN], *rest]


def _row(cell: Mapping[str, Any]) -> dict[str, Any]:
    spread = cell["deviation"]
    places = MEASURES[cell["measure"]].digits
    mean = cell["status"] if cell["mean"] is None else f"{cell['mean']:.{places}f}"
    gap = "" if cell["difference"] is None else f"{cell['difference']:+.{places}f}"
    if cell["interval"] is not None:
        low, high = (f"{end:+.{places}f}" for end in cell["interval"])
        gap += f" [{low}, {high}] {cell['verdict']}"
    return {
        "task": cell["task"],
        "method": cell["method"],
        "epsilon": f"{cell['epsilon']:g}",
        "reached": mean if spread is None else f"{mean} ± {spread:.{places}f}",
        "difference": gap,
    }
