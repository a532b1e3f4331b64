"""Steps of several chunks for Flax: a linen ``TrainState`` and an ``nnx.Optimizer``.

A Poisson draw may not fit the compiled size, and then comes in several chunks. These
are `make_train_step` for who keeps parameters in Flax's own objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dp_ilg.base import ClippedGrad, PrivateTransformation
from dp_ilg.training.step import make_train_step


def make_train_state_step(
    grad_fn: Callable[..., ClippedGrad], tx: PrivateTransformation
) -> Callable[..., Any]:
    """Compiles the step of a linen ``TrainState``, of one chunk or many.

    Args:
        grad_fn: what `dp_ilg.clipped_grad` returned.
        tx: the private optimizer that the state was made with.

    Returns:
        ``step(state, chunks, noise=None) -> state``, where `chunks` are sealed batches
        (`Chunk.take`) or pairs (batch, is_padding_example). The state that is given is
        used up: its arrays are overwritten.

    Raises:
        ValueError: from the step, for a state made with another optimizer.

    Privacy:
        As `dp_ilg.training.step.make_train_step`.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp
        >>> from flax.training.train_state import TrainState
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(0))
        >>> loss_fn = lambda params, x: jnp.square(params["w"] @ x - 1)
        >>> grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=plan.l2_clip_norm)
        >>> state = TrainState.create(apply_fn=None, params={"w": jnp.zeros(2)}, tx=tx)
        >>> chunk = jnp.ones((3, 2)), jnp.array([False, False, True])
        >>> int(make_train_state_step(grad_fn, tx)(state, [chunk, chunk]).step)
        1
    """
    compiled = make_train_step(grad_fn, tx)

    def step(state: Any, chunks: Any, noise: Any = None) -> Any:
        if state.tx is not tx:
            raise ValueError(
                "The TrainState was made with another optimizer than the step; give "
                "both the same tx."
            )
        params, opt_state = compiled(state.params, state.opt_state, chunks, noise)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    return step


def make_nnx_step(
    grad_fn: Callable[..., ClippedGrad], model: Any, optimizer: Any
) -> Callable[..., None]:
    """Compiles the step of an ``nnx.Optimizer``, in place, of one chunk or many.

    Args:
        grad_fn: what `dp_ilg.clipped_grad` returned, for a loss of pure parameters,
            ``nnx.as_pure(nnx.state(model, optimizer.wrt))``.
        model: the module that is trained.
        optimizer: an ``nnx.Optimizer`` of that module and a private `tx`.

    Returns:
        ``step(chunks, noise=None)``, where `chunks` are as in `make_train_state_step`.
        It is compiled already: call it outside of ``nnx.jit``.

    Privacy:
        As `dp_ilg.training.step.make_train_step`.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> graph, _ = nnx.split(model)
        >>> tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(0))
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> loss_fn = lambda params, x: nnx.merge(graph, params)(x)[0] ** 2
        >>> grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=plan.l2_clip_norm)
        >>> chunk = jnp.ones((3, 2)), jnp.array([False, False, True])
        >>> make_nnx_step(grad_fn, model, optimizer)([chunk, chunk])
        >>> int(optimizer.step[...])
        1
    """
    from flax import nnx  # here, so that a loop in plain JAX needs no Flax

    compiled = make_train_step(grad_fn, optimizer.tx)

    def step(chunks: Any, noise: Any = None) -> None:
        params = nnx.as_pure(nnx.state(model, optimizer.wrt))
        state = nnx.as_pure(optimizer.opt_state)
        params, state = compiled(params, state, chunks, noise)
        nnx.update(model, params)
        nnx.update(optimizer.opt_state, nnx.state(state))
        optimizer.step[...] += 1

    return step
