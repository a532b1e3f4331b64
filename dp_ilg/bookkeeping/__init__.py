"""The fast engine: see `dp_ilg.bookkeeping.engine`."""

from dp_ilg.bookkeeping.engine import bookkeeping_engine
from dp_ilg.bookkeeping.explain import explain, prepare

__all__ = ["bookkeeping_engine", "explain", "prepare"]
