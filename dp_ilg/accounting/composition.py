"""What a run used to cost by strong composition, and what choosing the best run costs.

Strong composition is a yardstick for the accountants of `dp_ilg.accounting`, which
are many times tighter. Repeat-and-select is the price of a hyper-parameter search of
which only the best run is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np

from dp_ilg import validation

if TYPE_CHECKING:
    import dp_accounting

SELECTIONS = {"poisson": math.inf, "geometric": 1.0, "logarithmic": 0.0}
"""Distributions of the number of runs, and dp_accounting's shape of each."""


def strong_composition(
    *, noise_multiplier: float, sampling_prob: float, num_steps: int, delta: float
) -> float:
    """Epsilon of Poisson-sampled Gaussians by the strong composition theorem.

    One unsampled Gaussian is (e, d)-DP by its exact curve; sampling makes that
    (e', q d) with ``e' = ln(1 + q (exp(e) - 1))``; T steps compose to
    ``e' sqrt(2 T ln(1 / d')) + T e' (exp(e') - 1)`` at ``delta = d' + T q d``. The d
    that makes this smallest is used.

    Args:
        noise_multiplier: of a step, relative to the clip norm.
        sampling_prob: the Poisson rate q, in (0, 1).
        num_steps: the number T of steps.
        delta: the delta of the whole.

    Returns:
        Epsilon.

    Raises:
        ValueError: for a number out of range.

    Privacy:
        A valid upper bound for adding or removing one example, for comparison:
        `dp_ilg.accounting.epsilon` of the same steps is far smaller.

    Example:
        >>> facts = dict(noise_multiplier=4.0, sampling_prob=0.01, num_steps=10_000)
        >>> round(strong_composition(**facts, delta=1e-5), 2)
        16.84

    Reference: Dwork, Rothblum and Vadhan 2010, Theorem III.3; Balle, Barthe and
    Gaboardi 2018, Theorem 8 (sampling); Balle and Wang 2018 (the Gaussian's curve).
    """
    import dp_accounting  # slow to import, so only where it is needed

    def step_epsilon(step_delta: float) -> float:
        unsampled = dp_accounting.get_epsilon_gaussian(noise_multiplier, step_delta)
        return math.log1p(sampling_prob * math.expm1(unsampled))

    _check(noise_multiplier, sampling_prob, num_steps, delta)
    return _best_split(step_epsilon, math.expm1, sampling_prob, num_steps, delta)


def claimed_strong_composition(
    *, noise_multiplier: float, sampling_prob: float, num_steps: int, delta: float
) -> float:
    """The number that Abadi et al. compare with: no bound, only what they printed.

    As `strong_composition`, but with the textbook Gaussian
    ``e = sqrt(2 ln(1.25 / d)) / noise_multiplier``, which is proved for e below 1 only,
    sampling to first order, ``e' = q e``, and ``T e'^2`` for the second term. Of the
    forms tried this is the one that gives their 9.34.

    Args:
        noise_multiplier: as in `strong_composition`.
        sampling_prob: as in `strong_composition`.
        num_steps: as in `strong_composition`.
        delta: as in `strong_composition`.

    Returns:
        The number, called epsilon by the paper.

    Raises:
        ValueError: for a number out of range.

    Privacy:
        NO GUARANTEE: ``q e`` is less than what sampling leaves of e, so this is no
        upper bound by strong composition. Moments and PLD accountants show that the
        true epsilon is smaller still.

    Example:
        >>> facts = dict(noise_multiplier=4.0, sampling_prob=0.01, num_steps=10_000)
        >>> round(claimed_strong_composition(**facts, delta=1e-5), 2)
        9.34

    Reference: Abadi et al. 2016, sections 3.1 and 5.1.
    """

    def step_epsilon(step_delta: float) -> float:
        return (
            sampling_prob
            * math.sqrt(2 * math.log(1.25 / step_delta))
            / (noise_multiplier)
        )

    _check(noise_multiplier, sampling_prob, num_steps, delta)
    return _best_split(step_epsilon, float, sampling_prob, num_steps, delta)


def moments_epsilon(
    *, noise_multiplier: float, sampling_prob: float, num_steps: int, delta: float
) -> float:
    """Epsilon by the moments accountant, as Abadi et al. turn moments into it.

    The Renyi divergences of a step are those of `dp_ilg.accounting`'s "rdp"; the last
    step is the paper's: the least ``T D(a) + ln(1 / delta) / (a - 1)`` over whole
    orders a of at most 256. "rdp" turns the same divergences into a smaller epsilon.

    Args:
        noise_multiplier: as in `strong_composition`.
        sampling_prob: as in `strong_composition`.
        num_steps: as in `strong_composition`.
        delta: as in `strong_composition`.

    Returns:
        Epsilon.

    Raises:
        ValueError: for a number out of range.

    Privacy:
        A valid upper bound for adding or removing one example.

    Example:
        >>> facts = dict(noise_multiplier=4.0, sampling_prob=0.01, num_steps=10_000)
        >>> round(moments_epsilon(**facts, delta=1e-5), 2)
        1.26

    Reference: Abadi et al. 2016, Theorem 2; Mironov 2017, Proposition 3.
    """
    from dp_ilg.accounting import renyi

    _check(noise_multiplier, sampling_prob, num_steps, delta)
    orders = tuple(float(a) for a in range(2, 257))
    noise = min(noise_multiplier, 1e100)  # less noise than said, and it can be squared
    total = num_steps * renyi.step_divergences(sampling_prob, noise, orders)
    return float(np.min(total - math.log(delta) / (np.array(orders) - 1)))


def search_event(
    event: dp_accounting.DpEvent, *, expected_runs: float, runs: str = "poisson"
) -> dp_accounting.DpEvent:
    """What a hyper-parameter search releases that shows its best run only.

    Draw the number of runs with `draw_num_runs`, give every run hyper-parameters
    drawn from a fixed list and fresh keys, and show the one that a score ranks first.
    Scores, losers and the number of runs are not shown.

    Args:
        event: what one run releases, score included: ``plan.event()`` if the score
            is computed from public data or the released model alone.
        expected_runs: the expected number of runs, at least 1.
        runs: a key of `SELECTIONS`.

    Returns:
        dp_accounting's repeat-and-select event.

    Raises:
        ValueError: for an unknown distribution or fewer than 1 expected run.

    Example:
        >>> import dp_accounting
        >>> search_event(dp_accounting.GaussianDpEvent(4.0), expected_runs=20).mean
        20.0

    Reference: Papernot and Steinke 2022, Theorems 2 and 6.
    """
    from dp_accounting import dp_event

    mean = _expected(expected_runs, runs)
    return dp_event.RepeatAndSelectDpEvent(event, mean, SELECTIONS[runs])


def search_epsilon(
    event: dp_accounting.DpEvent,
    delta: float,
    *,
    expected_runs: float,
    runs: str = "poisson",
) -> float:
    """Epsilon of a hyper-parameter search that shows its best run only.

    Args:
        event: what one run releases, as in `search_event`.
        delta: the delta of the whole search.
        expected_runs: the expected number of runs, at least 1.
        runs: "poisson" (cheapest for many runs; no run at all happens, and then
            nothing is shown), "geometric" or "logarithmic".

    Returns:
        Epsilon of the whole search, by Renyi divergences.

    Raises:
        ValueError: as `search_event`, and for a delta out of range.

    Privacy:
        For adding or removing one example, if the number of runs is drawn with
        `draw_num_runs` and is not shown, and a run's score is part of `event`. A
        search of a fixed number of runs of which all are shown costs their sum.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(epsilon=1.0, delta=1e-6, num_examples=60_000,
        ...     batch_size=600, num_steps=100)
        >>> one, many = (search_epsilon(plan.event(), 1e-6, expected_runs=k)
        ...              for k in (1, 50))
        >>> plan.epsilon() < one < many < 5
        True

    Reference: Papernot and Steinke 2022.
    """
    from dp_accounting import rdp

    validation.fraction("delta", delta)
    accountant = rdp.RdpAccountant()
    accountant.compose(search_event(event, expected_runs=expected_runs, runs=runs))
    return float(accountant.get_epsilon(delta))


def draw_num_runs(expected_runs: float, *, key: Any, runs: str = "poisson") -> int:
    """Draws how many runs a private search makes; keep the number secret.

    Args:
        expected_runs: the expected number, at least 1.
        key: PRNG key, secret, used for nothing else.
        runs: a key of `SELECTIONS`.

    Returns:
        The number of runs; with "poisson" it may be 0, and then nothing is shown.

    Raises:
        ValueError: for an unknown distribution or fewer than 1 expected run.
        TypeError: for anything that is not one key.

    Example:
        >>> import jax
        >>> draw_num_runs(20, key=jax.random.key(0)) in range(60)
        True
    """
    mean = _expected(expected_runs, runs)
    words = validation.key_words("key", key)
    rng = np.random.Generator(np.random.Philox([*words.ravel().tolist(), 0x5E1EC7]))
    draw: dict[str, Callable[[], Any]] = {
        "poisson": lambda: rng.poisson(mean),
        "geometric": lambda: rng.geometric(1 / mean),
        "logarithmic": lambda: rng.logseries(_logarithmic(mean)) if mean > 1 else 1,
    }
    return int(draw[runs]())


def _logarithmic(mean: float) -> float:
    """The parameter p of the logarithmic distribution with a mean."""
    from scipy import optimize

    def excess(odds: float) -> float:  # odds = p / (1 - p), of any size
        return odds / math.log1p(odds) - mean

    high = 2.0
    while excess(high) < 0:
        high *= 2
    odds: Any = optimize.brentq(excess, 1e-12, high)
    return odds / (1 + odds)


def _best_split(
    step_epsilon: Callable[[float], float],
    second: Callable[[float], float],
    sampling_prob: float,
    num_steps: int,
    delta: float,
) -> float:
    """The least epsilon over how delta is split between steps and composition."""
    from scipy import optimize

    def at(logit: float) -> float:
        share = 1 / (1 + math.exp(-logit))  # of delta, that the steps use up
        one = step_epsilon(delta * share / (num_steps * sampling_prob))
        rest = 2 * num_steps * math.log(1 / (delta * (1 - share)))
        return one * math.sqrt(rest) + num_steps * one * second(one)

    try:
        found: Any = optimize.minimize_scalar(at, bounds=(-30, 30), method="bounded")
    except (ArithmeticError, RuntimeError):  # hardly any noise: no bound in float64
        return math.inf
    return float(found.fun)


def _check(
    noise_multiplier: SupportsFloat,
    sampling_prob: SupportsFloat,
    num_steps: Any,
    delta: SupportsFloat,
) -> None:
    validation.positive("noise_multiplier", noise_multiplier)
    validation.fraction("sampling_prob", sampling_prob)
    validation.whole("num_steps", num_steps)
    validation.fraction("delta", delta)


def _expected(expected_runs: Any, runs: str) -> float:
    if runs not in SELECTIONS:
        raise ValueError(
            f"runs is {runs!r}, but must be one of {', '.join(map(repr, SELECTIONS))}."
        )
    validation.positive("expected_runs", expected_runs)
    if expected_runs < 1:
        raise ValueError(
            f"expected_runs is {expected_runs}, but must be at least 1; a search makes "
            "one run or more on average."
        )
    return float(expected_runs)
