"""Lower bounds: on epsilon from scores with and without a canary, on delta from losses.

Floor 1: imports `base` and `validation` only.
Enter by `epsilon_lower_bound` (any scores), `gaussian_lower_bound` (normal ones) and
`delta_lower_bound` (what an accountant's claim is checked with).
"""

from dp_ilg.auditing.bounds import (
    EpsilonLowerBound,
    epsilon_lower_bound,
    gaussian_lower_bound,
)
from dp_ilg.auditing.losses import delta_lower_bound

__all__ = [
    "EpsilonLowerBound",
    "delta_lower_bound",
    "epsilon_lower_bound",
    "gaussian_lower_bound",
]
