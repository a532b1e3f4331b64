"""The table of engines: each turns a loss and a batch into `PerExampleGrads`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from dp_ilg.base import Example, LossFn, Params, PerExampleGrads
from dp_ilg.bookkeeping import bookkeeping_engine, explain, prepare
from dp_ilg.explanation import Explanation, LeafPlan
from dp_ilg.groups import Groups
from dp_ilg.per_example import vmap_engine

Run = Callable[[Params, Example], PerExampleGrads]


class Engine(NamedTuple):
    """What `dp_ilg.clipped_grad` asks of an engine.

    Attributes:
        per_example: ``(loss_fn, params, batch, groups) -> PerExampleGrads``.
        prepare: the same arguments, to the micro-batch it picks (None: all) and the
            engine as a function of parameters and micro-batch.
        explain: the same arguments and a micro-batch size, to an `Explanation`.
        unrolled: up to how many micro-batches are written out one after the other.
            JAX's own derivatives of convolutions are several times slower inside a
            loop on a CPU.
    """

    per_example: Callable[[LossFn, Params, Example, Groups], PerExampleGrads]
    prepare: Callable[[LossFn, Params, Example, Groups], tuple[int | None, Run]]
    explain: Callable[[LossFn, Params, Example, Groups, int], Explanation]
    unrolled: int

    def __call__(
        self, loss_fn: LossFn, params: Params, batch: Example, groups: Groups
    ) -> PerExampleGrads:
        """Norms and weighted sums of a whole batch at once."""
        return self.per_example(loss_fn, params, batch, groups)


def _prepare_vmap(
    loss_fn: LossFn, params: Params, batch: Example, groups: Groups
) -> tuple[None, Run]:
    return None, lambda params, batch: vmap_engine(loss_fn, params, batch, groups)


def _explain_vmap(
    loss_fn: LossFn, params: Params, batch: Example, groups: Groups, held: int
) -> Explanation:
    why = "the vmap engine forms every example's gradient"
    rows = []
    for leaf, value in zip(groups.leaves, jax.tree.leaves(params), strict=True):
        cost = held * value.size * value.dtype.itemsize
        path = "per-example gradient"
        rows.append(LeafPlan(leaf.path, path, why, 4 * value.size, cost, ""))
    return Explanation(rows)


ENGINES = {
    "bookkeeping": Engine(bookkeeping_engine, prepare, explain, 1),
    "vmap": Engine(vmap_engine, _prepare_vmap, _explain_vmap, 16),
}
