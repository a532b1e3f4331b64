"""Averages of the iterates: less noise in what is kept, at no cost in privacy."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dp_ilg import validation
from dp_ilg.base import Params, PrivateTransformation
from dp_ilg.geometry.groups import accumulator


class AverageIteratesState(NamedTuple):
    """The optimizer's own state, and the average of what it made.

    Attributes:
        inner: state of the optimizer that is wrapped.
        step: updates made.
        average: running average of the parameters, in float32 at least.
    """

    inner: Any
    step: Any
    average: Any


def average_iterates(tx: Any, decay: Any = 0.98) -> PrivateTransformation:
    """Keeps a running average of the parameters beside a private optimizer.

    Noise moves the parameters at every step; their average over the last steps moves
    less and often predicts better. The optimizer itself goes on from the parameters,
    not from the average. Read the average by `averaged_params`.

    Args:
        tx: a whole private optimizer, such as `dp_ilg.dp_adam_ilg`.
        decay: how much of the average a step keeps; in the first steps it keeps
            ``(1 + t) / (10 + t)`` where that is less, so that the start is forgotten.

    Returns:
        An Optax transformation with the same updates, ``geometry(state)``,
        ``importance(state)`` and ``metrics(state)`` as `tx`.

    Raises:
        ValueError: for a decay outside [0, 1), or an update without parameters.
        TypeError: unless `tx` is a whole private optimizer.

    Privacy: that of `tx`; averaging is post-processing of released parameters.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> tx = average_iterates(
        ...     dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(0)), 0.9)
        >>> params = {"w": jnp.zeros(2)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.ones((5, 2))}, state, params)
        >>> averaged_params(state, params)["w"].shape
        (2,)

    Reference: Polyak and Juditsky 1992; De et al. 2022, section 3 (with privacy).
    """
    validation.fraction("decay", decay, include_zero=True)
    if getattr(tx, "role", "") != "private":
        raise TypeError(
            f"average_iterates got {type(tx).__name__}, but averages what a whole "
            "private optimizer makes; pass dp_adam_ilg or a dp_ilg.chain."
        )

    def init(params: Params) -> AverageIteratesState:
        copies = jax.tree.map(lambda p: p.astype(accumulator(p.dtype)) + 0, params)
        return AverageIteratesState(tx.init(params), jnp.zeros((), jnp.int32), copies)

    def update(
        updates: Any,
        state: AverageIteratesState,
        params: Params | None = None,
        **extra: Any,
    ) -> tuple[Any, AverageIteratesState]:
        if params is None:
            raise ValueError(
                "average_iterates got no parameters; call update(grads, state, params)."
            )
        updates, inner = tx.update(updates, state.inner, params, **extra)
        time = state.step.astype(jnp.float32)
        kept = jnp.minimum(decay, (1 + time) / (10 + time))

        def moved(average: Any, param: Any, change: Any) -> Any:
            now = (param + change).astype(param.dtype).astype(average.dtype)
            return kept.astype(average.dtype) * (average - now) + now

        average = jax.tree.map(moved, state.average, params, updates)
        return updates, AverageIteratesState(inner, state.step + 1, average)

    return PrivateTransformation(
        init,
        update,
        role=tx.role,
        key=tx.key,
        plan=tx.plan,
        geometry=lambda state: tx.geometry(state.inner),
        importance=tx.importance and (lambda state: tx.importance(state.inner)),
        metrics=tx.metrics and (lambda state: tx.metrics(state.inner)),
        links=tx.links,
    )


def averaged_params(state: Any, params: Params) -> Params:
    """The average that `average_iterates` keeps, in the parameters' own types.

    Args:
        state: what `average_iterates` or any other optimizer made.
        params: the parameters, as they are now.

    Returns:
        The average; `params` themselves if `state` is not of `average_iterates`.

    Privacy: that of the updates; nothing is spent here.

    Example:
        >>> averaged_params((), {"w": 1.0})
        {'w': 1.0}
    """
    if not isinstance(state, AverageIteratesState):
        return params
    return jax.tree.map(lambda a, p: a.astype(p.dtype), state.average, params)
