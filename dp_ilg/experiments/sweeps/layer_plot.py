"""The figure of a layer study: a row a task, what could be gained and what was."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from dp_ilg.experiments.reports.svg import (
    BLUE,
    GRID,
    INK,
    MUTED,
    ORANGE,
    short_names,
    styled,
)

_RULES = (("uniform", ORANGE, "o"), ("min_noise_energy", BLUE, "D"))


@styled
def plot_layers(records: list[dict[str, Any]]) -> Figure:
    """Draws size against share of the norm, and each layer's signal over noise.

    Args:
        records: one a task: "task", "noise_energy_ratio" and "layers" as
            `dp_ilg.experiments.sweeps.layer_study.measure` gives them.

    Returns:
        The figure. On the left, layers on the diagonal have as much of the squared norm
        as of the parameters; on the right they stand by falling size.

    Example:
        >>> rule = {"snr": 1.0}
        >>> layer = {"name": "a", "size": 3, "share": 1.0}
        >>> layer |= {"uniform": rule, "min_noise_energy": rule}
        >>> record = {"task": "t", "step": 0, "noise_energy_ratio": 1.0}
        >>> len(plot_layers([record | {"layers": [layer]}]).axes)
        2
    """
    count = len(records)
    figure = Figure(figsize=(9.5, 2.6 * count + 0.3))
    for row, record in enumerate(records):
        _shares(figure.add_subplot(count, 2, 2 * row + 1), record)
        _snr(figure.add_subplot(count, 2, 2 * row + 2), record, legend=not row)
    return figure


def _shares(axes: Any, record: dict[str, Any]) -> None:
    layers = record["layers"]
    sizes = np.array([layer["size"] for layer in layers], float)
    shares = np.maximum([layer["share"] for layer in layers], 1e-7)
    axes.loglog([1e-7, 1], [1e-7, 1], color=GRID, zorder=0)
    axes.loglog(sizes / sizes.sum(), shares, "o", color=INK, markersize=3.5)
    axes.set_xlim(1e-5, 1.6)
    axes.set_ylim(1e-5, 1.6)
    ratio = record["noise_energy_ratio"]
    title = f"{record['task']}: noise energy x {ratio:.2f}"
    axes.set_title(title, loc="left", fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    axes.set_xlabel("share of the parameters", fontsize=9)
    axes.set_ylabel("of the squared norm", fontsize=9)


def _plain_ticks(axis: Any) -> None:
    """Powers of ten as plain numbers: the look of these figures has no mathematics."""
    axis.set_major_locator(LogLocator(numticks=6))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _snr(axes: Any, record: dict[str, Any], *, legend: bool) -> None:
    layers = sorted(record["layers"], key=lambda layer: -layer["size"])
    place = np.arange(len(layers))
    found = {r: np.array([layer[r]["snr"] for layer in layers]) for r, _, _ in _RULES}
    low = max(1e-3, min(v[v > 0].min(initial=1.0) for v in found.values()) / 2)
    ends = [np.maximum(values, low) for values in found.values()]
    axes.vlines(place, *ends, color=GRID, linewidth=1.5, zorder=0)
    for rule, color, marker in _RULES:
        values = np.maximum(found[rule], low)
        axes.plot(place, values, marker, color=color, markersize=3.5, label=rule)
    axes.axhline(1.0, color=MUTED, linewidth=0.7, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylim(low / 1.5, 1.5 * max(1.0, *(v.max() for v in found.values())))
    _plain_ticks(axes.yaxis)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylabel("signal / noise")
    axes.set_title(f"step {record['step']}, layers by size", loc="left", fontsize=10)
    if len(layers) <= 12:
        names = short_names([layer["name"] for layer in layers], 14)
        axes.set_xticks(place, names, rotation=30, ha="right", fontsize=7)
    else:
        axes.set_xticks([])
    if legend:
        axes.legend(fontsize=8)
