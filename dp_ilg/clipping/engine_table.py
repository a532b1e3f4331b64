"""The table of engines: each turns a loss and a batch into `PerExampleGrads`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dp_ilg.base import Example, LossFn, Params, PerExampleGrads
from dp_ilg.clipping.bookkeeping import bookkeeping_engine, explain, prepare
from dp_ilg.clipping.leaf_paths import Explanation, LeafPlan
from dp_ilg.clipping.per_example import exact_engine, vmap_engine
from dp_ilg.geometry.groups import Groups

Run = Callable[[Params, Example], PerExampleGrads]


class Engine(NamedTuple):
    """What `dp_ilg.clipped_grad` asks of an engine.

    Attributes:
        per_example: ``(loss_fn, params, batch, groups, coordinates) ->
            PerExampleGrads``; the last is None, or the coordinates of a `Geometry` in
            which gradients are given.
        prepare: the same arguments, to the micro-batch it picks (None: all) and the
            engine as a function of parameters and micro-batch.
        explain: the same arguments and a micro-batch size, to an `Explanation`.
        unroll: how many micro-batches of so many are written out in one turn of the
            loop over them, and whether the caller asked for their size.
    """

    per_example: Callable[[LossFn, Params, Example, Groups, Any], PerExampleGrads]
    prepare: Callable[[LossFn, Params, Example, Groups, Any], tuple[int | None, Run]]
    explain: Callable[[LossFn, Params, Example, Groups, Any, int], Explanation]
    unroll: Callable[[int, bool], int]

    def __call__(
        self,
        loss_fn: LossFn,
        params: Params,
        batch: Example,
        groups: Groups,
        coordinates: Any = None,
    ) -> PerExampleGrads:
        """Norms and weighted sums of a whole batch at once."""
        return self.per_example(loss_fn, params, batch, groups, coordinates)


def _prepare_plain(engine: Callable[..., PerExampleGrads]) -> Callable[..., Any]:
    """How an engine is prepared that has nothing to prepare."""

    def prepare(
        loss_fn: LossFn, params: Params, batch: Example, groups: Groups, there: Any
    ) -> tuple[None, Run]:
        return None, lambda params, batch: engine(loss_fn, params, batch, groups, there)

    return prepare


def _explain_exact(
    loss_fn: LossFn,
    params: Params,
    batch: Example,
    groups: Groups,
    coordinates: Any,
    held: int,
) -> Explanation:
    rows = _explain_vmap(loss_fn, params, batch, groups, coordinates, held)
    return Explanation(row._replace(added="exact") for row in rows)


def _explain_vmap(
    loss_fn: LossFn,
    params: Params,
    batch: Example,
    groups: Groups,
    coordinates: Any,
    held: int,
) -> Explanation:
    del coordinates
    why = "the vmap engine forms every example's gradient"
    rows = []
    for leaf, value in zip(groups.leaves, jax.tree.leaves(params), strict=True):
        cost = held * value.size * value.dtype.itemsize
        path = "per-example gradient"
        rows.append(LeafPlan(leaf.path, path, why, 4 * value.size, cost, ""))
    return Explanation(rows)


def _unroll_pairs(count: int, asked: bool) -> int:
    """Two at once on a CPU, where both share the cores.

    That takes twice the memory: not where the caller set the size, nor where two are
    more than a quarter of the batch (of four the LSTM and the LM of 10,000 words lost).
    """
    pairs = count >= 8 and count % 2 == 0 and not asked
    return 2 if pairs and jax.default_backend() == "cpu" else 1


def _unroll_few(count: int, asked: bool) -> int:
    """All of a few: JAX's own derivatives of convolutions are slow inside a loop."""
    return count if count <= 16 else 1


ENGINES = {
    "bookkeeping": Engine(bookkeeping_engine, prepare, explain, _unroll_pairs),
    "exact": Engine(
        exact_engine, _prepare_plain(exact_engine), _explain_exact, _unroll_few
    ),
    "vmap": Engine(
        vmap_engine, _prepare_plain(vmap_engine), _explain_vmap, _unroll_few
    ),
}
