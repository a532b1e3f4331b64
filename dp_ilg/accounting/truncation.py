"""Poisson batches cut to a largest size, and what that costs.

A draw of more than `b` examples loses some of them, chosen uniformly at random, so that
one compiled size always suffices. A cut draw couples the examples: who enters pushes
another one out. The cost is small if cuts are rare, and is charged in full.

The proof. Take one example apart and let M be the number drawn among all others. M has
one law whether that example is in the data or not, so it may be told. If M < b, nobody
is cut on its account: the step is a Poisson-sampled Gaussian of rate q and multiplier
z. If M >= b, then, for every set of b that would be kept without it, the example takes
the place of a random one of them with a probability of at most q. The sum moves by at
most 2 C instead of C: the step is a Poisson-sampled Gaussian of rate at most q and
multiplier z / 2, for neighbours that differ by an example added, removed or replaced.
The step is a mixture of the two with public weights, P(M < b) and P(M >= b); more of
the second is easier to tell apart, so that a bound on P(M >= b) will do. It is taken
for as many others as there are examples: the neighbour may have one more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import dp_accounting


def cut_probability(num_examples: int, sampling_prob: float, largest: int) -> float:
    """A bound on the probability that one more example would be cut, or cut another.

    Args:
        num_examples: N, the number of examples in the data.
        sampling_prob: q, in (0, 1].
        largest: the size b above which a draw is cut, at least 1.

    Returns:
        P(M >= b) for M ~ Binomial(N, q): above what it is among N - 1 others, and what
        it is for a data set of one example more.

    Privacy:
        What a step of truncated Poisson sampling is charged with, see this module.

    Example:
        >>> round(cut_probability(1000, 0.1, 120), 4)
        0.022
        >>> cut_probability(1000, 0.1, 1001)
        0.0

    Reference:
        The event is that of arXiv 2508.15089, which dp_accounting implements; its rates
        are conditional ones, q is above them.
    """
    from scipy import stats  # slow to import, so only where it is needed

    return float(stats.binom.sf(largest - 1, num_examples, sampling_prob))


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
