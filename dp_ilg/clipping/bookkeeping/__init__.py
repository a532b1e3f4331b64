"""The fast engine: exact clipped sums without per-example gradients.

Floor 2, inside `clipping`: imports `geometry` and below.
Enter by `bookkeeping_engine`, `explain` and `prepare`; `engine` says how it works.
"""

from dp_ilg.clipping.bookkeeping.engine import bookkeeping_engine
from dp_ilg.clipping.bookkeeping.explain import explain, prepare

__all__ = ["bookkeeping_engine", "explain", "prepare"]
