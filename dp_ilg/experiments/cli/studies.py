"""The commands of `dp-ilg` that study what papers report: `reproduce` and `audit`."""

import json as json_lib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from dp_ilg.experiments.papers.reproduce import ReproduceOptions, reproduction

_FEW = 3  # rows that can stand side by side in a terminal


def reproduce(
    table: Annotated[str, tyro.conf.Positional],
    *,
    data_dir: str | None = None,
    seeds: int = 3,
    quick: bool = False,
    max_minutes: float | None = None,
    out: str | None = None,
    only: tuple[str, ...] = (),
    json: bool = False,
) -> Callable[[], None]:
    """Measures again what a paper's table reports: table2, table3 or abadi.

    Args:
        table: table2 (claimed epsilons of DP-AdamILG and two others), table3 (its test
            accuracies, with and without a guarantee) or abadi (Abadi et al. 2016).
        data_dir: a folder of data files (NAME.npz or IDX files).
        seeds: runs of each row.
        quick: a small form that only shows that everything works.
        max_minutes: start no further run after this long.
        out: a file of JSON lines, one a finished run; what is there is not run again.
        only: only these data sets of table2 or table3.
        json: print one JSON object.

    Returns:
        What does it.

    Example:
        >>> reproduce("table4")
        Traceback (most recent call last):
        ValueError: There is no table 'table4' to reproduce; did you mean table3?
    """
    options = ReproduceOptions(
        data_dir=None if data_dir is None else Path(data_dir),
        seeds=seeds,
        quick=quick,
        max_minutes=max_minutes,
        out=None if out is None else Path(out),
        only=only,
    )
    run = reproduction(table, only)
    return lambda: show_rows(run(options), json)


def audit(
    target: Annotated[str, tyro.conf.Positional],
    *,
    data: str = "mnist",
    data_dir: str | None = None,
    trials: int | None = None,
    steps: int = 20,
    canaries: int = 1000,
    seed: int = 0,
    quick: bool = False,
    out: str | None = None,
    plot: str | None = None,
    json: bool = False,
) -> Callable[[], None]:
    """Attacks a trainer, or one release, with canaries and bounds epsilon from below.

    Args:
        target: a run folder, a configuration file or a shipped one such as digits: its
            whole trainer is attacked and each of its promises checked. Or a method:
            published (DP-AdamILG as its paper prints it, in both readings, with
            dp_adam_ilg beside it) or dp_adam_ilg, of which one release is attacked.
        data: of a method: mnist, fashion_mnist or digits.
        data_dir: a folder of data files (NAME.npz or IDX files).
        trials: runs with each canary, and as many without (default 200); for a
            method tested releases with the canary, and as many without (1000).
        steps: of each run of a trainer, at most those of its plan.
        canaries: of the single run of a trainer that has many (needs jax-privacy).
        seed: of network, canaries, batches and noise.
        quick: a small form.
        out: a file to which the result is added as JSON lines.
        plot: an SVG file in which a trainer's bounds are drawn.
        json: print one JSON object.

    Returns:
        What does it.

    Example:
        >>> audit("published", trials=3)
        Traceback (most recent call last):
        ValueError: trials is 3, but must be a whole number of at least 40.
    """
    from dp_ilg.experiments.audits.leak import AUDITS, AuditOptions  # slow to import
    from dp_ilg.experiments.audits.leak import audit as run

    files = [None if name is None else Path(name) for name in (data_dir, out, plot)]
    if target not in AUDITS:
        sizes = {} if trials is None else {"runs": trials}
        if quick:
            sizes, steps, canaries = {"runs": 50}, min(steps, 5), min(canaries, 200)
        chosen = dict(sizes, canaries=canaries, seed=seed)
        return _audit_trainer(target, chosen, steps, files, json)
    common = ReproduceOptions(data_dir=files[0], quick=quick, out=files[1])
    count = 1000 if trials is None else trials
    options = AuditOptions(data=data, trials=count, seed=seed, common=common)
    return lambda: show_rows(run(target, options), json)


def _audit_trainer(
    target: str,
    chosen: dict[str, int],
    steps: int,
    files: Sequence[Path | None],
    json: bool,
) -> Callable[[], None]:
    from dp_ilg.experiments.audits.report import TrainerAuditOptions
    from dp_ilg.experiments.cli.audit import audit_run, tables

    options, (data_dir, out, plot) = TrainerAuditOptions(**chosen), files

    def work() -> None:
        paths: Any = dict(data_dir=data_dir, out=out, plot=plot)
        found = audit_run(target, options, steps=steps, **paths)
        if json:
            print(json_lib.dumps(found))
            return
        for table in tables(found):
            show_rows(table, json)

    return work


def show_rows(found: Mapping[str, Any], json: bool) -> None:
    """Prints a title, rows under the names of their columns, and notes.

    Args:
        found: ``title``, ``rows`` (mappings with the same keys) and ``notes``.
        json: whether as one JSON object.

    Example:
        >>> show_rows({"title": "A", "rows": [], "notes": ["b"]}, True)
        {"title": "A", "rows": [], "notes": ["b"]}
    """
    if json:
        print(json_lib.dumps(found))
        return
    from rich.console import Console

    console, rows = Console(), found["rows"]
    table = _table(found["title"], rows)
    natural = console.measure(table, options=console.options.update(width=1000))
    wide = natural.maximum > console.width
    if wide and (len(rows) <= _FEW or _longest(rows) > console.width):
        table = _table(found["title"], _turned(rows))
    console.print(table)
    for note in found["notes"]:
        console.print(note, markup=False, highlight=False)


def _longest(rows: Sequence[Mapping[str, Any]]) -> int:
    """How wide a table must be to cut no word of its head."""
    names = rows[0] if rows else ()
    return sum(3 + max(map(len, name.split("_"))) for name in names) + 1


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for name in rows[0] if rows else ():
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _turned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Columns as rows, for a table wider than the terminal."""
    first, *others = rows[0] if rows else ("",)
    heads = [_cell(row[first]) for row in rows]
    return [
        {first: name.replace("_", " ")}
        | {
            f"{i} {head}" if heads.count(head) > 1 else head: row[name]
            for i, (head, row) in enumerate(zip(heads, rows, strict=True), 1)
        }
        for name in others
    ]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
