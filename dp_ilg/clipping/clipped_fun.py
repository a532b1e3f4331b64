"""Clipped sums of any function of an example: means, counts, Fisher information.

What a function returns is the gradient of its inner product with parameters of the same
tree. So its sum over a batch is a clipped gradient like any other: the same bound on
rounding, masks, micro-batches and seal, and the same noise behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dp_ilg.base import ClippedGrad, Example
from dp_ilg.clipping.clipped_grad import ClippedGradFn, clipped_grad
from dp_ilg.clipping.modes import ClipMode
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.sampling.batch import SealedBatch


class ClippedFun:
    """What `clipped_fun` returns; called, it gives the clipped sum over a batch."""

    def __init__(self, fun: Callable[[Any, Any], Any], facts: dict[str, Any]):
        """Takes the function, and what `clipped_grad` is told."""
        self._fun, self._facts = fun, facts
        self._made(None)  # refuses wrong options now

    def __call__(
        self,
        args: Any,
        batch: Example,
        *,
        geometry: Geometry | None = None,
        is_padding_example: Any = None,
    ) -> ClippedGrad:
        """Sums the clipped values of a batch.

        Args:
            args: first argument of the function; None if it needs none.
            batch: examples with a leading axis, or a `SealedBatch`.
            geometry: weights of groups of the value; None for one bound on its length.
            is_padding_example: bool ``[batch]``; True rows do not count.

        Returns:
            A `ClippedGrad` whose ``gradients`` are shaped like the value, float32.
        """
        like = self.like(args, batch)
        if geometry is None:
            geometry = Geometry.uniform(like)
        return self._made(args)(
            like, batch, geometry=geometry, is_padding_example=is_padding_example
        )

    def like(self, args: Any, batch: Example) -> Any:
        """Zeros shaped like the value of one example, for ``init`` of the noise.

        Args:
            args: as in a call.
            batch: as in a call; only shapes are read.

        Returns:
            The value's tree in float32.

        Raises:
            TypeError: for a value that holds no arrays, or complex numbers.
        """
        examples = batch.examples if isinstance(batch, SealedBatch) else batch
        one = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(jnp.shape(x)[1:], jnp.result_type(x)),
            examples,
        )
        shapes = jax.eval_shape(self._fun, args, one)
        leaves = jax.tree.leaves(shapes)
        kinds = [jnp.issubdtype(x.dtype, jnp.complexfloating) for x in leaves]
        if not leaves or any(kinds):
            raise TypeError(
                "fun returned no real arrays for an example, but must return numbers "
                "or a tree of them; return real and imaginary parts apart."
            )
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

    def _made(self, args: Any) -> ClippedGradFn:
        def product(like: Any, example: Any) -> Any:
            value = self._fun(args, example)
            pairs = zip(jax.tree.leaves(like), jax.tree.leaves(value), strict=True)
            return sum(jnp.sum(a * jnp.asarray(b, jnp.float32)) for a, b in pairs)

        return clipped_grad(product, **self._facts)


def clipped_fun(
    fun: Any,
    *,
    l2_clip_norm: Any,
    clip_mode: str | ClipMode | None = None,
    microbatch_size: int | None = None,
    engine: str = "vmap",
) -> ClippedFun:
    """Turns a function of one example into the clipped sum over a batch.

    Args:
        fun: ``(args, example) -> tree of numbers``, pure, for ONE example; counts and
            booleans are taken as float32.
        l2_clip_norm: bound C on the length of one example's whole value.
        clip_mode: as in `dp_ilg.clipped_grad`; "normalize" brings every value to C.
        microbatch_size: how many examples are held at once; None for all that the
            engine takes. Memory is that many values.
        engine: "vmap", or "exact" (sums that do not round at all).

    Returns:
        ``sums(args, batch, *, geometry=None, is_padding_example=None)``, which gives a
        `ClippedGrad`, and ``sums.like(args, batch)``.

    Raises:
        ValueError: for a bad norm, mode, engine or size.
        TypeError: for what is no function.

    Privacy: adding or removing one example moves the sum by C at most, rounding
    included; values that are not finite are absent. Not private before noise:
    `dp_ilg.add_importance_noise` adds the plan's and divides by its batch size. Where
    `fun` is itself a gradient, `dp_ilg.clipped_grad` of its loss makes no per-example
    gradients and is faster.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp
        >>> both = lambda _, x: {"mean": x, "square": x**2}
        >>> sums = clipped_fun(both, l2_clip_norm=2.0)
        >>> rows = jnp.array([[0.5, 1.0], [30.0, 40.0]])
        >>> found = sums(None, rows)
        >>> [round(float(x), 2) for x in found.gradients["square"]]
        [1.23, 2.74]
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_examples=2,
        ...     batch_size=2, num_steps=1, l2_clip_norm=2.0, score_budget=0)
        >>> noise = dp_ilg.add_importance_noise(plan, key=jax.random.key(0))
        >>> mean, _ = noise.update(found, noise.init(sums.like(None, rows)))
        >>> mean["mean"].shape
        (2,)

    Reference: the name is that of ``jax_privacy.clipping.clipped_fun``.
    """
    if not callable(fun):
        raise TypeError(
            f"fun is {type(fun).__name__}, but must be a function (args, example) -> "
            "numbers."
        )
    if engine not in ("vmap", "exact"):
        raise ValueError(
            f"engine is {engine!r}, but must be 'vmap' or 'exact'; a gradient goes "
            "through dp_ilg.clipped_grad, whose engine is faster."
        )
    facts = dict(l2_clip_norm=l2_clip_norm, clip_mode=clip_mode, engine=engine)
    return ClippedFun(fun, facts | {"microbatch_size": microbatch_size})
