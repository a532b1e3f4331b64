"""The figure of metrics that a run released: each with the band of its error."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dp_ilg.experiments.reports.history import History
from dp_ilg.experiments.reports.svg import BLUE, MUTED, styled

DEVIATIONS = 1.96
"""Standard errors on either side: 95 % of a normal law."""


@styled
def released_figure(history: History) -> Figure:
    """Draws the running averages of released metrics over steps, with their bands.

    Args:
        history: the run; its metrics were released with noise.

    Returns:
        The figure: one panel a metric. Test accuracy is drawn beside the training
        accuracy.

    Example:
        >>> from dp_ilg.experiments.reports.history import example_history
        >>> figure = released_figure(example_history())
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['train accuracy', 'train loss']
    """
    names = list(history.released)
    figure = Figure(figsize=(5.2 * len(names), 3.4))
    for place, name in enumerate(names, 1):
        _draw(figure.add_subplot(1, len(names), place), history, name)
    return figure


def _draw(axes: Axes, history: History, name: str) -> None:
    _, smoothed, _, stderr = history.released[name].T
    band = DEVIATIONS * stderr
    axes.fill_between(
        history.steps, smoothed - band, smoothed + band, color=BLUE, alpha=0.2, lw=0
    )
    axes.plot(history.steps, smoothed, color=BLUE, linewidth=1.8, label="released")
    if name == f"train_{history.measure.name}":
        look: Any = dict(color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        label = f"test {history.measure.words}"
        axes.plot(history.steps, history.answers, label=label, **look)
        axes.legend(frameon=False)
    axes.set_xlim(0, 1.04 * float(np.max(history.steps)))
    axes.set_xlabel("step")
    axes.set_ylabel(name.replace("_", " "))
    axes.grid(axis="y")
