"""The book-keeping engine: exact clipped sums without per-example gradients.

One backward pass gives, for every place where a parameter is read, what it was
combined with and the derivative there: the gradient in factors. Norms and weighted
sums follow from the factors. What has no such form is differentiated example by
example in the same pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array

from dp_ilg.base import Example, LossFn, Params, PerExampleGrads
from dp_ilg.bookkeeping import cost, factors, parts, tape
from dp_ilg.bookkeeping.program import flat
from dp_ilg.bookkeeping.views import whole
from dp_ilg.groups import Groups, join_norms, piece_norms, pieces_of
from dp_ilg.per_example import leaf_sum


class Plan(NamedTuple):
    """What static facts say about a loss.

    Attributes:
        closed: the loss of one example as a flat program.
        level: its uses.
        parts: the parts of leaves with a fast path.
        spoiled: why a leaf takes the general path, by leaf.
    """

    closed: ClosedJaxpr
    level: tape.Level
    parts: list[parts.Part]
    spoiled: tape.Spoiled


def make_plan(loss_fn: LossFn, params: Params, batch: Example, groups: Groups) -> Plan:
    """Traces the loss of one example and finds the path of every leaf."""
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    closed = flat(jax.make_jaxpr(loss_fn)(params, example))
    spoiled: tape.Spoiled = {}
    inputs = len(closed.jaxpr.invars)
    while True:
        before = len(spoiled)
        views = [
            whole(k, leaf.shape) if leaf.groups and k not in spoiled else None
            for k, leaf in enumerate(groups.leaves)
        ]
        padded = [*views, *[None] * (inputs - len(views))]
        level = tape.survey(closed, padded, spoiled)
        found = parts.find_parts(level, groups.leaves, spoiled)
        if len(spoiled) == before:
            return Plan(closed, level, found, spoiled)


def bookkeeping_engine(
    loss_fn: LossFn, params: Params, batch: Example, groups: Groups
) -> PerExampleGrads:
    """Norms and weighted sums for any pure loss, mostly without forming gradients.

    Args:
        loss_fn: ``(params, example) -> scalar`` for one example.
        params: any tree of floating-point arrays.
        batch: the same tree as an example, with a leading batch axis.
        groups: the groups of `params`.

    Returns:
        What `vmap_engine` gives, to rounding.

    Privacy: raw values, see `PerExampleGrads`. Which path a leaf takes depends on
    shapes and on the program alone.

    Example:
        >>> import jax.numpy as jnp
        >>> from dp_ilg.layers import group
        >>> params = {"w": jnp.ones((2, 1))}
        >>> loss = lambda p, x: jnp.sum(x @ p["w"])
        >>> batch = jnp.array([[3.0, 4.0], [0.0, 1.0]])
        >>> bookkeeping_engine(loss, params, batch, group(params)).norms.tolist()
        [[5.0], [1.0]]

    Reference: Bu et al. 2023 (book-keeping) and Lee and Kifer 2021 (norms from
    factors), here on traced programs; DESIGN.md section 6.
    """
    plan = make_plan(loss_fn, params, batch, groups)
    leaves, treedef = jax.tree.flatten(params)
    formed, derivatives, records = _differentiate(plan, leaves, batch, groups)
    general = _General(groups, formed)
    fast = [_Fast(part, _factors_of(part, derivatives, records)) for part in plan.parts]
    pieces, owners = general.norms()
    for item in fast:
        pieces += item.norms()
        owners += item.part.side.groups
    norms = join_norms(jnp.stack(pieces, axis=1), np.array(owners), len(groups.names))

    def weighted_sum(coefficients: Array) -> Params:
        sums = general.sums(coefficients)
        for item in fast:
            index = item.part.leaf
            own = item.sum(coefficients, groups.leaves[index].shape)
            sums[index] = sums[index] + own if index in sums else own
        whole_sums = [
            sums[k] if k in sums else jnp.zeros(x.shape, factors.accumulator(x.dtype))
            for k, x in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, whole_sums)

    return PerExampleGrads(norms, weighted_sum)


def _differentiate(
    plan: Plan, leaves: list[Any], batch: Example, groups: Groups
) -> tuple[dict[int, Array], Any, Any]:
    """One backward pass: formed gradients, derivatives at uses, what uses read."""
    slow = [k for k, x in enumerate(groups.leaves) if x.groups and k in plan.spoiled]

    def one(example: Example) -> Any:
        def loss(own: dict[int, Array], probe: Any) -> Any:
            values = [own.get(k, leaf) for k, leaf in enumerate(leaves)]
            outs, records = tape.play(
                plan.level, [*values, *jax.tree.leaves(example)], probe
            )
            return outs[0], records

        start = {k: leaves[k] for k in slow}
        value, pull, records = jax.vjp(
            loss, start, tape.probes(plan.level), has_aux=True
        )
        return *pull(jnp.ones_like(value)), records

    return jax.vmap(one)(batch)


def _factors_of(part: parts.Part, derivatives: Any, records: Any) -> factors.Factors:
    pairs = []
    for part_use in part.uses:
        cotangent, read = derivatives, records
        for step in part_use.address:
            cotangent, read = cotangent[step], read[step]
        make = part_use.use.linear.factors
        for _ in range(1 + len(part_use.use.view.loops)):
            make = jax.vmap(make)
        pairs.append(parts.arrange(part_use, *make(*read, cotangent)))
    return factors.scaled(pairs)


class _Fast:
    """One part of a batch: its norms, and its weighted sum."""

    def __init__(self, part: parts.Part, own: factors.Factors) -> None:
        self.part, self.factors = part, own
        forms = cost.forms_gradient(part)
        self.formed = factors.gradients(own) if forms else None

    def norms(self) -> list[Array]:
        if self.formed is None:
            return factors.norms_of_factors(self.part, self.factors)
        return factors.norms_of_gradients(self.part, self.factors.scale, self.formed)

    def sum(self, coefficients: Array, shape: tuple[int, ...]) -> Array:
        scale = self.factors.scale
        scale = scale.reshape(-1, *[1] * (coefficients.ndim - 1))
        present = (coefficients != 0) & jnp.isfinite(scale)
        weights = jnp.where(present, coefficients * scale, 0)
        if self.formed is None:
            value = factors.sum_of_factors(self.part, self.factors, weights)
        else:
            value = factors.sum_of_gradients(self.part, self.formed, weights)
        return parts.place(self.part, value, shape)


class _General(NamedTuple):
    """Leaves whose per-example gradients were formed, by leaf."""

    groups: Groups
    formed: dict[int, Array]

    def norms(self) -> tuple[list[Array], list[int]]:
        pieces: list[Array] = []
        owners: list[int] = []
        for k, value in self.formed.items():
            leaf = self.groups.leaves[k]
            pieces += jax.vmap(lambda v, leaf=leaf: piece_norms(leaf, v))(value)
            owners += [group for _, _, group in pieces_of(leaf)]
        return pieces, owners

    def sums(self, coefficients: Array) -> dict[int, Array]:
        return {
            k: leaf_sum(self.groups.leaves[k], value, coefficients)
            for k, value in self.formed.items()
        }
