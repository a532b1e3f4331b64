"""The report of a comparison: one page, the same as Markdown, and its figures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from dp_ilg.experiments.config.kinds import Measure
from dp_ilg.experiments.reports.svg import inline_svg, printable, save_figure
from dp_ilg.experiments.runs.folder import write_atomically
from dp_ilg.experiments.sweeps import plots
from dp_ilg.experiments.sweeps.cost import tuning_cost, whole_cost
from dp_ilg.experiments.sweeps.runs import Cell, idle_in
from dp_ilg.experiments.sweeps.statistics import Difference, Result, measure_of_results
from dp_ilg.experiments.sweeps.sweep import Sweep

_MARKS = {"above": "▲", "below": "▼", "tie": "tie"}


@dataclass(frozen=True)
class Comparison:
    """A sweep and what it has found.

    Attributes:
        sweep: the sweep.
        results: of each cell.
        records: the lines they were made from.

    Example:
        >>> from dp_ilg.experiments.sweeps.sweep import Method, Task
        >>> sweep = Sweep(tasks=(Task(),), methods=(Method(),))
        >>> Comparison(sweep, {}, ()).missing()
        []
    """

    sweep: Sweep
    results: Mapping[Cell, Result]
    records: Sequence[Mapping[str, Any]]

    def missing(self) -> list[str]:
        """One line for each cell that is not done."""
        return [
            f"{cell}: {result.status}. {result.note}"
            for cell, result in self.results.items()
            if result.status != "done"
        ]

    def columns(self) -> list[str]:
        """One line for each method whose own parameter does nothing on a task."""
        found = []
        for task in self.sweep.tasks:
            grids = {m.name: self.sweep.grid(task, m) for m in self.sweep.methods}
            several = any(len(grid.values) > 1 for grid in grids.values())
            for method in self.sweep.methods if several else ():
                why, grid = idle_in(self.sweep, task, method), grids[method.name]
                if why:
                    found.append(
                        f"{task.label()}, {method.name}: {grid.parameter} does nothing "
                        f"there ({why}), so its values are one column of the grid."
                    )
        return found

    def of_task(self, task: str) -> list[Result]:
        """The results of one task."""
        return [r for cell, r in self.results.items() if cell.task == task]


def write_comparison(comparison: Comparison, folder: Path) -> dict[str, str]:
    """Writes report.html, report.md and the figures of each task.

    Args:
        comparison: what to show.
        folder: where to.

    Returns:
        Paths of the two reports.

    Raises:
        OSError: if they cannot be written.

    Example:
        >>> import inspect
        >>> list(inspect.signature(write_comparison).parameters)
        ['comparison', 'folder']
    """
    tasks = [_task(comparison, task.label()) for task in comparison.sweep.tasks]
    for number, task in enumerate(tasks, 1):
        for name, figure in task["figures"].items():
            save_figure(figure, folder / f"{name}-{number}.svg")
    page, text = folder / "report.html", folder / "report.md"
    write_atomically(page, _html(comparison, tasks))
    write_atomically(text, _markdown(comparison, tasks))
    return {"report": str(page), "markdown": str(text)}


def table_of(results: Sequence[Result], reference: str) -> list[dict[str, Any]]:
    """One row a method: name, and a cell a column of epsilon.

    Args:
        results: of one task.
        reference: the method the others are compared with.

    Returns:
        Rows of texts: `method`, and `cells` with `mean`, `gap`, `perplexity`, `verdict`
        and `title`.

    Example:
        >>> done = Result(Cell("t", "m", 1.0), "done", mean=97.123, deviation=0.2,
        ...     by_seed={0: 97.0, 1: 97.2})
        >>> table_of([done], "m")[0]["cells"][0]["mean"]
        '97.12 ± 0.20'
    """
    methods = dict.fromkeys(result.cell.method for result in results)
    return [
        {
            "method": printable(method),
            "is_reference": method == reference,
            "cells": [_cell(r) for r in results if r.cell.method == method],
        }
        for method in methods
    ]


def _cell(result: Result) -> dict[str, str]:
    found = {"mean": result.status, "gap": "", "verdict": "", "title": result.note}
    found["perplexity"] = _perplexity(result)
    if result.mean is None:
        return found
    digits = result.measure.digits
    spread = "" if result.deviation is None else f" ± {result.deviation:.{digits}f}"
    found["mean"] = f"{result.mean:.{digits}f}{spread}"
    if result.status != "done":
        found["mean"] += f" ({len(result.by_seed or ())} seeds)"
    if result.difference is not None:
        gap, verdict = result.difference, result.difference.verdict()
        found["verdict"] = verdict
        found["gap"] = f"{_ends(gap, digits)} {_MARKS[verdict]}"
    return found


def _ends(gap: Difference, digits: int = 2) -> str:
    low, high = f"{gap.low:+.{digits}f}", f"{gap.high:+.{digits}f}"
    ends = f" ({low} to {high})" if math.isfinite(gap.low) else ""
    return f"{round(gap.mean, digits) + 0.0:+.{digits}f}{ends}"


def _perplexity(result: Result) -> str:
    """What a task of texts to continue shows beside its accuracy; less is better."""
    values = list(result.perplexity.values())
    if not values:
        return ""
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    gap = "" if result.perplexity_gap is None else f"; {_ends(result.perplexity_gap)}"
    return f"perplexity {mean(values):.2f}{spread}{gap}"


def _task(comparison: Comparison, name: str) -> dict[str, Any]:
    results, reference = comparison.of_task(name), comparison.sweep.reference
    measure = measure_of_results(results)
    return {
        "name": printable(name),
        "measured": measure.words + measure.in_units,
        "epsilons": [f"{epsilon:g}" for epsilon in comparison.sweep.epsilons],
        "rows": table_of(results, reference),
        "choices": [_choice(result) for result in results if result.choice],
        "grid": [row for result in results for row in _grid(result)],
        "times": _times(comparison, name),
        "figures": {
            "accuracy": plots.accuracy_figure(results, reference),
            "learning-rate": plots.sensitivity_figure(results, reference),
        },
    }


def _choice(result: Result) -> dict[str, str]:
    choice, held = result.choice, result.validation
    assert choice is not None
    return {
        "method": printable(result.cell.method),
        "epsilon": f"{result.cell.epsilon:g}",
        "learning_rate": f"{choice.learning_rate:g}",
        "parameter": f"{printable(choice.parameter)} = {printable(str(choice.value))}",
        "validation": "-" if held is None else f"{_held(result, held)}{_lost(result)}",
    }


def _grid(result: Result) -> list[dict[str, Any]]:
    """Every point of a cell's grid that was tried: a row a value of the parameter."""
    rows: dict[str, dict[str, Any]] = {}
    for choice, held in result.tuned:
        own = f"{printable(choice.parameter)} = {printable(str(choice.value))}"
        first = {
            "method": printable(result.cell.method),
            "epsilon": f"{result.cell.epsilon:g}",
            "parameter": own,
            "points": [],
        }
        point = {
            "rate": f"{choice.learning_rate:g}",
            "held": _held(result, held),
            "chosen": choice == result.choice,
        }
        rows.setdefault(own, first)["points"].append(point)
    return list(rows.values())


def _held(result: Result, value: float) -> str:
    return f"{value:.{result.measure.digits}f}"


def _lost(result: Result) -> str:
    return f" ({result.lost} tuning runs reached nothing)" if result.lost else ""


def _times(comparison: Comparison, task: str) -> list[dict[str, str]]:
    """Wall time of each method: of one run, and of everything it took."""
    rows = []
    for method in comparison.sweep.methods:
        own = [
            record
            for record in comparison.records
            if record["kind"] == "run"
            and (record["task"], record["method"]) == (task, method.name)
            and record["status"] == "done"
        ]
        final = [r["train_seconds"] for r in own if r["phase"] == "final"]
        rows.append(
            {
                "method": printable(method.name),
                "run": f"{median(final):.1f}" if final else "-",
                "runs": f"{len(own):,}",
                "total": f"{sum(r['seconds'] for r in own) / 60:.1f}",
            }
        )
    return rows


def _facts(comparison: Comparison) -> dict[str, Any]:
    """What is said around the tables."""
    sweep, records = comparison.sweep, comparison.records
    kinds = {measure_of_results(comparison.of_task(t.label())) for t in sweep.tasks}
    machines = {
        f"{r.get('processor', '?')}, Python {r.get('python', '?')}, "
        + ", ".join(f"{k} {v}" for k, v in sorted(r.get("versions", {}).items()))
        for r in records
        if r["kind"] == "run"
    }
    grid = sweep.grid(sweep.tasks[0], sweep.methods[0])
    costs = [_cost_row(row) for row in tuning_cost(records)]
    return {
        "title": printable(sweep.label()),
        "measured": " or ".join(sorted(map(_in_words, kinds))),
        "kind": " or ".join(sorted(kind.words for kind in kinds)),
        "reference": printable(sweep.reference),
        "seeds": len(sweep.seeds),
        "few_seeds": len(sweep.seeds) < 5,
        "rates": len(grid.learning_rates),
        "values": len(grid.values),
        "tuning_seeds": len(sweep.tuning.seeds),
        "validation": f"{100 * sweep.tuning.validation:g}",
        "missing": [printable(line) for line in comparison.missing()],
        "columns": [printable(line) for line in comparison.columns()],
        "machines": sorted(printable(m) for m in machines),
        "costs": costs,
        "totals": [_total_row(row) for row in whole_cost(records)],
        "looks": sum(row["count"] for row in costs),
        "runs": sum(r["kind"] == "run" and r["status"] == "done" for r in records),
    }


def _in_words(measure: Measure) -> str:
    unit = " in percent" if measure.unit else ""
    return f"test {measure.words}{unit}{', better where less' if measure.least else ''}"


def _cost_row(row: Mapping[str, Any]) -> dict[str, Any]:
    searched = row["search_epsilon"]
    return {
        "name": printable(f"{row['task']}, {row['method']}"),
        "epsilon": f"{row['epsilon']:g}",
        "count": row["runs"],
        "sum": f"{row['sum_of_epsilons']:.4g}, δ {row['sum_of_deltas']:.3g}",
        "search": "-" if searched is None else f"{searched:.4g}",
    }


def _total_row(row: Mapping[str, Any]) -> str:
    return printable(
        f"{row['task']}: {row['runs']} runs, ε {row['sum_of_epsilons']:.4g} at "
        f"δ {row['sum_of_deltas']:.3g}"
    )


def _html(comparison: Comparison, tasks: Sequence[Mapping[str, Any]]) -> str:
    template = resources.files("dp_ilg.experiments.sweeps") / "report.html.jinja"
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = [
        {**task, "figures": _inline(task["figures"], number)}
        for number, task in enumerate(tasks, 1)
    ]
    page = environment.from_string(template.read_text(encoding="utf-8"))
    return page.render(tasks=shown, **_facts(comparison))


def _inline(figures: Mapping[str, Any], number: int) -> dict[str, Markup]:
    about = {
        "accuracy": "What each method reached against epsilon",
        "learning-rate": "What each method reached against its learning rate",
    }
    return {
        name.replace("-", "_"): Markup(
            inline_svg(figure, f"{name}{number}", about[name])
        )
        for name, figure in figures.items()
    }


def _markdown(comparison: Comparison, tasks: Sequence[Mapping[str, Any]]) -> str:
    template = resources.files("dp_ilg.experiments.sweeps") / "report.md.jinja"
    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _plain(value) if isinstance(value, str) else value,
    )
    text = environment.from_string(template.read_text(encoding="utf-8"))
    return text.render(tasks=tasks, **_facts(comparison))


def _plain(text: str) -> str:
    """Text that cannot be mistaken for markup or for the end of a cell."""
    found = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in ("\\", "|", "*", "`", "[", "]"):
        found = found.replace(mark, f"\\{mark}")
    return found.replace("\n", " ")
