"""A step on kept rows as compiled functions, for a draw of one chunk or of several."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax

from dp_ilg.base import Params
from dp_ilg.clipping.clipped_grad import ClippedGradFn
from dp_ilg.optimizers.kept_rows.gradient import RowGradient
from dp_ilg.optimizers.kept_rows.stages import RowOptimizer


@dataclasses.dataclass(frozen=True)
class CompiledRowStep:
    """What `compile_rows` returns; call it as is said there.

    Attributes:
        whole: the compiled step of one chunk.
        count: the counts of a chunk.
        choose: which rows take part.
        add: the clipped sum of a chunk, and what went before it.
        finish: the part behind the clipped sum.
    """

    whole: Any
    count: Any
    choose: Any
    add: Any
    finish: Any

    def __call__(
        self, params: Params, state: Any, chunks: Iterable, noise: Any = None
    ) -> Any:
        """One step; see `compile_rows`."""
        given = () if noise is None else (noise,)
        held = list(chunks)
        if len(held) == 1:
            return self.whole(params, state, *held[0], *given)
        counts = total = None
        for chunk in held:
            found = self.count(params, *chunk)
            counts = found if counts is None else counts + found
        kept = self.choose(counts, state, *given)
        for chunk in held:
            total = self.add(total, params, state, kept, *chunk)
        return self.finish(params, state, total, *given)


def compile_rows(rows: RowOptimizer, grad_fn: ClippedGradFn) -> CompiledRowStep:
    """Compiles the step of a run on kept rows; parameters and state are donated.

    Args:
        rows: from `dp_ilg.keep_rows`.
        grad_fn: from `dp_ilg.clipped_grad`.

    Returns:
        ``step(params, state, chunks, noise=None) -> (params, state)``; `chunks` is an
        iterable of (batch, is_padding_example), all of one size. One chunk is one
        compiled call. Several are held together, since all are counted before any is
        differentiated.

    Privacy: one step of the plan; the chunks must be one Poisson draw of it.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=0.1, delta=1e-5, row_budget=0.2,
        ...     num_examples=100, batch_size=10, num_steps=3)
        >>> key = jax.random.key(0)
        >>> tx = dp_ilg.dp_adam_ilg(0.1, plan, key=key)
        >>> rows = dp_ilg.keep_rows(tx, {"t": 1}, key=key)
        >>> loss = lambda p, x: jnp.sum(p["t"][x] - 1.0)
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=plan.l2_clip_norm)
        >>> step = compile_rows(rows, grad_fn)
        >>> params = {"t": jnp.zeros((9, 2))}
        >>> chunk = jnp.full((10, 3), 7), jnp.zeros(10, bool)
        >>> params, state = step(params, rows.init(params), [chunk, chunk])
        >>> jnp.flatnonzero(params["t"].any(axis=1)).tolist()
        [7]
    """

    def add(total: RowGradient | None, *given: Any) -> RowGradient:
        found = rows.gradient(grad_fn, *given)
        return found if total is None else total + found

    def count(params: Params, *chunk: Any) -> Any:
        return rows.counts(grad_fn, params, *chunk)

    return CompiledRowStep(
        jax.jit(rows.step(grad_fn), donate_argnums=(0, 1)),
        jax.jit(count),
        jax.jit(rows.kept),
        jax.jit(add),
        jax.jit(rows.update, donate_argnums=(0, 1)),
    )
