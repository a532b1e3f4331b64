"""What a check of a trainer finds, and how sure it must be."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        found: what was measured, in words.
        limit: what was asked for.
        holds: whether the promise stands.

    Example:
        >>> Finding("ratio 1.2", "at most 1", False).holds
        False
    """

    found: str
    limit: str
    holds: bool


def normal_limit(level: float, tests: int) -> float:
    """How many standard deviations are too many, for several two-sided tests.

    Args:
        level: the probability that any of them fails by chance.
        tests: how many (Bonferroni).

    Returns:
        The limit.

    Example:
        >>> round(normal_limit(0.05, 1), 2), round(normal_limit(0.05, 10), 2)
        (1.96, 2.81)
    """
    from scipy import stats

    return float(stats.norm.isf(level / tests / 2))
