"""Poisson batches cut to a largest size, and what that costs.

A draw of more than `b` examples loses some of them, chosen uniformly at random, so that
one compiled size always suffices. A cut draw couples the examples: who enters pushes
another one out. The cost is small if cuts are rare, and is charged in full.

The proof. Take one example x apart and let M be the number drawn among the n others. M
has one law whether x is in the data or not, so whether M < b may be told. If M < b,
nobody is cut on account of x: the step is a Poisson-sampled Gaussian of rate q and
multiplier z. If M >= b, then without x what is kept is a uniformly random set of b of
the n others, whatever M is. With x it is such a set too, or, with some probability r,
x and a uniformly random set of b - 1 others: x is drawn with probability q, and of the
M + 1 that are drawn then b are kept. Draw the set of b - 1 and one other, y, first:
given them the sum is that of the set plus that of y, or, with probability r, of x. So
the step is a mixture over such draws, of one law on both sides, of Gaussians that are
sampled at rate r and move by x - y, of length at most 2 C: by joint convexity of every
hockey-stick divergence it is no easier to tell apart than one of rate r and multiplier
z / 2. Where x is replaced by x', x - y and x' - y are both at most 2 C long: the pair
of the other relation at rate r and multiplier z / 2. Now

    r = sum_{m >= b} P(M = m) q b / (m + 1) / P(M >= b)
      = (b / (n + 1)) P(B > b) / P(M >= b),    B ~ Binomial(n + 1, q),

since q P(M = m) / (m + 1) = P(B = m + 1) / (n + 1). There are N - 1 others where x is
one of the N examples (removed or replaced), and N where it is added to them: both are
accounted, and the larger epsilon counts.

dp_accounting (arXiv 2508.15089) has the same rate, and takes the pair of a replaced
example for every relation; for an example added or removed ours is the smaller one.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import dp_accounting

_ROUNDING = 1e-11  # of binomial tails, relative; charged


def cut_laws(
    num_examples: int, sampling_prob: float, largest: int
) -> tuple[tuple[float, float], ...]:
    """How likely one more example meets a full draw, and how likely it then gets in.

    Args:
        num_examples: N, the number of examples in the data.
        sampling_prob: q, in (0, 1].
        largest: the size b above which a draw is cut, at least 1.

    Returns:
        Pairs (P(M >= b), r) of this module, for N - 1 others and for N; empty where
        that never happens.

    Privacy:
        What a step of truncated Poisson sampling is charged with, see this module.

    Example:
        >>> [(round(cut, 4), round(rate, 4)) for cut, rate in cut_laws(1000, 0.1, 120)]
        [(0.0214, 0.0966), (0.022, 0.0966)]
        >>> cut_laws(1000, 0.1, 1001)
        ()

    Reference:
        arXiv 2508.15089.
    """
    from scipy import stats  # slow to import, so only where it is needed

    found = []
    for others in (num_examples - 1, num_examples):
        cut = float(stats.binom.sf(largest - 1, others, sampling_prob))
        kept = float(stats.binom.sf(largest, others + 1, sampling_prob))
        rate = kept / cut * largest / (others + 1) * (1 + _ROUNDING) if cut else 0.0
        found.append((min(cut * (1 + _ROUNDING), 1.0), min(rate, sampling_prob)))
    return tuple(found) if found[-1][0] else ()


@functools.lru_cache(maxsize=64)
def mean_drawn(num_examples: int, sampling_prob: float, largest: int) -> float:
    """How many examples a draw that is cut has on average.

    Args:
        num_examples: N, the number of examples in the data.
        sampling_prob: q, the Poisson rate before cutting.
        largest: the size above which a draw is cut.

    Returns:
        ``E[min(n, largest)]``, n binomial.

    Example:
        >>> round(mean_drawn(1000, 0.1, 100), 2), round(mean_drawn(1000, 0.1, 500), 2)
        (96.22, 100.0)
    """
    from scipy import stats

    sizes = range(min(largest, num_examples))
    return float(stats.binom.sf(sizes, num_examples, sampling_prob).sum())


def truncated_event(
    num_examples: int, sampling_prob: float, largest: int, noise_multiplier: float
) -> dp_accounting.DpEvent:
    """The event of one step whose draw is cut to `largest` examples.

    Args:
        num_examples: N, the number of examples in the data.
        sampling_prob: q, the Poisson rate before cutting.
        largest: the size above which a draw is cut.
        noise_multiplier: z, relative to the norm bound of ONE example.

    Returns:
        An event of dp_accounting that holds these numbers.

    Example:
        >>> truncated_event(1000, 0.1, 150, 2.0).truncated_batch_size
        150
    """
    import dp_accounting

    kind: Any = dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent
    return kind(num_examples, sampling_prob, largest, noise_multiplier)
