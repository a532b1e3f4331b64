"""The command `report`: the page of a run, of several runs, or a check of it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from dp_ilg.experiments.cli.commands import Rows, show

_ROWS: Rows = {
    "run_dir": ("Run folder", "{}"),
    "model_sha256": ("Model (SHA-256)", "{}"),
    "ledger_sha256": ("Ledger (SHA-256)", "{}"),
    "verdict": ("Page and files", "{}"),
    "report": ("Report", "{}"),
}
_DIGEST = r'<code id="%s-sha256">([0-9a-f]{64})</code>'


def report(
    run_dirs: Annotated[tuple[str, ...], tyro.conf.Positional],
    *,
    check: bool = False,
    out: str = "comparison.html",
    json: bool = False,
) -> Callable[[], None]:
    """Writes report.html of a run folder once more, or compares several runs.

    Args:
        run_dirs: folders of training runs; several are compared on one page.
        check: write nothing, but compute the digests of model and ledger again and
            compare them with those on the page of every folder.
        out: where the comparison of several runs is written.
        json: print one JSON object.

    Returns:
        What does it.

    Raises:
        ValueError: without a folder.

    Example:
        >>> report(("no/such/run",))()
        Traceback (most recent call last):
        ValueError: no/such/run is not a folder; give the folder of a training run.
    """
    if not run_dirs:
        raise ValueError("report needs the folder of a training run, or several.")
    if check:
        return lambda: _show_checks(run_dirs, json)
    if len(run_dirs) > 1:
        return lambda: _compare([Path(name) for name in run_dirs], Path(out), json)

    run_dir = str(next(iter(run_dirs)))

    def work() -> None:
        from dp_ilg.experiments.reports.page import write_report

        path = write_report(Path(run_dir))
        show({"run_dir": run_dir, "report": str(path)}, json, _ROWS)

    return work


def _show_checks(run_dirs: tuple[str, ...], json: bool) -> None:
    found = [checked(Path(name)) for name in run_dirs]
    if json and len(found) > 1:
        show({"runs": found}, json, _ROWS)
        return
    for one in found:
        show(one, json, _ROWS)


def checked(run_dir: Path) -> dict[str, Any]:
    """Compares the digests on a page with the files it speaks of.

    Args:
        run_dir: the folder of a training run, with its page.

    Returns:
        The digests and what was found.

    Raises:
        ValueError: in one sentence, if a digest is another one or a file is missing or
            damaged.

    Example:
        >>> checked(Path("no/such/run"))
        Traceback (most recent call last):
        ValueError: no/such/run is not a folder; give the folder of a training run.
    """
    from dp_ilg.experiments.reports.record import read_run
    from dp_ilg.experiments.runs.export import stored_sha256

    record = read_run(run_dir)
    page = run_dir / "report.html"
    try:
        text = page.read_text("utf-8")
    except (OSError, ValueError):
        raise ValueError(
            f"{page} cannot be read; write it with dp-ilg report {run_dir}."
        ) from None
    shown = {kind: _shown(text, kind) for kind in ("model", "ledger")}
    _same(page, "ledger", shown["ledger"], record.origin.ledger_sha256)
    found = {"run_dir": str(run_dir), "ledger_sha256": shown["ledger"]}
    if record.summary is None:
        return found | {"verdict": "the ledger is the page's; the run is unfinished"}
    step, stored = stored_sha256(run_dir)
    _same(page, "model", shown["model"], stored)
    return found | {
        "model_sha256": stored,
        "verdict": f"belong together, after step {step:,}",
    }


def _shown(text: str, kind: str) -> str | None:
    match = re.search(_DIGEST % kind, text)
    return match[1] if match else None


def _same(page: Path, kind: str, shown: str | None, there: str) -> None:
    if shown != there:
        on_page = "no digest" if shown is None else f"the digest {shown[:16]}..."
        raise ValueError(
            f"{page} has {on_page} of the {kind}, but the file's is {there[:16]}...; "
            f"find out which of them was changed, or write the page again with "
            f"dp-ilg report {page.parent}."
        )


def _compare(run_dirs: list[Path], out: Path, json: bool) -> None:
    from dp_ilg.experiments.cli.studies import show_rows
    from dp_ilg.experiments.reports.comparison import compare_runs, write_comparison

    found = compare_runs(run_dirs)
    path = write_comparison(found, out)
    if json:
        show(found.as_dict() | {"report": str(path)}, json, _ROWS)
        return
    notes = [f"{run.name}: {run.why_not}" for run in found.runs if run.why_not]
    notes += [f"Report: {path}"]
    rows = [
        {
            "run": run.name,
            "data": run.record.data,
            run.measure.name: run.answer,
            "epsilon": run.epsilon,
            "delta": run.record.plan.delta,
            "steps": run.record.steps_charged,
        }
        for run in found.runs
    ]
    show_rows({"title": "Runs compared", "rows": rows, "notes": notes}, json)
