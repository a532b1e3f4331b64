"""The fast engine: see `dp_ilg.bookkeeping.engine`."""

from dp_ilg.bookkeeping.engine import bookkeeping_engine

__all__ = ["bookkeeping_engine"]
