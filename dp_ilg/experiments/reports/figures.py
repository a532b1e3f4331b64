"""Figures of one private run: what it cost, what it reached, where the noise went.

Each function takes a `History` and returns a Matplotlib figure; `svg` turns figures
into files and into parts of a page.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dp_ilg.experiments.reports.history import History
from dp_ilg.experiments.reports.svg import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    short_names,
    styled,
)

_LOG_FROM_RATIO = 20.0
_MOST_ROWS = 90  # more layers share this height, and every k-th has a label


@styled
def accuracy_figure(history: History, target_epsilon: float | None) -> Figure:
    """Draws test accuracy or error against the epsilon spent, the target marked.

    Args:
        history: the run; without privacy its accuracy is drawn over steps.
        target_epsilon: the epsilon the plan was made for, if it was.

    Returns:
        The figure.

    Example:
        >>> from dp_ilg.experiments.reports.history import example_history
        >>> figure = accuracy_figure(example_history(), 2.0)
        >>> figure.axes[0].get_xlabel()
        'privacy budget spent, ε'
    """
    figure = Figure(figsize=(5.2, 3.4))
    _draw_accuracy(figure.add_subplot(), history, target_epsilon)
    return figure


def _draw_accuracy(axes: Axes, history: History, target: float | None) -> None:
    private = bool(np.isfinite(history.epsilons).all())
    x = history.epsilons if private else history.steps
    marker = "o" if len(x) <= 60 else ""
    measure = history.measure
    shown = measure.scale * history.answers
    axes.plot(x, shown, color=BLUE, marker=marker, markersize=4.5, linewidth=1.8)
    axes.annotate(
        history.last_words(),
        (x[-1], shown[-1]),
        xytext=(-2, 9),
        textcoords="offset points",
        ha="right",
        color=BLUE,
        fontweight="bold",
    )
    axes.margins(y=0.18)
    right = x[-1]
    if private and target is not None:
        right = max(right, target)
        _mark(axes, target, f"plan: ε = {target:g}", to_the_left=True)
    axes.set_xlim(0, 1.04 * right)
    axes.set_xlabel("privacy budget spent, ε" if private else "step (ε = ∞)")
    axes.set_ylabel(f"test {measure.words}{measure.in_units}")
    axes.grid(axis="y")


def _mark(axes: Axes, x: float, text: str, *, to_the_left: bool) -> None:
    """Draws a dashed line at `x` with `text` beside its foot."""
    axes.axvline(x, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.annotate(
        text,
        (x, 0.04),
        xycoords=("data", "axes fraction"),
        xytext=(-6 if to_the_left else 6, 0),
        textcoords="offset points",
        ha="right" if to_the_left else "left",
        color=MUTED,
    )


@styled
def noise_multiplier_figure(
    effective: Float[np.ndarray, " steps"],
    gradient: Float[np.ndarray, " steps"],
    score: Float[np.ndarray, " steps"],
    steps_taken: int,
) -> Figure:
    """Draws the plan's noise multipliers over its steps.

    Args:
        effective: the accounted multiplier of each step.
        gradient: the multiplier of the gradient's noise.
        score: the multiplier of the importance score's noise; infinite without one.
        steps_taken: where the run stands.

    Returns:
        The figure.

    Example:
        >>> z = np.full(10, 1.2)
        >>> figure = noise_multiplier_figure(z, z / 0.99, z / 0.1, 10)
        >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        ['score: 12', 'gradient: 1.212', 'effective: 1.2']
    """
    figure = Figure(figsize=(5.2, 3.4))
    axes = figure.add_subplot()
    changes = np.flatnonzero(np.diff(effective)) + 1
    edges = np.concatenate([[0], changes, [len(effective)]])
    for name, values, look in (
        ("score", score, {"color": GREEN, "linewidth": 1.8}),
        ("gradient", gradient, {"color": ORANGE, "linewidth": 1.6, "linestyle": "--"}),
        ("effective", effective, {"color": BLUE, "linewidth": 4, "alpha": 0.45}),
    ):
        if np.isfinite(values).all():
            label = f"{name}: {_range(values)}"
            axes.stairs(values[edges[:-1]], edges, baseline=None, label=label, **look)
    _scale_multipliers(axes, np.concatenate([effective, gradient, score]))
    if steps_taken < len(effective):
        left = steps_taken > len(effective) / 2
        _mark(axes, float(steps_taken), f"now at {steps_taken:,}", to_the_left=left)
    axes.set_xlim(0, len(effective))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("noise multiplier (noise ÷ clip norm)")
    axes.grid(axis="y")
    axes.legend(loc="best", fontsize=9, labelcolor=INK)
    return figure


def _range(values: np.ndarray) -> str:
    first, last = f"{values[0]:.4g}", f"{values[-1]:.4g}"
    return first if first == last else f"{first} to {last}"


def _scale_multipliers(axes: Axes, values: np.ndarray) -> None:
    drawn = values[np.isfinite(values)]
    low, high = drawn.min(), drawn.max()
    if low > 0 and high / low > 3:
        axes.set_yscale("log")
        ticks = _round_ticks(low / 1.3, high * 1.3)
        axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(low / 1.4, high * 1.6)
    else:
        axes.set_ylim(0, 1.25 * high if high > 0 else 1)


@styled
def layers_figure(history: History, *, stacked: bool = False) -> Figure:
    """Draws importance share and noise of each layer as heat maps over steps.

    Args:
        history: the run.
        stacked: one map below the other, for a narrow screen.

    Returns:
        The figure; its height follows the number of layers.

    Example:
        >>> from dp_ilg.experiments.reports.history import example_history
        >>> float(layers_figure(example_history()).get_figwidth())
        10.9
    """
    height = _map_height(len(history.layer_names))
    rows = 2 if stacked else 1
    size = (4.6, rows * (height + 1.1)) if stacked else (10.9, height + 1.1)
    figure = Figure(figsize=size)
    grid = figure.add_gridspec(2 * rows, 2 // rows, height_ratios=[0.13, height] * rows)
    for panel, draw in enumerate((_draw_shares, _draw_noise)):
        row, column = (2 * panel, 0) if stacked else (0, panel)
        axes = figure.add_subplot(grid[row + 1, column])
        draw(figure.add_subplot(grid[row, column]), axes, history)
        _label_layers(axes, history.layer_names, 22 if stacked else 40)
        axes.tick_params(labelleft=stacked or panel == 0)
    return figure


@styled
def overview_figure(history: History, target_epsilon: float | None) -> Figure:
    """Draws the main figure: both heat maps beside accuracy against epsilon.

    Args:
        history: the run.
        target_epsilon: the epsilon the plan was made for, if it was.

    Returns:
        One wide figure for a README or a slide.

    Example:
        >>> from dp_ilg.experiments.reports.history import example_history
        >>> len(overview_figure(example_history(), 2.0).axes)
        5
    """
    height = max(_map_height(len(history.layer_names)), 2.2)
    figure = Figure(figsize=(12.8, height + 1.1))
    grid = figure.add_gridspec(
        2, 3, height_ratios=[0.13, height], width_ratios=[1, 1, 1.15]
    )
    for column, draw in enumerate((_draw_shares, _draw_noise)):
        axes = figure.add_subplot(grid[1, column])
        draw(figure.add_subplot(grid[0, column]), axes, history)
        _label_layers(axes, history.layer_names, 32)
        axes.tick_params(labelleft=column == 0)
    _draw_accuracy(figure.add_subplot(grid[:, 2]), history, target_epsilon)
    return figure


def _map_height(num_layers: int) -> float:
    return min(num_layers, _MOST_ROWS) * min(0.34, max(0.165, 4.4 / num_layers))


def _draw_shares(bar: Axes, axes: Axes, history: History) -> None:
    title = "Importance share (%)"
    _draw_map(bar, axes, history.steps, 100 * history.shares, ("viridis", title))


def _draw_noise(bar: Axes, axes: Axes, history: History) -> None:
    title = "Noise standard deviation"
    _draw_map(bar, axes, history.steps, history.noise_stddevs, ("plasma", title), True)


def _draw_map(
    bar: Axes,
    axes: Axes,
    steps: Float[np.ndarray, " evaluations"],
    values: Float[np.ndarray, "evaluations layers"],
    look: tuple[str, str],
    log: bool = False,
) -> None:
    """Draws `values` in the colours and title of `look`; zeros stay grey."""
    colours, title = look
    norm, ticks = _colour_scale(values[values > 0], log)
    mesh = axes.pcolormesh(
        np.concatenate([[0.0], steps]),
        np.arange(values.shape[1] + 1) - 0.5,
        np.ma.masked_less_equal(values, 0).T,
        norm=norm,
        cmap=colormaps[colours].with_extremes(bad=MUTED),
        rasterized=True,
    )
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("step")
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", length=0)
    kind = ", log scale" if isinstance(norm, LogNorm) and len(ticks) > 1 else ""
    bar.set_title(title + (kind if ticks else ": none"), fontsize=10, loc="left")
    _draw_colour_bar(bar, mesh, ticks)


def _draw_colour_bar(bar: Axes, mesh: QuadMesh, ticks: Sequence[float]) -> None:
    if not ticks:
        bar.set_axis_off()
        return
    assert bar.figure is not None
    colour_bar = bar.figure.colorbar(
        mesh, cax=bar, orientation="horizontal", ticklocation="top"
    )
    colour_bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    colour_bar.minorticks_off()
    colour_bar.outline.set_visible(False)  # pyright: ignore


def _colour_scale(values: np.ndarray, log: bool) -> tuple[Normalize, Sequence[float]]:
    """Returns how positive `values` become colours, and the ticks of the bar."""
    if values.size == 0:
        return Normalize(0, 1), []
    low, high = float(values.min()), float(values.max())
    if high <= 1.001 * low:
        return LogNorm(low / 1.5, high * 1.5), [low]
    if log or high / low > _LOG_FROM_RATIO:
        return LogNorm(low, high), _round_ticks(low, high)
    ticks = MaxNLocator(5).tick_values(0, high)
    return Normalize(0, high), [float(tick) for tick in ticks if tick <= high]


def _round_ticks(low: float, high: float) -> list[float]:
    """Returns three to six round numbers from `low` to `high`, for a log scale."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 6)]
    spaced = MaxNLocator(4).tick_values(low, high)
    return [float(tick) for tick in spaced if low <= tick <= high] or [low, high]


def _label_layers(axes: Axes, names: Sequence[str], width: int) -> None:
    labels = short_names(names, width)
    size = 9 if len(names) <= 24 else 7.5
    every = math.ceil(len(names) / _MOST_ROWS)
    rows = range(0, len(names), every)
    axes.set_yticks(rows, labels=labels[::every], fontsize=size, color=INK)
