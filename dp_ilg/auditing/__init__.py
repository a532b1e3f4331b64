"""Lower bounds on epsilon from scores of runs with and without a canary.

Floor 1: imports `base` and `validation` only.
Enter by `epsilon_lower_bound` (any scores) and `gaussian_lower_bound` (normal ones).
"""

from dp_ilg.auditing.bounds import (
    EpsilonLowerBound,
    epsilon_lower_bound,
    gaussian_lower_bound,
)

__all__ = ["EpsilonLowerBound", "epsilon_lower_bound", "gaussian_lower_bound"]
