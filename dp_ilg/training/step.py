"""One private step as compiled functions, for plain parameters and for Flax.

The gradient is clipped in the geometry the optimizer released last, noised once and
applied; nothing of it visits the host. A Poisson draw that does not fit the compiled
size comes in several chunks, whose clipped sums add up before the one noise.
"""

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import chain
from typing import Any

import jax
import optax

from dp_ilg.base import ClippedGrad, Example, Params, PrivateTransformation
from dp_ilg.clipping.lots import lot_accumulator

Chunks = Iterable[tuple[Example, Any]]
TrainStep = Callable[..., tuple[Params, Any]]


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What `make_train_step` returns; call it as is said there.

    Attributes:
        whole: the compiled step of one chunk.
        finish: its part behind the clipped sum, compiled.
        accumulate: ``(params, geometry, chunks)`` -> the clipped sum of several chunks.
        geometry: ``tx.geometry``.
    """

    whole: Any
    finish: Any
    accumulate: Callable[..., ClippedGrad]
    geometry: Callable[[Any], Any]

    def __call__(
        self, params: Params, state: Any, chunks: Any, noise: Any = None
    ) -> Any:
        """One step; see `make_train_step`."""
        given = () if noise is None else (noise,)
        rest = iter(chunks)
        first, second = next(rest), next(rest, None)
        if second is None:
            return self.whole(params, state, *first, *given)
        lot = chain(iter([first, second]), rest)
        del first, second  # or two chunks would be held to the end of the step
        total = self.accumulate(params, self.geometry(state), lot)
        return self.finish(params, state, total, *given)


def make_train_step(
    grad_fn: Callable[..., ClippedGrad],
    tx: PrivateTransformation,
    shardings: Any = None,
) -> CompiledStep:
    """Compiles the step of a run; parameters and state are donated.

    Args:
        grad_fn: what `dp_ilg.clipped_grad` returned.
        tx: a private optimizer, such as `dp_ilg.dp_adam_ilg`.
        shardings: the `dp_ilg.training.mesh.Shardings` of a mesh of devices, where
            `grad_fn` is what ``spread`` made of it; None on one device.

    Returns:
        ``step(params, state, chunks, noise=None) -> (params, state)``; `chunks` is any
        iterable of (batch, is_padding_example) or of sealed batches (`Chunk.take`), all
        of one size, and `noise` the draws of a `dp_ilg.noise.secure.SecureNoise` or
        `ExactNoise`, on one device. One chunk, by far the most frequent case, is one
        compiled call; more take one call each and one more, and are asked for one at a
        time, so that a draw of any size takes constant memory.

    Privacy:
        That of `tx` for one step: the chunks must be one Poisson draw of its plan,
        and the step must be in the ledger before.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(0))
        >>> loss_fn = lambda params, x: jnp.square(params["w"] @ x - 1)
        >>> grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=plan.l2_clip_norm)
        >>> step = make_train_step(grad_fn, tx)
        >>> params = {"w": jnp.zeros(2)}
        >>> state = tx.init(params)
        >>> chunk = jnp.ones((3, 2)), jnp.array([False, False, True])
        >>> params, state = step(params, state, [chunk, chunk])
        >>> params["w"].shape
        (2,)
    """

    def clipped(params: Params, state: Any, batch: Example, mask: Any) -> ClippedGrad:
        geometry = tx.geometry(state)
        return grad_fn(params, batch, geometry=geometry, is_padding_example=mask)

    def finish(params: Params, state: Any, total: Any, *noise: Any) -> Any:
        given = {"noise": noise[0]} if noise else {}
        with nullcontext() if shardings is None else shardings.draws():
            updates, state = tx.update(total, state, params, **given)
        return optax.apply_updates(params, updates), state

    def whole(params: Params, state: Any, batch: Example, mask: Any, *noise: Any):
        return finish(params, state, clipped(params, state, batch, mask), *noise)

    told = shardings.jit_options() if shardings else ({}, {})
    jit_whole = jax.jit(whole, donate_argnums=(0, 1), **told[0])
    jit_finish = jax.jit(finish, donate_argnums=(0, 1), **told[1])
    return CompiledStep(jit_whole, jit_finish, lot_accumulator(grad_fn), tx.geometry)


def train_state_step(
    grad_fn: Callable[..., ClippedGrad], state: Any, batch: Example, mask: Any = None
) -> Any:
    """One private step of a linen ``TrainState``; to be jitted by the caller.

    Args:
        grad_fn: what `dp_ilg.clipped_grad` returned.
        state: a ``flax.training.train_state.TrainState`` made with a private `tx`.
        batch: the examples of the step, or a sealed batch (`Chunk.take`).
        mask: bool ``[batch]``, True for padding; None where the batch brings it.

    Returns:
        The next state.

    Privacy:
        As `make_train_step`.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> from flax.training.train_state import TrainState
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(0))
        >>> loss_fn = lambda params, x: jnp.square(params["w"] @ x - 1)
        >>> grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=plan.l2_clip_norm)
        >>> state = TrainState.create(apply_fn=None, params={"w": jnp.zeros(2)}, tx=tx)
        >>> state = train_state_step(grad_fn, state, jnp.ones((3, 2)), None)
        >>> state.step
        1
    """
    geometry = state.tx.geometry(state.opt_state)
    clipped = grad_fn(state.params, batch, geometry=geometry, is_padding_example=mask)
    return state.apply_gradients(grads=clipped)


def nnx_step(
    grad_fn: Callable[..., ClippedGrad],
    model: Any,
    optimizer: Any,
    batch: Example,
    mask: Any = None,
) -> None:
    """One private step of an ``nnx.Optimizer``, in place; ``nnx.jit`` it.

    ``Optimizer.update`` keeps only the variables of what it is given, so that a
    `ClippedGrad` would lose the geometry it was clipped in; it travels as the extra
    argument ``clipped_grad=`` instead.

    Args:
        grad_fn: what `dp_ilg.clipped_grad` returned, for a loss of pure parameters,
            ``nnx.as_pure(nnx.state(model, optimizer.wrt))``.
        model: the module that is trained.
        optimizer: an ``nnx.Optimizer`` of that module and a private `tx`.
        batch: the examples of the step, or a sealed batch (`Chunk.take`).
        mask: bool ``[batch]``, True for padding; None where the batch brings it.

    Privacy:
        As `make_train_step`.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> from flax import nnx
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> graph, _ = nnx.split(model)
        >>> tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(0))
        >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        >>> loss_fn = lambda params, x: nnx.merge(graph, params)(x)[0] ** 2
        >>> grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=plan.l2_clip_norm)
        >>> nnx_step(grad_fn, model, optimizer, jnp.ones((3, 2)), None)
        >>> int(optimizer.step[...])
        1
    """
    from flax import nnx  # here, so that a loop in plain JAX needs no Flax

    params = nnx.as_pure(nnx.state(model, optimizer.wrt))
    geometry = optimizer.tx.geometry(nnx.as_pure(optimizer.opt_state))
    clipped = grad_fn(params, batch, geometry=geometry, is_padding_example=mask)
    optimizer.update(model, nnx.state(model, optimizer.wrt), clipped_grad=clipped)
