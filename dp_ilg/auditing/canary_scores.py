"""What scores of canaries say: of one run with many, or of many runs with one.

Ours bounds epsilon from many runs (`epsilon_lower_bound`). The bound from one run and
the rates at a false positive rate are jax-privacy's, which this only calls. The area
under the curve is by ranks: jax-privacy's is of the curve's hull, never below 1/2, and
its interval leaves 1/2 out where scores say nothing.
"""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import numpy as np

from dp_ilg import validation
from dp_ilg.auditing.bounds import epsilon_lower_bound


@dataclass(frozen=True)
class CanaryReport:
    """Everything that two sets of scores say.

    Attributes:
        auroc: the chance that a canary inside scores above one outside.
        auroc_interval: its bootstrap interval at `confidence`.
        tpr_at_fpr: pairs of a false positive rate, and the largest share of canaries
            inside that a threshold, or a mix of two, recognises at it. They are chosen
            on the same scores, so it is a little too high.
        tpr_intervals: a bootstrap interval for each.
        epsilon: the lower bound if each score comes from a run of its own
            (`epsilon_lower_bound`, on half of them the threshold).
        epsilon_one_run: the lower bound if all canaries were in one run, each by a fair
            coin of its own.
        confidence: of bounds and intervals.
        delta: for which both bounds hold.

    Privacy: scores come from canaries, which are made up; but in a run on private data
    what it released shows through them, so look at them only where that is audited.
    """

    auroc: float
    auroc_interval: tuple[float, float]
    tpr_at_fpr: tuple[tuple[float, float], ...]
    tpr_intervals: tuple[tuple[float, float], ...]
    epsilon: float
    epsilon_one_run: float
    confidence: float
    delta: float


def canary_report(
    inside: Any,
    outside: Any,
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
    false_positive_rates: tuple[float, ...] = (0.01, 0.1),
    bootstrap: int = 1000,
    seed: int = 0,
) -> CanaryReport:
    """Bounds, curve and intervals of canary scores.

    Args:
        inside: scores of canaries that were in the data, ``[canaries]``.
        outside: of those that were not.
        delta: the delta of the claim that is audited, in (0, 1).
        confidence: in (0, 1).
        false_positive_rates: each in (0, 1).
        bootstrap: resamples.
        seed: of the resampling.

    Returns:
        A `CanaryReport`.

    Raises:
        ImportError: without jax-privacy (``pip install jax-privacy``).
        ValueError: for scores that are no finite numbers, fewer than 4 of a kind, or a
            number out of its range.

    Privacy: bounds from below; a bound under the claim proves nothing. The one-run
    bound needs canaries whose coins were independent and fair.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> report = canary_report(rng.normal(3, 1, 200), rng.normal(0, 1, 200))
        >>> report.auroc > 0.95, report.epsilon > 1, report.epsilon_one_run > 1
        (True, True, True)

    Reference: Steinke, Nasr and Jagielski 2023 (one run); Carlini et al. 2022 (the rate
    at a low false positive rate).
    """
    validation.fraction("confidence", confidence)
    validation.fraction("delta", delta)
    validation.whole("bootstrap", bootstrap)
    for rate in false_positive_rates:
        validation.fraction("a false positive rate", rate)
    from scipy import stats

    first, second = _scores("inside", inside), _scores("outside", outside)
    theirs = _auditing()
    auditor = theirs.CanaryScoreAuditor(first, second)
    ends = (1 - confidence) / 2, (1 + confidence) / 2
    again = theirs.BootstrapParams(num_samples=bootstrap, quantiles=ends, seed=seed)
    rates = np.asarray(false_positive_rates, np.float64)
    shares = np.atleast_1d(auditor.tpr_at_given_fpr(rates))
    spans = [auditor.tpr_at_given_fpr(r, bootstrap_params=again) for r in rates]
    area = stats.bootstrap(
        (first, second),
        _area,
        n_resamples=bootstrap,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    significance = 1 - confidence
    return CanaryReport(
        auroc=float(_area(first, second)),
        auroc_interval=_pair(area),
        tpr_at_fpr=tuple(
            (float(r), float(s)) for r, s in zip(rates, shares, strict=True)
        ),
        tpr_intervals=tuple(_pair(span) for span in spans),
        epsilon=epsilon_lower_bound(
            first, second, delta=delta, significance=significance
        ).epsilon,
        epsilon_one_run=float(auditor.epsilon_one_run(significance, delta)),
        confidence=confidence,
        delta=delta,
    )


def _area(inside: np.ndarray, outside: np.ndarray, axis: int = -1) -> Any:
    """The chance that one inside scores above one outside; a tie counts half."""
    from scipy import stats

    both = np.concatenate([inside, outside], axis=axis)
    ranks = np.take(
        stats.rankdata(both, axis=axis), np.arange(inside.shape[axis]), axis
    )
    count, others = inside.shape[axis], outside.shape[axis]
    return (ranks.sum(axis) / count - (count + 1) / 2) / others


def _pair(ends: Any) -> tuple[float, float]:
    low, high = np.ravel(ends)
    return float(low), float(high)


def _scores(name: str, values: Any) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or len(found) < 4 or not np.isfinite(found).all():
        raise ValueError(
            f"{name} has the shape {found.shape}, but must hold at least 4 finite "
            "scores in one axis; leave out runs without a score."
        )
    return found


def _auditing() -> Any:
    if importlib.util.find_spec("jax_privacy") is None:
        raise ImportError(
            "canary_report calls jax-privacy, which is not installed; run "
            "pip install jax-privacy, or use epsilon_lower_bound, which needs none."
        )
    return importlib.import_module("jax_privacy.auditing")
