"""Lower bounds on epsilon from scores of runs with and without a canary.

If a mechanism is (epsilon, delta)-DP, no test tells two neighbouring data sets apart
better than ``TPR <= e^epsilon FPR + delta``. A test that does better refutes the claim,
with a confidence that comes from exact binomial (Clopper-Pearson) bounds on both rates.
A bound below a claim proves nothing: another test might do better.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from dp_ilg import validation


@dataclass(frozen=True)
class EpsilonLowerBound:
    """What a test on canary scores says about epsilon.

    Attributes:
        epsilon: with probability `confidence` the true epsilon is at least this; 0 if
            the test tells nothing.
        confidence: one minus the significance asked for.
        threshold: where the test cuts.
        higher_is_in: whether scores above the threshold are taken for "canary in".
        true_positives: runs with the canary that the test recognised.
        false_positives: runs without it that the test took for runs with it.
        in_trials: runs with the canary that were tested.
        out_trials: runs without it that were tested.

    Example:
        >>> found = epsilon_lower_bound([5.0] * 20, [1.0] * 20)
        >>> found.true_positive_rate, found.false_positive_rate
        (1.0, 0.0)
    """

    epsilon: float
    confidence: float
    threshold: float
    higher_is_in: bool
    true_positives: int
    false_positives: int
    in_trials: int
    out_trials: int

    @property
    def true_positive_rate(self) -> float:
        """Share of runs with the canary that the test recognised."""
        return self.true_positives / self.in_trials

    @property
    def false_positive_rate(self) -> float:
        """Share of runs without the canary that the test took for runs with it."""
        return self.false_positives / self.out_trials


def epsilon_lower_bound(
    in_scores: Any,
    out_scores: Any,
    *,
    delta: float = 0.0,
    significance: float = 0.05,
    choosing_fraction: float = 0.5,
    threshold: float | None = None,
) -> EpsilonLowerBound:
    """Bounds epsilon from below by a threshold test on canary scores.

    Threshold and direction are chosen on the first part of the trials and tested on
    the rest, so that no correction for the choice is needed. With `threshold` given,
    chosen beforehand, all trials are tested and a higher score means "in". The
    significance is halved between the two rates.

    Args:
        in_scores: a score of each independent run with the canary, ``[trials]``.
        out_scores: the same without it.
        delta: of the claim that is tested.
        significance: the probability with which the bound may be too high.
        choosing_fraction: the part of the trials on which the threshold is chosen.
        threshold: a threshold that does not depend on these scores, or None.

    Returns:
        The bound and the test.

    Raises:
        ValueError: for scores that are not finite or too few, or a number out of range.

    Privacy: scores come from data the auditor knows; the result is about the mechanism.
        It holds for the neighbouring relation of the two data sets, and only if the
        runs are independent.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> found = epsilon_lower_bound(rng.normal(2, 1, 1000), rng.normal(0, 1, 1000))
        >>> 1 < found.epsilon < 4
        True

    Reference: Jagielski, Ullman, Oprea 2020, "Auditing differentially private machine
    learning"; Nasr et al. 2021 (both directions).
    """
    inside, outside = _scores("in_scores", in_scores), _scores("out_scores", out_scores)
    validation.fraction("delta", delta, include_zero=True)
    validation.fraction("significance", significance)
    validation.fraction("choosing_fraction", choosing_fraction)
    higher_is_in = True
    if threshold is None:
        first, inside = _cut("in_scores", inside, choosing_fraction)
        second, outside = _cut("out_scores", outside, choosing_fraction)
        threshold, higher_is_in = _best_test(first, second, delta, significance)
    sign = 1 if higher_is_in else -1
    hits = int(np.sum(sign * inside > sign * threshold))
    false = int(np.sum(sign * outside > sign * threshold))
    counts = np.array([hits]), np.array([false])
    bound = _bounds(*counts, len(inside), len(outside), delta, significance)
    return EpsilonLowerBound(
        epsilon=float(bound[0]),
        confidence=1 - significance,
        threshold=float(threshold),
        higher_is_in=higher_is_in,
        true_positives=hits,
        false_positives=false,
        in_trials=len(inside),
        out_trials=len(outside),
    )


def gaussian_lower_bound(
    in_scores: Any, out_scores: Any, *, delta: float, significance: float = 0.05
) -> float:
    """Bounds epsilon from below if both kinds of scores are normal, equally spread.

    Then the trade-off between the error rates is that of a Gaussian mechanism, whose
    mu is the distance of the means in standard deviations, and every score counts, not
    only those beyond a threshold. Far sharper than `epsilon_lower_bound`, and only as
    good as the assumption: an estimate of what the attack could show with many runs.

    Args:
        in_scores: a score of each independent run with the canary, ``[trials]``.
        out_scores: the same without it.
        delta: of the claim that is tested.
        significance: the probability with which the bound may be too high, for many
            trials and normal scores.

    Returns:
        The bound; 0 where the means do not differ enough.

    Raises:
        ValueError: for scores that are not finite or too few, or a number out of range.

    Privacy: as `epsilon_lower_bound`, and under its assumption only.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> inside, outside = rng.normal(1, 1, 2000), rng.normal(0, 1, 2000)
        >>> 3.5 < gaussian_lower_bound(inside, outside, delta=1e-5) < 4.4  # truth: 4.38
        True

    Reference: Dong, Roth and Su 2019, "Gaussian differential privacy", Corollary 2.13.
    """
    import dp_accounting  # slow to import
    from scipy import stats

    inside, outside = _scores("in_scores", in_scores), _scores("out_scores", out_scores)
    validation.fraction("delta", delta)
    validation.fraction("significance", significance)
    sizes = len(inside), len(outside)
    if min(sizes) < 2:
        raise ValueError(f"There are {sizes} scores, but each kind needs at least two.")
    spread = math.sqrt((np.var(inside, ddof=1) + np.var(outside, ddof=1)) / 2)
    if spread == 0:
        return 0.0
    mu = abs(float(np.mean(inside) - np.mean(outside))) / spread
    error = math.sqrt(1 / sizes[0] + 1 / sizes[1] + mu**2 / 2 / sum(sizes))
    least = mu - float(stats.norm.isf(significance / 2)) * error
    return (
        float(dp_accounting.get_epsilon_gaussian(1 / least, delta))
        if least > 0
        else 0.0
    )


def _bounds(
    true_positives: np.ndarray,
    false_positives: np.ndarray,
    in_trials: int,
    out_trials: int,
    delta: float,
    significance: float,
) -> np.ndarray:
    """Lower bounds on epsilon for many tests; each holds on its own."""
    missed = _upper(in_trials - true_positives, in_trials, significance / 2)
    false = _upper(false_positives, out_trials, significance / 2)
    # both inequalities of the definition hold whenever both rates are bounded
    with np.errstate(divide="ignore"):
        positive = np.log(np.maximum(1 - missed - delta, 0)) - np.log(false)
        negative = np.log(np.maximum(1 - false - delta, 0)) - np.log(missed)
    return np.maximum(np.maximum(positive, negative), 0.0)


def _upper(successes: np.ndarray, trials: int, significance: float) -> np.ndarray:
    """Clopper-Pearson's one-sided upper bound on a probability."""
    from scipy import stats

    rest = np.maximum(trials - successes, 1)
    bound = stats.beta.ppf(1 - significance, successes + 1, rest)
    return np.where(successes == trials, 1.0, bound)


def _best_test(
    inside: np.ndarray, outside: np.ndarray, delta: float, significance: float
) -> tuple[float, bool]:
    """The threshold and the direction that bound epsilon best on these scores."""
    values = np.unique(np.concatenate([inside, outside]))
    middles = (values[1:] + values[:-1]) / 2 if len(values) > 1 else values
    sizes = len(inside), len(outside)
    found = []
    for sign in (1, -1):
        hits = _above(sign * inside, sign * middles)
        false = _above(sign * outside, sign * middles)
        bounds = _bounds(hits, false, *sizes, delta, significance)
        best = int(np.argmax(bounds))
        found.append((bounds[best], float(middles[best]), sign == 1))
    _, threshold, higher_is_in = max(found, key=lambda test: test[0])
    return threshold, higher_is_in


def _above(scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """How many scores lie above each threshold."""
    below = np.searchsorted(np.sort(scores), thresholds, side="right")
    return len(scores) - below


def _scores(name: str, values: Any) -> np.ndarray:
    try:
        scores = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        words = validation.shown(values)
        raise ValueError(f"{name} are {words}, but must be numbers.") from None
    if scores.ndim != 1 or not scores.size:
        raise ValueError(
            f"{name} has shape {scores.shape}, but must be one score for each run."
        )
    if not np.isfinite(scores).all():
        raise ValueError(
            f"{name} has {int(np.sum(~np.isfinite(scores)))} scores that are not "
            "finite; give a run without a score the worst one."
        )
    return scores


def _cut(
    name: str, scores: np.ndarray, fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    first = math.ceil(len(scores) * fraction)
    if first >= len(scores):
        raise ValueError(
            f"{name} has {len(scores)} scores, too few to choose a threshold on some "
            "and test it on the others; make more runs."
        )
    return scores[:first], scores[first:]
