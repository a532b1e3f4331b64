"""Several runs side by side: what differs in their settings, cost and accuracy."""

import itertools
import math
import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dp_ilg.experiments.config.kinds import MEASURES, Measure
from dp_ilg.experiments.reports.history import History
from dp_ilg.experiments.reports.record import RunRecord, read_run
from dp_ilg.experiments.reports.rendering import template, write_page
from dp_ilg.experiments.reports.svg import BLUE, GREEN, ORANGE, inline_svg, styled
from dp_ilg.experiments.reports.words import short, shown_epsilon

_MARK = '<meta name="generator" content="dp-ilg report">'  # of pages that are ours
_CURVES = {"accuracy": "accuracies", "mse": "mses"}  # a measure's key in JSON
_FEW_POINTS = 60  # so many have a mark each
_LOOKS: list[dict[str, Any]] = [
    {"linestyle": dash, "color": colour}
    for dash, colour in itertools.product(("-", "--", ":"), (BLUE, ORANGE, GREEN))
]


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    Attributes:
        name: the folder's, or its path where names are equal.
        record: what the folder says.
        why_not: why it cannot be compared with the first run; empty if it can.

    Example:
        >>> ComparedRun.__dataclass_fields__["why_not"].type.__name__
        'str'
    """

    name: str
    record: RunRecord
    why_not: str

    @property
    def answer(self) -> float | None:
        """Test accuracy or error at the last evaluation; None before the first."""
        history = self.record.history
        return None if history is None else float(history.answers[-1])

    @property
    def measure(self) -> Measure:
        """What it is measured by."""
        history = self.record.history
        return MEASURES["accuracy"] if history is None else history.measure

    @property
    def epsilon(self) -> float | None:
        """Epsilon of all steps charged; None without privacy."""
        found = self.record.epsilon_charged()
        return found if math.isfinite(found) else None

    def as_dict(self) -> dict[str, Any]:
        """The run as JSON values, its curve included."""
        record, history = self.record, self.record.history
        curve: dict[str, list[float | None]] = {}
        if history is not None:
            names = ("steps", "epsilons", "answers", "seconds")
            known = {"answers": _CURVES[history.measure.name]}
            curve = {known.get(n, n): _finite(getattr(history, n)) for n in names}
        return {
            "name": self.name,
            "data": record.data,
            "num_examples": record.plan.num_examples,
            self.measure.name: self.answer,
            "epsilon": self.epsilon,
            "delta": record.plan.delta,
            "steps": record.steps_charged,
            "planned_steps": record.plan.num_steps,
            "finished": record.summary is not None,
            "comparable": not self.why_not,
            "why_not": self.why_not,
            "date": record.origin.date,
            "digests": record.origin.digests,
            "curve": curve,
        }


def _finite(values: Any) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; the first is what the others are compared with.

    Attributes:
        runs: in the order given.
        differing: setting -> its value in every run, None where it is not used.

    Example:
        >>> Comparison((), {}).as_dict()
        {'runs': [], 'differing_settings': {}}
    """

    runs: tuple[ComparedRun, ...]
    differing: dict[str, list[Any]]

    def as_dict(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        runs = [run.as_dict() for run in self.runs]
        return {"runs": runs, "differing_settings": self.differing}


def compare_runs(run_dirs: Sequence[Path]) -> Comparison:
    """Reads several run folders and finds what differs.

    Args:
        run_dirs: at least one folder; others than the first are compared with it.

    Returns:
        The comparison.

    Raises:
        ValueError: in one sentence, for a folder that is missing or damaged.

    Example:
        >>> compare_runs([Path("no/such/run")])
        Traceback (most recent call last):
        ValueError: no/such/run is not a folder; give the folder of a training run.
    """
    records = [read_run(Path(folder)) for folder in run_dirs]
    names = [record.folder for record in records]
    if len(set(names)) < len(names):
        names = [os.path.normpath(folder) for folder in run_dirs]
    runs = tuple(
        ComparedRun(name, record, _why_not(records[0], record))
        for name, record in zip(names, records, strict=True)
    )
    settings = [record.settings for record in records]
    known = dict.fromkeys(path for one in settings for path in one)
    values = {path: [one.get(path) for one in settings] for path in known}
    return Comparison(
        runs, {p: v for p, v in values.items() if any(x != v[0] for x in v)}
    )


def _why_not(first: RunRecord, other: RunRecord) -> str:
    """Which facts forbid to compare accuracy and epsilon with the first run's."""
    facts = {
        "data": (first.data, other.data),
        "number of examples": (first.plan.num_examples, other.plan.num_examples),
        "share held out": tuple(
            record.settings.get("data.validation") for record in (first, other)
        ),
        "delta": (first.plan.delta, other.plan.delta),
        "neighbouring relation": (
            first.plan.neighboring_relation,
            other.plan.neighboring_relation,
        ),
    }
    found = [f"{name} {b}, not {a}" for name, (a, b) in facts.items() if a != b]
    return f"not comparable with the first run: {'; '.join(found)}" if found else ""


def write_comparison(comparison: Comparison, path: Path) -> Path:
    """Writes the page of a comparison.

    Args:
        comparison: what `compare_runs` found.
        path: where to; an older comparison is replaced, any other file is not.

    Returns:
        `path`.

    Raises:
        ValueError: in one sentence, if the file is another one or cannot be written.

    Privacy:
        As for the page of one run: released values, public facts, test accuracy.

    Example:
        >>> write_comparison(Comparison((), {}), Path("/no/such/folder/a.html"))
        Traceback (most recent call last):
        ValueError: /no/such/folder/a.html cannot be written (No such file or \
directory); free space, change permissions or choose another path.
    """
    path = Path(path)
    if os.path.lexists(path) and _MARK not in _beginning(path):
        raise ValueError(
            f"{path} exists and is no comparison of runs; choose another one with "
            "--out."
        )
    return write_page(path, render_comparison(comparison))


def _beginning(path: Path) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1000)
    except OSError:
        return ""


def render_comparison(comparison: Comparison) -> str:
    """Returns the page of a comparison as text.

    Args:
        comparison: what `compare_runs` found.

    Returns:
        HTML in which everything that came from a folder is escaped.

    Example:
        >>> "Runs compared" in render_comparison(Comparison((), {}))
        True
    """
    drawn = [run for run in comparison.runs if run.record.history is not None]
    figure = curves_figure(drawn) if drawn else None
    curves = "" if figure is None else inline_svg(figure, "curves", _ABOUT)
    return template("comparison.html.jinja").render(
        mark=Markup(_MARK),
        rows=[_row(run) for run in comparison.runs],
        differing={
            path: [_shown(value) for value in values]
            for path, values in comparison.differing.items()
        },
        names=[run.name for run in comparison.runs],
        notes=[
            f"{run.name} is {run.why_not}." for run in comparison.runs if run.why_not
        ],
        curves=Markup(curves),
    )


_ABOUT = "Test accuracy of every run, over the epsilon spent and over steps"


def _row(run: ComparedRun) -> dict[str, str]:
    record, history = run.record, run.record.history
    state = "" if record.summary is not None else ", unfinished"
    return {
        "name": run.name,
        "data": record.data,
        "accuracy": "–" if history is None else _with_name(history),
        "epsilon": shown_epsilon(record.epsilon_charged()),
        "delta": short(record.plan.delta),
        "steps": f"{record.steps_charged:,} of {record.plan.num_steps:,}{state}",
        "date": record.origin.date,
        "comparable": "no" if run.why_not else "yes",
    }


def _with_name(history: History) -> str:
    """The last answer; an error is named, since the column's head is another."""
    words, measure = history.last_words(), history.measure
    return words if measure.unit else f"{measure.words} {words}"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


@styled
def curves_figure(runs: Sequence[ComparedRun]) -> Figure:
    """Draws test accuracy or error of runs against epsilon and against steps.

    Args:
        runs: each with at least one evaluation; those that are not comparable are thin.

    Returns:
        Two panels with one legend.

    Example:
        >>> import inspect
        >>> list(inspect.signature(curves_figure).parameters)
        ['runs']
    """
    figure = Figure(figsize=(10.9, 3.8))
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for run, look in zip(runs, itertools.cycle(_LOOKS)):
        history = run.record.history
        assert history is not None
        look = {**look, "linewidth": 1.0 if run.why_not else 1.8, "markersize": 3.5}
        look["marker"] = "o" if len(history.steps) <= _FEW_POINTS else ""
        shown = history.measure.scale * history.answers
        if all(math.isfinite(e) for e in history.epsilons):
            left.plot(history.epsilons, shown, **look)
        right.plot(history.steps, shown, label=run.name, **look)
    names = {run.measure.words + run.measure.in_units: None for run in runs}
    _finish(left, "privacy budget spent, ε", " or ".join(names))
    _finish(right, "step", " or ".join(names))
    right.legend(loc="best", fontsize=9)
    return figure


def _finish(axes: Axes, label: str, measured: str) -> None:
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    axes.set_ylabel(f"test {measured}")
    axes.grid(axis="y")
