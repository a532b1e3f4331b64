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
from dp_ilg.clipping.adding import part_sums
from dp_ilg.clipping.adding.sums import looked_up_unit, wide, widened
from dp_ilg.clipping.bookkeeping import cost, factors, magnitudes, parts, pool, tape
from dp_ilg.clipping.bookkeeping.program import flat
from dp_ilg.clipping.bookkeeping.rules import Direct
from dp_ilg.clipping.bookkeeping.views import Digits, whole
from dp_ilg.clipping.mapping import acting
from dp_ilg.clipping.mapping.placement import Placement, placements
from dp_ilg.geometry.groups import (
    Groups,
    join_norms,
)
from dp_ilg.geometry.rounding import upwards

_DENSE = "its entries are scaled one by one"


class Paths(NamedTuple):
    """What static facts say about a loss.

    Attributes:
        closed: the loss of one example as a flat program.
        level: its uses.
        parts: the parts of leaves with a fast path.
        spoiled: why a leaf takes the general path, by leaf.
        maps: where the coordinates' maps act on a part, by part.
    """

    closed: ClosedJaxpr
    level: tape.Level
    parts: list[parts.Part]
    spoiled: tape.Spoiled
    maps: dict[int, Placement]


def find_paths(
    loss_fn: LossFn,
    params: Params,
    batch: Example,
    groups: Groups,
    coordinates: Any = None,
) -> Paths:
    """Traces the loss of one example and finds the path of every leaf."""
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    closed = flat(jax.make_jaxpr(loss_fn)(params, example))
    kinds = [()] * len(groups.leaves)
    if coordinates is not None:
        kinds = coordinates.axis_kinds()
    spoiled = {k: _DENSE for k, own in enumerate(kinds) if own is None}
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
        maps = placements(found, kinds, groups.leaves, spoiled)
        if len(spoiled) == before:
            return Paths(closed, level, found, spoiled, maps)


def bookkeeping_engine(
    loss_fn: LossFn,
    params: Params,
    batch: Example,
    groups: Groups,
    coordinates: Any = None,
) -> PerExampleGrads:
    """Norms and weighted sums for any pure loss, mostly without forming gradients.

    Args:
        loss_fn: ``(params, example) -> scalar`` for one example.
        params: any tree of floating-point arrays.
        batch: the same tree as an example, with a leading batch axis.
        groups: the groups of `params`.
        coordinates: None, or what gradients are mapped by, as in a `Geometry`.

    Returns:
        What `vmap_engine` gives, to rounding.

    Privacy: raw values, see `PerExampleGrads`. Which path a leaf takes depends on
    shapes and on the program alone.

    Example:
        >>> import jax.numpy as jnp
        >>> from dp_ilg.geometry.layers import group
        >>> params = {"w": jnp.ones((2, 1))}
        >>> loss = lambda p, x: jnp.sum(x @ p["w"])
        >>> batch = jnp.array([[3.0, 4.0], [0.0, 1.0]])
        >>> found = bookkeeping_engine(loss, params, batch, group(params))
        >>> found.norms.round(3).tolist()
        [[5.0], [1.0]]

    Reference: Bu et al. 2023 (book-keeping) and Lee and Kifer 2021 (norms from
    factors), here on traced programs.
    """
    paths = find_paths(loss_fn, params, batch, groups, coordinates)
    return follow(paths, params, batch, groups, coordinates)


def follow(
    paths: Paths,
    params: Params,
    batch: Example,
    groups: Groups,
    coordinates: Any = None,
) -> PerExampleGrads:
    """The engine once its paths are known, for any batch of the same shapes."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, params))
    batch = jax.tree.map(jnp.asarray, batch)
    formed, derivatives, records, values = _differentiate(paths, leaves, batch, groups)
    if coordinates is not None:
        formed = {k: coordinates.entered_leaf(k, x) for k, x in formed.items()}
    general = pool.General.of(groups, formed)
    acts = acting.of_parts(paths.parts, paths.maps, coordinates)
    fast, scale = _fast(paths, derivatives, records, acts)
    columns, owners = general.norms()
    sizes = list(columns)
    if fast:
        squares = [square for item in fast for square in item.squares()]
        counts = [len(item.part.side.groups) for item in fast]
        spread = scale[:, np.repeat(np.arange(len(fast)), counts)]
        found, rough = factors.norms(squares, spread)
        if paths.maps:
            found, rough = (upwards(x, acting.ROUNDINGS) for x in (found, rough))
        columns.append(found)
        sizes.append(rough)
        owners += [group for item in fast for group in item.part.side.groups]
    norms = _by_group(columns, owners, groups, batch)
    rough = _by_group(sizes, owners, groups, batch)

    def weighted_sum(coefficients: Array, steps: Any = None) -> Params:
        with wide():
            sums = general.sums(coefficients)
            for item in fast:
                index = item.part.leaf
                own = item.sum(coefficients, groups, steps)
                sums[index] = sums[index] + own if index in sums else own
            whole_sums = [
                sums[k] if k in sums else jnp.zeros(x.shape, np.float64)
                for k, x in enumerate(leaves)
            ]
        return jax.tree.unflatten(treedef, whole_sums)

    return PerExampleGrads(norms, weighted_sum, rough, values[0] if values else None)


def _by_group(
    columns: list[Array], owners: list[int], groups: Groups, batch: Example
) -> Array:
    """Joins the norms of all pieces; zeros where the loss reads no parameter."""
    if not columns:
        size = jax.tree.leaves(batch)[0].shape[0]
        return jnp.zeros((size, len(groups.names)), jnp.float32)
    pieces = jnp.concatenate(columns, axis=1)
    return join_norms(pieces, np.array(owners), len(groups.names))


def _differentiate(
    paths: Paths, leaves: list[Any], batch: Example, groups: Groups
) -> tuple[dict[int, Array], Any, Any, list[Array]]:
    """One backward pass: formed gradients, derivatives at uses, what uses read.

    And what the program gives beside the loss, from the same forward pass.
    """
    slow = [k for k, x in enumerate(groups.leaves) if x.groups and k in paths.spoiled]

    def one(example: Example) -> Any:
        def loss(own: dict[int, Array], probe: Any) -> Any:
            values = [own.get(k, leaf) for k, leaf in enumerate(leaves)]
            outs, records = tape.play(
                paths.level, [*values, *jax.tree.leaves(example)], probe
            )
            return outs[0], (records, outs[1:])

        start = {k: leaves[k] for k in slow}
        value, pull, (records, values) = jax.vjp(
            loss, start, tape.probes(paths.level), has_aux=True
        )
        return *pull(jnp.ones_like(value)), records, values

    return jax.vmap(one)(batch)


class _Fast(NamedTuple):
    """One part of a batch: its norms, and its weighted sum.

    Attributes:
        part: the part.
        held: its scaled factors, or its gradients ``[examples, ...]``.
        digits: layout of the gradients; None for ``[batch, first, second]``.
        scale: what they were divided by, ``[examples]``.
    """

    part: parts.Part
    held: factors.Factors | Array
    digits: Digits | None
    scale: Array

    def squares(self) -> list[factors.Square]:
        if isinstance(self.held, factors.Factors):
            return factors.squares_of_factors(self.part, self.held)
        return factors.squares_of_gradients(self.part, self.held)

    def sum(self, coefficients: Array, groups: Groups, steps: Any) -> Array:
        scale = self.scale.reshape(-1, *[1] * (coefficients.ndim - 1))
        present = (coefficients != 0) & jnp.isfinite(scale)
        zero = np.float64(0)
        weights = jnp.where(present, widened(coefficients) * widened(scale), zero)
        if isinstance(self.held, factors.Factors):
            units = None
            if steps is not None:
                size, count = sum(groups.sizes), weights.shape[0]
                units = looked_up_unit(steps, count, size)
            value = part_sums.sum_of_factors(self.part, self.held, weights, units)
        else:
            value = part_sums.sum_of_gradients(self.part, self.held, weights)
        shape = groups.leaves[self.part.leaf].shape
        return parts.place(self.part, value, shape, self.digits)


def _fast(
    paths: Paths, derivatives: Any, records: Any, acts: acting.Acts
) -> tuple[list[_Fast], Any]:
    if not paths.parts:
        return [], None
    pairs = [
        [_pair(part_use, derivatives, records) for part_use in part.uses]
        for part in paths.parts
    ]
    found, scale = magnitudes.scaled(pairs)
    if acts:
        scale = acting.enlarged(scale, acts)
    items = [
        _Fast(part, *_held(part, own, acts.get(k)), scale[:, k])
        for k, (part, own) in enumerate(zip(paths.parts, found, strict=True))
    ]
    return items, scale


def _pair(part_use: parts.PartUse, derivatives: Any, records: Any) -> magnitudes.Pair:
    for step in part_use.address:
        derivatives, records = derivatives[step], records[step]
    return magnitudes.Pair(records, derivatives)


def _held(
    part: parts.Part, pairs: list[magnitudes.Pair], act: acting.Acting | None
) -> tuple[factors.Factors | Array, Digits | None]:
    """A part's gradients if it is cheaper to form them, else its factors."""
    forms = cost.forms_gradient(part)
    direct = _direct(part)
    if forms and direct is not None:
        return _directly(part, direct, pairs[0], act)
    made = []
    for part_use, pair in zip(part.uses, pairs, strict=True):
        make = part_use.use.linear.factors
        for _ in range(1 + len(part_use.use.view.loops)):
            make = jax.vmap(make)
        made.append(parts.arrange(part_use, *make(*pair)))
    own = factors.joined(made)
    if act is not None:
        return (
            acting.formed(act, part, own) if forms else acting.on_factors(act, own)
        ), None
    return (factors.gradients(own) if forms else own), None


def _direct(part: parts.Part) -> Direct | None:
    """How the gradient of a part with a single use can be formed at once."""
    first = part.uses[0].use
    return None if len(part.uses) > 1 or first.view.loops else first.linear.direct


def _directly(
    part: parts.Part, direct: Direct, pair: magnitudes.Pair, act: acting.Acting | None
) -> tuple[Array, Digits | None]:
    """The gradients as they are made; in the part's layout only where it is cut."""
    value = jax.vmap(direct.make)(*pair)
    scale = part.uses[0].use.view.scale
    if scale != 1:
        value = value * np.asarray(scale, value.dtype)
    if act is not None:
        value = acting.on_formed(act, parts.arrange_formed(part, direct.digits, value))
        return value, None
    if part.side.name:
        return parts.arrange_formed(part, direct.digits, value), None
    return value, direct.digits
