"""Whether one example's gradient keeps its bits whoever else is in the batch.

The bound on sums (docs/sums.md) takes each example's clipped gradient as a function of
that example alone. In exact numbers it is. In floating point it is where a batched
program computes each row the same way, whatever the other rows hold and wherever the
row lies: true of the kernels we know, promised by none, hence this check.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg import validation
from dp_ilg.base import ClippedGrad, Example, Params
from dp_ilg.clipping.batches import batch_length
from dp_ilg.geometry.geometry import Geometry


class RowCheck(NamedTuple):
    """What `rows_are_independent` found.

    Attributes:
        independent: whether no bit differed.
        compared: how many pairs of sums were compared.
        differing: leaves in which some pair differed.
        largest: largest distance of a pair in the geometry's norm, as a part of the
            clip norm.
    """

    independent: bool
    compared: int
    differing: tuple[str, ...]
    largest: float


def rows_are_independent(
    grad_fn: Callable[..., ClippedGrad],
    params: Params,
    batch: Example,
    *,
    geometry: Geometry | None = None,
    trials: int = 8,
    seed: int = 0,
) -> RowCheck:
    """Compares one example's sum among different others, at different places.

    In each trial all rows but one are padding. Once the batch is as it was, once it is
    shuffled and what lies around the row is replaced by other rows and by zeros: the
    two sums must have the same bits.

    Args:
        grad_fn: what `dp_ilg.clipped_grad` returned, or any function with its
            arguments.
        params: where to differentiate.
        batch: a batch of the size that will be used; public or made-up examples.
        geometry: of the clip; None for weights of 1.
        trials: how many examples are tried.
        seed: of the choice.

    Returns:
        The `RowCheck`.

    Raises:
        ValueError: for a number of trials or a seed out of range, and as `grad_fn`.

    Privacy: compares raw sums of single examples: for made-up or public data, in tests
    and audits. Nothing of it may be released for private data.

    Example:
        >>> import dp_ilg, jax.numpy as jnp, numpy as np
        >>> params, loss = {"w": jnp.ones(3)}, lambda p, x: jnp.tanh(p["w"] @ x)
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
        >>> batch = np.arange(24.0, dtype="float32").reshape(8, 3) / 24
        >>> rows_are_independent(grad_fn, params, batch).independent
        True
    """
    validation.whole("trials", trials)
    validation.whole("seed", seed, 0)
    size = batch_length(batch)
    geometry = Geometry.uniform(params) if geometry is None else geometry
    rows = jax.tree.map(np.asarray, batch)
    run = jax.jit(
        lambda p, b, mask: grad_fn(p, b, geometry=geometry, is_padding_example=mask)
    )
    rng = np.random.default_rng(seed)
    differing: set[str] = set()
    largest = 0.0
    for _ in range(trials):
        row = int(rng.integers(size))
        other, place = _surrounded(rows, row, rng)
        one = run(params, rows, np.arange(size) != row)
        two = run(params, other, np.arange(size) != place)
        names, distance = _compared(one, two)
        differing |= names
        largest = max(largest, distance)
    return RowCheck(not differing, trials, tuple(sorted(differing)), largest)


def _surrounded(
    rows: Example, row: int, rng: np.random.Generator
) -> tuple[Example, int]:
    """The batch with one row kept, at another place among others; and the place."""
    size = batch_length(rows)
    place = int(rng.integers(size))
    picked = rng.integers(size, size=size)
    empty = rng.random(size) < 0.25
    picked[place], empty[place] = row, False

    def surrounded(x: np.ndarray) -> np.ndarray:
        other = x[picked]
        other[empty] = np.zeros((), x.dtype)
        return other

    return jax.tree.map(surrounded, rows), place


def _compared(one: ClippedGrad, two: ClippedGrad) -> tuple[set[str], float]:
    """Leaves whose bits differ, metrics among them, and how far the sums are apart."""
    paths = [leaf.path for leaf in one.geometry.groups.leaves]
    names = set()
    for field in ("gradients", "remainder", "fine"):
        pairs = zip(
            paths,
            jax.tree.leaves(getattr(one, field)),
            jax.tree.leaves(getattr(two, field)),
            strict=False,
        )
        names |= {path for path, a, b in pairs if not bool(jnp.array_equal(a, b))}
    told = [jax.tree.leaves(clipped.metrics) for clipped in (one, two)]
    if not all(map(jnp.array_equal, *told)):
        names.add("metrics")
    gaps = jax.tree.map(jnp.subtract, one.gradients, two.gradients)
    norms = one.geometry.groups.norms(jax.tree.leaves(gaps))
    return names, float(one.geometry.norm(norms) / one.l2_clip_norm)
