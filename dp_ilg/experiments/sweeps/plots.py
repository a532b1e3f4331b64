"""Figures of a comparison: accuracy against epsilon, and against the learning rate."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dp_ilg.experiments.reports.svg import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    short_names,
    styled,
)
from dp_ilg.experiments.sweeps.statistics import Result, measure_of_results

# Okabe and Ito's colours, and two more that are told apart from them.
_COLOURS = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7a52a3")
_MARKERS = "s^Dv<>PX"
_MOST_PANELS = 4


@styled
def accuracy_figure(results: Sequence[Result], reference: str) -> Figure:
    """Draws accuracy or error against epsilon, with bands of a standard deviation.

    Args:
        results: of one task.
        reference: the method drawn in black.

    Returns:
        The figure; cells without a run leave a gap.

    Example:
        >>> from dp_ilg.experiments.sweeps.runs import Cell
        >>> cells = [Result(Cell("t", "dp_adam", e), "done", mean=90 + e, deviation=1.0)
        ...          for e in (1.0, 2.0)]
        >>> figure = accuracy_figure(cells, "dp_adam")
        >>> figure.axes[0].get_ylabel()
        'test accuracy (%)'
    """
    figure = Figure(figsize=(7.2, 4.2))
    axes = figure.add_subplot()
    for method, look in _looks(results, reference).items():
        own = [r for r in results if r.cell.method == method and r.mean is not None]
        own = sorted(own, key=lambda result: result.cell.epsilon)
        x = [result.cell.epsilon for result in own]
        y = [result.mean or 0.0 for result in own]
        spread = [result.deviation or 0.0 for result in own]
        low = [a - b for a, b in zip(y, spread, strict=True)]
        high = [a + b for a, b in zip(y, spread, strict=True)]
        axes.plot(x, y, linewidth=1.8, markersize=5, **look)
        axes.fill_between(x, low, high, color=look["color"], alpha=0.1, linewidth=0.8)
    epsilons = sorted({result.cell.epsilon for result in results})
    _log_axis(axes, epsilons)
    axes.set_xlabel("privacy budget, ε")
    measure = measure_of_results(results)
    axes.set_ylabel(f"test {measure.words}{measure.in_units}")
    _finish(figure, axes)
    return figure


@styled
def sensitivity_figure(results: Sequence[Result], reference: str) -> Figure:
    """Draws accuracy or error on held-out examples against the learning rate.

    Args:
        results: of one task.
        reference: the method drawn in black.

    Returns:
        The figure, a panel for each of up to four epsilons; of several values of a
        method's own parameter the best is drawn.

    Example:
        >>> from dp_ilg.experiments.sweeps.runs import Cell
        >>> len(sensitivity_figure([Result(Cell("t", "m", 1.0), "done")], "m").axes)
        1
    """
    epsilons = sorted({result.cell.epsilon for result in results})
    every = -(-len(epsilons) // _MOST_PANELS)
    shown = epsilons[::every]
    figure = Figure(figsize=(max(7.2, 3.6 * len(shown)), 3.6))
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, epsilon in zip(panels, shown, strict=True):
        here = [result for result in results if result.cell.epsilon == epsilon]
        rates: set[float] = set()
        for method, look in _looks(results, reference).items():
            own = next((r for r in here if r.cell.method == method), None)
            best = _best_by_rate(own) if own else {}
            rates |= set(best)
            axes.plot(list(best), list(best.values()), linewidth=1.6, **look)
        axes.set_title(f"ε = {epsilon:g}", fontsize=10, loc="left")
        if rates:
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("learning rate")
        axes.grid(axis="y")
    measure = measure_of_results(results)
    panels[0].set_ylabel(f"held-out {measure.words}{measure.in_units}")
    _finish(figure, panels[-1])
    return figure


def _best_by_rate(result: Result) -> dict[float, float]:
    best: dict[float, float] = {}
    for choice, value in result.tuned:
        rate = choice.learning_rate
        best[rate] = max(value, best.get(rate, value), key=result.measure.better)
    return dict(sorted(best.items()))


def _looks(results: Sequence[Result], reference: str) -> dict[str, dict]:
    """A colour, a marker and a label for each method, the reference in black."""
    methods = list(dict.fromkeys(result.cell.method for result in results))
    labels = short_names(methods, 40)
    looks, others = {}, 0
    for method, label in zip(methods, labels, strict=True):
        if method == reference:
            looks[method] = {"color": INK, "linestyle": "--", "marker": "o"}
        else:
            style = ("-", ":", "-.")[others // len(_COLOURS) % 3]
            place = others % len(_COLOURS)
            others += 1
            looks[method] = {
                "color": _COLOURS[place],
                "marker": _MARKERS[place],
                "linestyle": style,
            }
        looks[method]["label"] = label
    return looks


def _log_axis(axes: Axes, ticks: Sequence[float]) -> None:
    if ticks[-1] >= 4 * ticks[0]:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.grid(axis="y")


def _finish(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(3, len(handles)),
            fontsize=8.5,
            labelcolor=MUTED,
        )
