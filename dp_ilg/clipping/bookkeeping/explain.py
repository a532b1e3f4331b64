"""Says which path every leaf takes, what it costs and how to get a faster one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from dp_ilg.base import Example, LossFn, Params, PerExampleGrads
from dp_ilg.clipping.adding.sum_error import ARGUMENTS
from dp_ilg.clipping.bookkeeping import cost
from dp_ilg.clipping.bookkeeping.engine import Paths, find_paths, follow
from dp_ilg.clipping.bookkeeping.parts import Part
from dp_ilg.clipping.leaf_paths import Explanation, LeafPlan
from dp_ilg.geometry.groups import Groups, LeafGroups

Run = Callable[[Params, Example], PerExampleGrads]

_ADVICE = {
    "it is returned": "keep the parameter itself out of loop carries and results",
    "it starts": "add a learned start to the first input instead",
    "its blocks": "cut it into blocks along another axis",
    "it is read in two ways": "multiply by it the same way round each time",
    "concatenate": "multiply by each parameter instead of joining them first",
    "integer_pow": "take the penalty out of the loss: decay weights after the noise",
    "square": "take the penalty out of the loss: decay weights after the noise",
    "cond": "read the parameter outside the branches",
    "while": "use lax.scan with the parameter as it is",
    "custom": "keep parameters out of functions with custom derivatives",
}
_ELSE = "multiply, convolve or look up with the parameter as it is"


def explain(
    loss_fn: LossFn,
    params: Params,
    batch: Example,
    groups: Groups,
    coordinates: Any,
    held: int,
) -> Explanation:
    """One row a leaf; only shapes of `batch` are read.

    Args:
        loss_fn: the loss of one example.
        params: the parameters.
        batch: a batch.
        groups: the groups of `params`.
        coordinates: None, or those of the geometry.
        held: examples in a micro-batch.

    Returns:
        The rows, in the order of the leaves.
    """
    paths = find_paths(loss_fn, params, batch, groups, coordinates)
    return Explanation(
        _row(paths, k, leaf, held) for k, leaf in enumerate(groups.leaves)
    )


def _row(paths: Paths, index: int, leaf: LeafGroups, held: int) -> LeafPlan:
    places = [k for k, part in enumerate(paths.parts) if part.leaf == index]
    own = [paths.parts[k] for k in places]
    size = math.prod(leaf.shape)
    if not leaf.groups:
        return LeafPlan(leaf.path, "none", "it is frozen", 0, 0, "", "none")
    if index in paths.spoiled:
        return _general(leaf.path, paths.spoiled[index], size, held)
    if not own:
        why = "the loss does not read it"
        return LeafPlan(leaf.path, "none", why, 0, 0, "", "none")
    formed = any(cost.forms_gradient(part) for part in own)
    added = max(map(_added, own), key=ARGUMENTS.index)
    flops = sum(map(cost.part_flops, own))
    maps = [paths.maps[k] for k in places if k in paths.maps]
    flops += sum(k.flops(part) for k, part in zip(maps, own, strict=False))
    memory = held * sum(map(cost.part_bytes, own))
    why = "; ".join(map(_terms, own[:2])) + (" ..." if len(own) > 2 else "")
    why += f"; {maps[0]}" if maps else ""
    path = "formed" if formed else "gram"
    return LeafPlan(leaf.path, path, why, flops, memory, "", added)


def _added(part: Part) -> str:
    """How a part's sum over examples is made."""
    if cost.forms_gradient(part):
        return "formed"
    if part.has_rows:
        return "rows"
    return "one term" if part.terms == 1 else "terms"


def _terms(part: Part) -> str:
    _, first, second = part.shape
    rows = "rows" if part.has_rows else str(first)
    noun = "term" if part.terms == 1 else "terms"
    kinds = sorted({use.use.eqn.primitive.name for use in part.uses})
    return f"{' and '.join(kinds)}: {part.terms} {noun} of {rows} x {second}"


def _general(path: str, reason: str, size: int, held: int) -> LeafPlan:
    small = size <= 4096
    advice = next((text for key, text in _ADVICE.items() if key in reason), _ELSE)
    return LeafPlan(
        path,
        "per-example gradient",
        reason,
        4 * size,
        4 * held * size,
        "" if small else advice,
    )


def prepare(
    loss_fn: LossFn,
    params: Params,
    batch: Example,
    groups: Groups,
    coordinates: Any = None,
) -> tuple[int, Run]:
    """Traces a loss once, for all micro-batches of a step.

    Args:
        loss_fn: the loss of one example.
        params: the parameters.
        batch: the batch; only shapes are read.
        groups: the groups of `params`.
        coordinates: None, or those of the geometry.

    Returns:
        The micro-batch that `cost.microbatch` picks, and the engine as a function of
        parameters and micro-batch.
    """
    paths = find_paths(loss_fn, params, batch, groups, coordinates)
    held = cost.footprint(paths.closed) + sum(map(cost.part_bytes, paths.parts))
    sizes = [math.prod(leaf.shape) for leaf in groups.leaves]
    formed = sum(4 * sizes[k] for k in paths.spoiled)
    count = jax.tree.leaves(batch)[0].shape[0]
    picked = cost.microbatch(held + formed, formed, 4 * sum(sizes), count)

    def run(params: Params, batch: Example) -> PerExampleGrads:
        return follow(paths, params, batch, groups, coordinates)

    return picked, run
