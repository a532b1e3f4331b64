"""The table of engines: each turns a loss and a batch into `PerExampleGrads`."""

from __future__ import annotations

from dp_ilg.bookkeeping import bookkeeping_engine
from dp_ilg.per_example import vmap_engine

ENGINES = {"bookkeeping": bookkeeping_engine, "vmap": vmap_engine}
