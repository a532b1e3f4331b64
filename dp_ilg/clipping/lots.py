"""Lots: several batches that count as one step, with one noise and one event.

A lot is what the plan calls a batch: one Poisson sample. Where it does not fit into
memory, or comes from a loader piece by piece, the clipped sums of its pieces add up
before the one noise. ``optax.MultiSteps`` would add noise to every piece.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dp_ilg import validation
from dp_ilg.base import ClippedGrad, Example, Params
from dp_ilg.clipping.adding.devices import sum_over_axis as sum_over_axis
from dp_ilg.clipping.adding.sum_error import check_lot
from dp_ilg.clipping.adding.sums import wide, widened
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.sampling.batch import opened

_LARGE = ("gradients", "remainder", "fine")
"""Fields of the size of the parameters, which are updated in place."""


def sum_lot(batches: Iterable[Any]) -> ClippedGrad:
    """Adds the clipped sums of a lot's batches; hand the result to ``tx.update`` once.

    Args:
        batches: what a `dp_ilg.clipped_grad` function returned for each batch, all
            with the same parameters, geometry and clip norm.

    Returns:
        The clipped sum of the lot, the same to the bit in any order of the batches.
        Outside of ``jit`` its `gradients` are float64 arrays, which hold the sum on the
        public grid whole; a compiled function reads them as float32 beside `remainder`.

    Raises:
        ValueError: for no batch at all, or batches clipped differently.
        TypeError: for anything that was not clipped.

    Privacy: sensitivity C, as that of one batch, if every example of the lot is in one
    batch only; one update is one step of the plan, however many batches the lot has.

    Example:
        >>> import dp_ilg
        >>> params, loss = {"w": jnp.zeros(2)}, lambda p, x: p["w"] @ x
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
        >>> geometry = dp_ilg.Geometry.uniform(params)
        >>> batches = jnp.array([[[3.0, 4.0]], [[0.0, 0.5]]])
        >>> lot = sum_lot(grad_fn(params, b, geometry=geometry) for b in batches)
        >>> [round(float(x), 3) for x in lot.gradients["w"]]
        [0.6, 1.3]

    Reference: Abadi et al. 2016, section 3.1 (lots).
    """
    total = None
    for one in batches:
        if not isinstance(one, ClippedGrad):
            raise TypeError(
                f"The lot holds {type(one).__name__}, which is not clipped; make each "
                "batch's part with dp_ilg.clipped_grad."
            )
        total = one if total is None else total + one
    if total is None:
        raise ValueError("The lot has no batches; an empty lot is one padding batch.")
    return _whole(total)


def _whole(total: ClippedGrad) -> ClippedGrad:
    """The sum with float64 gradients, where it is known and float64 is off."""
    leaves, treedef = jax.tree.flatten(total.gradients)
    known = not any(isinstance(x, Tracer) for x in leaves)
    config: Any = jax.config
    if total.remainder is None or not known or config.jax_enable_x64:
        return total
    with wide():
        rests = jax.tree.leaves(total.remainder)
        sums = [widened(x) + widened(y) for x, y in zip(leaves, rests, strict=True)]
        pairs = [(x, widened(x.astype(np.float32))) for x in sums]
        lows = [(x - shown).astype(np.float32) for x, shown in pairs]
    gradients, remainder = (jax.tree.unflatten(treedef, x) for x in (sums, lows))
    return dataclasses.replace(total, gradients=gradients, remainder=remainder)


def lot_accumulator(
    grad_fn: Callable[..., ClippedGrad],
) -> Callable[..., ClippedGrad]:
    """Compiles the sum of a lot whose batches come one at a time, in constant memory.

    However many batches a lot has, at most two are held: the one that is computed and
    the one that `batches` is preparing meanwhile. The running sum is updated in place.

    Args:
        grad_fn: what `dp_ilg.clipped_grad` returned.

    Returns:
        ``accumulate(params, geometry, batches) -> ClippedGrad``; `batches` is any
        iterable of (batch, is_padding_example), or of sealed batches
        (`dp_ilg.sampling.poisson.Chunk.take`), all of one size. The first batch and
        the others are two compiled programs.

    Raises:
        ValueError: for no batch at all, for more examples than the public grid holds,
            and as `grad_fn`.

    Privacy: as `sum_lot`. How many batches a lot has follows from the size of the
    draw, which who can time a step may learn.

    Example:
        >>> import dp_ilg, numpy as np
        >>> params, loss = {"w": jnp.zeros(2)}, lambda p, x: p["w"] @ x
        >>> accumulate = lot_accumulator(dp_ilg.clipped_grad(loss, l2_clip_norm=1.0))
        >>> lot = ((np.full((2, 2), t), np.array([False, t == 2])) for t in (1, 1, 2))
        >>> total = accumulate(params, dp_ilg.Geometry.uniform(params), lot)
        >>> [round(float(x), 3) for x in total.gradients["w"]]
        [3.536, 3.536]

    Reference: Abadi et al. 2016, section 3.1 (lots).
    """

    def first(params: Params, geometry: Geometry, batch: Example, mask: Any) -> Any:
        return grad_fn(params, batch, geometry=geometry, is_padding_example=mask)

    def more(sums: Any, rest: ClippedGrad, *inputs: Any) -> ClippedGrad:
        return dataclasses.replace(rest, **sums) + first(*inputs)

    jit_first, jit_more = jax.jit(first), jax.jit(more, donate_argnums=0)

    def accumulate(params: Params, geometry: Geometry, batches: Iterable) -> Any:
        total = None
        for count, (batch, mask) in enumerate(batches, 1):
            check_lot(count * len(mask), sum(geometry.groups.sizes))
            if total is None:
                total = jit_first(params, geometry, batch, mask)
                continue
            # Dispatch returns at once: without waiting, all batches would queue up.
            sums = jax.block_until_ready({n: getattr(total, n) for n in _LARGE})
            rest = dataclasses.replace(total, **dict.fromkeys(_LARGE))
            total = jit_more(sums, rest, params, geometry, batch, mask)
        if total is None:
            raise ValueError("The lot has no batches; an empty lot is one of padding.")
        return total

    return accumulate


def clipped_lot(
    grad_fn: Callable[..., ClippedGrad],
    params: Params,
    lot: Example,
    batch_size: int,
    *,
    geometry: Geometry,
    is_padding_example: Any = None,
) -> ClippedGrad:
    """Clips and sums a whole lot, batch by batch, in one compiled loop.

    Args:
        grad_fn: what `dp_ilg.clipped_grad` returned.
        params: as for `grad_fn`.
        lot: the examples, each leaf ``[lot, ...]``, or a sealed batch of them.
        batch_size: how many at a time; it must divide the lot. Fill a Poisson draw up
            with padding to a multiple of it.
        geometry: ``tx.geometry(state)``.
        is_padding_example: bool ``[lot]``; True rows do not exist.

    Returns:
        What `grad_fn` returns for the whole lot at once: the same examples, added
        without rounding.

    Raises:
        ValueError: for a batch size that does not divide the lot, for more examples
            than the public grid holds, and as `grad_fn`.

    Privacy: as `sum_lot`. Noise is not drawn here.

    Example:
        >>> import dp_ilg
        >>> params, loss = {"w": jnp.zeros(2)}, lambda p, x: p["w"] @ x
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
        >>> geometry = dp_ilg.Geometry.uniform(params)
        >>> lot = clipped_lot(grad_fn, params, jnp.ones((6, 2)), 3, geometry=geometry)
        >>> [round(float(x), 3) for x in lot.gradients["w"]]
        [4.243, 4.243]
        >>> clipped_lot(grad_fn, params, jnp.ones((6, 2)), 4, geometry=geometry)
        Traceback (most recent call last):
        ValueError: The lot has 6 examples, which batches of 4 do not divide; fill ...

    Reference: Abadi et al. 2016, section 3.1 (lots).
    """
    validation.whole("batch_size", batch_size)
    lot, mask = opened(lot, is_padding_example)
    size = _length(lot)
    check_lot(size, sum(geometry.groups.sizes))
    if size % batch_size:
        raise ValueError(
            f"The lot has {size} examples, which batches of {batch_size} do not divide;"
            " fill the lot up with padding or choose another batch size."
        )
    padding = jnp.zeros(size, bool)
    if mask is not None:
        padding = jnp.asarray(mask)
    if padding.shape != (size,):
        raise ValueError(
            f"is_padding_example has shape {padding.shape}, but the lot has {size} "
            "examples; give one value an example."
        )

    def one(piece: Any) -> ClippedGrad:
        batch, mask = piece
        return grad_fn(params, batch, geometry=geometry, is_padding_example=mask)

    pieces = jax.tree.map(
        lambda x: jnp.reshape(x, (-1, batch_size, *jnp.shape(x)[1:])), (lot, padding)
    )
    first = one(jax.tree.map(lambda x: x[0], pieces))
    rest = jax.tree.map(lambda x: x[1:], pieces)
    return jax.lax.scan(lambda sum_, piece: (sum_ + one(piece), None), first, rest)[0]


def _length(lot: Example) -> int:
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(lot)}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(
            "The lot's arrays need one common leading axis of examples, not lengths "
            f"{sorted(lengths)}; give every array the same examples."
        )
    ((size,),) = lengths
    if not size:
        raise ValueError("The lot has no examples; an empty lot is all padding.")
    return size
