"""IMDB: accuracy against epsilon, and where the noise went."""

import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dp_ilg.experiments.reports.svg import BLUE, GRID, INK, MUTED, ORANGE
from figures.look import ON_WHITE, PLAIN, WIDTH, Drawing, Numbers, bare
from tables.lines import Lines, accuracies
from tables.utility import BALANCED, IMDB, REFERENCE

_LEAVES = {
    "hidden_0/kernel": "hidden layer, weights",
    "hidden_0/bias": "hidden layer, biases",
    "output/kernel": "output layer, weights",
    "output/bias": "output layer, bias",
}
_BANDS, _DP_ADAM = "importance, 8 bands of words", "DP-Adam"


def numbers(lines: Lines) -> Numbers:
    """Mean and deviation by method and epsilon; noise of every group over DP-Adam's."""
    found = accuracies(lines(IMDB.file))
    accuracy = {
        words: {
            f"{e:g}": [statistics.mean(of.values()), statistics.stdev(of.values())]
            for (method, e), of in sorted(found.items(), key=lambda item: item[0][1])
            if method == chosen
        }
        for words, chosen in {_BANDS: BALANCED, _DP_ADAM: REFERENCE}.items()
    }
    last = [r for r in lines("layer_study") if r["task"] == "imdb_embedding"][-1]
    noise = {
        _group(of["name"]): of["min_noise_energy"]["noise"] / of["uniform"]["noise"]
        for of in last["layers"]
    }
    return {"accuracy": accuracy, "noise": noise, "step": last["step"]}


def _group(name: str) -> str:
    if name in _LEAVES:
        return _LEAVES[name]
    first, last = name.partition("[")[2].rstrip("]").split(":")
    return f"words {int(first) + 1:,} to {int(last):,}"


def draw(found: Numbers) -> Figure:
    """Accuracy above, noise below."""
    figure = Figure(figsize=(WIDTH, 7.6))
    above, below = figure.subplots(2, 1, height_ratios=[1, 1.12])
    _accuracy(above, found["accuracy"])
    _noise(below, found["noise"], found["step"])
    return figure


def _accuracy(axes: Axes, found: Numbers) -> None:
    _line(axes, found[_BANDS], BLUE, 1)
    _line(axes, found[_DP_ADAM], ORANGE, -1)
    axes.set_xticks(range(len(found[_BANDS])), list(found[_BANDS]), color=INK)
    axes.margins(x=0.12, y=0.16)
    axes.set_xlabel("privacy budget ε: smaller is more private")
    axes.set_title("IMDB, δ = 1e-5: test accuracy, %", loc="left", fontweight="bold")
    axes.text(0.03, 0.93, _BANDS, transform=axes.transAxes, color=BLUE)
    axes.text(0.66, 0.45, _DP_ADAM, transform=axes.transAxes, color=ORANGE)
    axes.grid(axis="y")


def _line(axes: Axes, points: Numbers, colour: str, side: int) -> None:
    """Means with their deviations; the numbers stand above (1) or below (-1)."""
    means, deviations = zip(*points.values(), strict=True)
    look: Any = {"color": colour, "marker": "o" if side > 0 else "s"}
    axes.errorbar(range(len(means)), means, deviations, linewidth=2, capsize=4, **look)
    for place, (mean, deviation) in enumerate(points.values()):
        axes.annotate(
            f"{mean:.1f}",
            (place, mean + side * deviation),
            xytext=(-6 * side, 9 * side),
            textcoords="offset points",
            ha="center",
            va="center",
            color=colour,
            fontweight="bold",
        )


def _noise(axes: Axes, found: Numbers, step: int) -> None:
    places = range(len(found))
    axes.barh(
        places,
        list(found.values()),
        0.7,
        color=[BLUE if value < 1 else PLAIN for value in found.values()],
    )
    for place, value in zip(places, found.values(), strict=True):
        text = f"{value:.2f}"
        axes.text(value + 0.05, place, text, va="center", color=MUTED, bbox=ON_WHITE)
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set_yticks(places, list(found))
    axes.invert_yaxis()
    bare(axes)
    axes.set_xlim(0, 1.12 * max(found.values()))
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.set_title("Noise by group, DP-Adam = 1", loc="left", fontweight="bold")
    axes.set_xlabel(f"words by frequency rank; after {step} steps")


IMDB_FIGURE = Drawing(numbers, draw)
