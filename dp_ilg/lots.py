"""Lots: several batches that count as one step, with one noise and one event.

A lot is what the plan calls a batch: one Poisson sample. Where it does not fit into
memory, or comes from a loader piece by piece, the clipped sums of its pieces add up
before the one noise. ``optax.MultiSteps`` would add noise to every piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dp_ilg import validation
from dp_ilg.base import ClippedGrad, Example, Params
from dp_ilg.geometry import Geometry


def sum_lot(batches: Iterable[Any]) -> ClippedGrad:
    """Adds the clipped sums of a lot's batches; hand the result to ``tx.update`` once.

    Args:
        batches: what a `dp_ilg.clipped_grad` function returned for each batch, all
            with the same parameters, geometry and clip norm.

    Returns:
        The clipped sum of the lot.

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
    found = list(batches)
    if not found:
        raise ValueError("The lot has no batches; an empty lot is one padding batch.")
    for one in found:
        if not isinstance(one, ClippedGrad):
            raise TypeError(
                f"The lot holds {type(one).__name__}, which is not clipped; make each "
                "batch's part with dp_ilg.clipped_grad."
            )
    return reduce(add, found)


def clipped_lot(
    grad_fn: Callable[..., ClippedGrad],
    params: Params,
    lot: Example,
    batch_size: int,
    *,
    geometry: Geometry,
    is_padding_example: Array | None = None,
) -> ClippedGrad:
    """Clips and sums a whole lot, batch by batch, in one compiled loop.

    Args:
        grad_fn: what `dp_ilg.clipped_grad` returned.
        params: as for `grad_fn`.
        lot: the examples, each leaf ``[lot, ...]``.
        batch_size: how many at a time; it must divide the lot. Fill a Poisson draw up
            with padding to a multiple of it.
        geometry: ``tx.geometry(state)``.
        is_padding_example: bool ``[lot]``; True rows do not exist.

    Returns:
        What `grad_fn` returns for the whole lot at once, up to rounding.

    Raises:
        ValueError: for a batch size that does not divide the lot, and as `grad_fn`.

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
    size = _length(lot)
    if size % batch_size:
        raise ValueError(
            f"The lot has {size} examples, which batches of {batch_size} do not divide;"
            " fill the lot up with padding or choose another batch size."
        )
    padding = jnp.zeros(size, bool)
    if is_padding_example is not None:
        padding = jnp.asarray(is_padding_example)
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
