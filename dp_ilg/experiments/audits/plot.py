"""The figure of an audit: every lower bound on epsilon beside the claim."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dp_ilg.experiments.reports.svg import BLUE, INK, MUTED, ORANGE, printable, styled


@styled
def bounds_figure(rows: Sequence[Mapping[str, Any]], claim: float) -> Figure:
    """Draws lower bounds as bars and the claim as a line.

    Args:
        rows: of `dp_ilg.experiments.audits.report.audit_trainer`.
        claim: the claimed epsilon.

    Returns:
        The figure.

    Example:
        >>> row = {"canary": "c", "adversary": "a", "lower_bound": 1.0,
        ...     "if_gaussian": None}
        >>> len(bounds_figure([row], 2.0).axes)
        1
    """
    figure = Figure(figsize=(7.2, 1.2 + 0.34 * len(rows)))
    axes, places = figure.add_subplot(), np.arange(len(rows))[::-1]
    labels = [printable(f"{row['canary']}: {row['adversary']}") for row in rows]
    bounds = [row["lower_bound"] for row in rows]
    axes.barh(places, bounds, 0.55, color=BLUE, label="95 % lower bound")
    known = [
        (row["if_gaussian"], place) for row, place in zip(rows, places, strict=True)
    ]
    points = [(x, place) for x, place in known if x is not None]
    if points:
        axes.plot(*zip(*points, strict=True), "o", color=MUTED, label="if Gaussian")
    axes.axvline(claim, color=ORANGE, linewidth=1.8, label=f"claim: ε = {claim:.3g}")
    axes.set_yticks(places, labels, color=INK)
    axes.set_xlim(0, 1.08 * max([claim, *bounds, *(x for x, _ in points)]))
    axes.set_xlabel("lower bound on ε")
    axes.grid(axis="x")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
