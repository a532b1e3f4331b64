"""A run as a sum of independent losses: its moments, and what one order says.

A run falls into kinds of steps, each with its tilted loss (`moments`), and unsampled
Gaussians, which are one normal loss together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from dp_ilg.accounting.certified import moments
from dp_ilg.accounting.kinds import Kind

CUT = 1e-5  # of delta, that all ends of all steps may cost
_LEAST_TILT, _MOST_TILT = 1e-6, 1e12
_Counted = tuple[moments.TiltedLoss, int]


class Run(NamedTuple):
    """The steps of one run as one side of the neighbouring relation sees them.

    Attributes:
        parts: of each kind of steps, as `moments.tilted_loss` takes them.
        counts: of each kind.
        normal: squared distance of all unsampled Gaussians together.
        sensitivity: as in `moments.Order`.
        removed: as in `moments.Order`.
        log_cut: log of P's mass that each end of each step may lose.

    Example:
        >>> run = Run.of([Kind(0.1, 2.0, (), 10)], 1, True, 0).cut(math.log(1e-5), 1.0)
        >>> round(run.log_moment(1.0), 3)
        0.028
    """

    parts: tuple[tuple[moments.Part, ...], ...]
    counts: tuple[int, ...]
    normal: float
    sensitivity: int
    removed: bool
    log_cut: float = -math.inf

    @classmethod
    def of(
        cls, kinds: Sequence[Kind], sensitivity: int, removed: bool, law: int
    ) -> Run:
        """The run of some kinds; `law` picks the one of `truncation.cut_laws`."""
        sampled, counts, normal = [], [], 0.0
        for kind in kinds:
            q, z = kind.sampling_prob, kind.noise_multiplier
            if q == 1 and not kind.truncated:
                normal += kind.count * (sensitivity / z) ** 2
                continue
            parts = [(1.0, q, z)]
            if kind.truncated:
                cut, rate = kind.truncated[law]
                parts = [(1 - cut, q, z), (cut, rate, 0.5 * z)]
            sampled.append(tuple(part for part in parts if part[0] > 0))
            counts.append(kind.count)
        return cls(tuple(sampled), tuple(counts), normal, sensitivity, removed)

    def losses(self, tilt: float, frequency: float = 0.0) -> list[_Counted] | None:
        """The tilted loss of every kind with its count, None if one cannot be had."""
        found = []
        order = moments.Order(self.sensitivity, self.removed, tilt, frequency)
        for parts, count in zip(self.parts, self.counts, strict=True):
            loss = moments.tilted_loss(parts, order, self.log_cut)
            if loss is None:
                return None
            found.append((loss, count))
        return found

    def cut(self, log_delta: float, share: float) -> Run:
        """The run whose steps together lose a share of `CUT` of delta at the ends."""
        ends = 3.0 * max(1, sum(self.counts)) / (share * CUT)
        return self._replace(log_cut=log_delta - math.log(ends))

    def log_moment(self, tilt: float) -> float:
        """Log of E[exp(tilt L)], infinite where it cannot be had."""
        losses = self.losses(tilt)
        if losses is None:
            return math.inf
        sampled = sum(count * loss.log_moment for loss, count in losses)
        return sampled + 0.5 * self.normal * tilt * (1 + tilt)


def bound_at(run: Run, log_delta: float, tilt: float) -> float:
    """An upper bound on epsilon from a single real order, 1 + tilt.

    Args:
        run: with its ends cut for this delta.
        log_delta: log of delta.
        tilt: the order less 1, above 0.

    Returns:
        The bound; beyond all use where the moment cannot be had.

    Example:
        >>> run = Run.of([Kind(0.01, 1.0, (), 1000)], 1, True, 0)
        >>> round(bound_at(run.cut(math.log(1e-5), 1.0), math.log(1e-5), 6.0), 1)
        2.2

    Reference:
        Canonne, Kamath and Steinke 2020, Proposition 12.
    """
    moment = run.log_moment(tilt)
    if math.isinf(moment):  # beyond reach: look at smaller ones
        return 1e250 * tilt
    found = (moment + gain(tilt) - log_delta - math.log1p(-CUT)) / tilt
    return max(0.0, found + 1e-9 * abs(found) + 1e-13 * sum(run.counts) / tilt)


def best_bound(run: Run, log_delta: float) -> tuple[float, float]:
    """The best of these bounds, and its tilt.

    Args:
        run: as in `bound_at`.
        log_delta: as in `bound_at`.

    Returns:
        The bound on epsilon and the tilt.

    Example:
        >>> run = Run.of([Kind(0.01, 1.0, (), 1000)], 1, True, 0)
        >>> bound, tilt = best_bound(run.cut(math.log(1e-5), 1.0), math.log(1e-5))
        >>> bound <= bound_at(run.cut(math.log(1e-5), 1.0), math.log(1e-5), 6.0)
        True
    """
    from scipy import optimize

    def at(log_tilt: float) -> float:
        return bound_at(run, log_delta, math.exp(log_tilt))

    bounds = (math.log(_LEAST_TILT), math.log(_MOST_TILT))
    best: Any = optimize.minimize_scalar(
        at, bounds=bounds, method="bounded", options={"xatol": 0.01}
    )
    return float(best.fun), math.exp(best.x)


def gain(tilt: float) -> float:
    """Log of the largest (1 - exp(-x)) exp(-tilt x), which is at x = log(1 + 1 / tilt).

    Args:
        tilt: above 0.

    Returns:
        The log, below 0.

    Example:
        >>> round(math.exp(gain(1.0)), 12)
        0.25
    """
    return -tilt * math.log1p(1 / tilt) - math.log1p(tilt)
