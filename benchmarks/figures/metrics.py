"""Released training metrics beside the true ones, with the band of their error."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dp_ilg.experiments.reports.svg import BLUE, INK
from figures.look import PLAIN, WIDTH, Drawing, Numbers, title
from tables.lines import Lines

_FIRST = 30  # before it the curves are too steep for their bands to be seen
_BAND = 1.96
_COLUMNS = ("value", "smoothed", "smoothed_stderr", "true_smoothed")


def numbers(lines: Lines) -> Numbers:
    """Curves of one run, by metric, once they are flat."""
    records: Any = lines("metric_band")
    found: Numbers = {}
    for line in records:
        if line["kind"] == "curve" and line["step"] >= _FIRST:
            own = found.setdefault(line["metric"], {name: [] for name in _COLUMNS})
            for name in _COLUMNS:
                own[name].append(float(line[name]))
    return found


def draw(found: Numbers) -> Figure:
    """One panel a metric."""
    figure = Figure(figsize=(WIDTH, 5.4))
    panels = figure.subplots(len(found), 1, sharex=True)
    for axes, (name, own) in zip(panels, found.items(), strict=True):
        _panel(axes, name, own)
    panels[0].legend(frameon=False, loc="lower right", ncols=2)
    panels[-1].set_xlabel("step")
    title(figure, "Released training metrics, and the truth")
    return figure


def _panel(axes: Axes, name: str, own: dict[str, list[float]]) -> None:
    steps = [_FIRST + k for k in range(len(own["value"]))]
    pairs = list(zip(own["smoothed"], own["smoothed_stderr"], strict=True))
    low, high = ([x + sign * _BAND * e for x, e in pairs] for sign in (-1, 1))
    axes.plot(steps, own["value"], ".", color=PLAIN, markersize=4, label="one step")
    axes.fill_between(steps, low, high, color=BLUE, alpha=0.25, lw=0, label="95 %")
    axes.plot(steps, own["smoothed"], color=BLUE, linewidth=1.8, label="25 steps")
    axes.plot(steps, own["true_smoothed"], color=INK, linewidth=1.2, label="truth")
    axes.set_ylabel(name)
    axes.set_xlim(_FIRST, steps[-1])
    axes.grid(axis="y")


METRICS = Drawing(numbers, draw)
