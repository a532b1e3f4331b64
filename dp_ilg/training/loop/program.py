"""The compiled step of a run, and the digest of all that decides what it releases."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from dp_ilg.base import Params, PrivateTransformation
from dp_ilg.clipping.clipped_grad import ClippedGradFn, clipped_grad
from dp_ilg.clipping.memory import fit_microbatch
from dp_ilg.noise.exact import nothing
from dp_ilg.optimizers.kept_rows.compiled import CompiledRowStep, compile_rows
from dp_ilg.optimizers.kept_rows.stages import RowOptimizer
from dp_ilg.training.loop.losses import KeyedLoss, with_row_words, without_key
from dp_ilg.training.loop.state import Counted
from dp_ilg.training.memory_limits import OutOfMemory, ran_out
from dp_ilg.training.mesh import Shardings, spread
from dp_ilg.training.step import CompiledStep, make_train_step

_ADDRESS = re.compile(r"0x[0-9a-f]+")


class CountedRows(NamedTuple):
    """A compiled step on kept rows, for a state that is `Counted`."""

    rows: CompiledRowStep

    def __call__(self, params: Params, state: Counted, chunks: Any, _: Any = None):
        """One step, of draws that the device makes."""
        params, inner = self.rows(params, state.inner, chunks)
        return params, Counted(inner, state.step + 1)


class Program(NamedTuple):
    """The step of a run, for its data.

    Attributes:
        step: compiled, for a state that is `Counted`.
        grad_fn: the clipped gradient in it, before it is spread over a mesh.
        digest: of the compiled step's program and its constants.
    """

    step: CompiledStep | CountedRows
    grad_fn: ClippedGradFn
    digest: str


def counted(tx: PrivateTransformation) -> PrivateTransformation:
    """A private optimizer whose state counts its steps.

    Args:
        tx: a whole private optimizer.

    Returns:
        The same with a state that is `Counted`.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5,
        ...     num_examples=100, batch_size=10, num_steps=5)
        >>> tx = counted(dp_ilg.dp_adam_ilg(0.1, plan, key=jax.random.key(0)))
        >>> int(tx.init({"w": jnp.zeros(2)}).step)
        0
    """

    def init(params: Params) -> Counted:
        return Counted(tx.init(params), jax.numpy.zeros((), jax.numpy.int32))

    def update(updates: Any, state: Counted, params: Any = None, **extra: Any) -> Any:
        updates, inner = tx.update(updates, state.inner, params, **extra)
        return updates, Counted(inner, state.step + 1)

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


def gradient_of(recipe: Any, loss: KeyedLoss, random: bool) -> ClippedGradFn:
    """The clipped gradient of a run.

    Args:
        recipe: of the run.
        loss: of parameters, example and key.
        random: whether the loss reads its key, so that batches bring row words.

    Returns:
        What `dp_ilg.clipped_grad` returns.
    """
    return clipped_grad(
        with_row_words(loss) if random else without_key(loss),
        l2_clip_norm=recipe.plan.l2_clip_norm,
        **recipe.clip_facts(),
    )


def build_program(
    recipe: Any,
    tx: PrivateTransformation | RowOptimizer,
    loss: KeyedLoss,
    state: tuple[Params, Counted],
    chunk: tuple[Any, Any],
) -> Program:
    """Compiles nothing yet, but traces the step once, for its digest.

    Args:
        recipe: the `dp_ilg.training.loop.recipe.Recipe` of the run.
        tx: its optimizer, not `counted`.
        loss: of parameters, example and key.
        state: parameters and counted state, as the step takes them.
        chunk: a batch, with row words if the loss reads a key, and its mask.

    Returns:
        The `Program`.
    """
    grad_fn = clipped_of(recipe, loss)
    if recipe.memory_mib is not None:
        grad_fn = _within(grad_fn, recipe, state[0], chunk[0])
    shardings, on_devices = None, grad_fn
    if recipe.mesh is not None:
        shardings = Shardings.of(*state, recipe.mesh)
        on_devices = spread(grad_fn, recipe.mesh)
    if isinstance(tx, RowOptimizer):
        rows = compile_rows(tx, grad_fn)
        traced = rows.whole.trace(state[0], state[1].inner, *chunk)
        return Program(CountedRows(rows), grad_fn, jaxpr_digest(traced.jaxpr))
    step = make_train_step(on_devices, counted(tx), shardings)
    given = (nothing(state[0], tx.geometry(state[1].inner)),) if recipe.exact else ()
    traced = step.whole.trace(*state, *chunk, *given)
    return Program(step, grad_fn, jaxpr_digest(traced.jaxpr))


def clipped_of(recipe: Any, loss: KeyedLoss) -> ClippedGradFn:
    """The clipped gradient of a run, before any memory budget.

    Args:
        recipe: of the run.
        loss: of parameters, example and key.

    Returns:
        A function of batches with row words beside the rows where the loss is random.
    """
    return clipped_grad(
        with_row_words(loss) if recipe.random else without_key(loss),
        l2_clip_norm=recipe.plan.l2_clip_norm,
        **recipe.clip_facts(),
    )


@contextlib.contextmanager
def told_of_memory(program: Program) -> Iterator[None]:
    """Turns running out of memory into a sentence that says what to ask for.

    Args:
        program: of the run.

    Yields:
        Nothing.

    Raises:
        OutOfMemory: for a `MemoryError`, or XLA's RESOURCE_EXHAUSTED.

    Privacy:
        The step that failed was charged and has released nothing.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not ran_out(error):
            raise
        size = program.grad_fn.microbatch_size
        smaller = f"microbatch_size={size // 2}" if size and size > 1 else "memory_mib="
        raise OutOfMemory(
            f"The step does not fit into memory; make private_training with {smaller}, "
            "or a smaller chunk_size, and begin a new run."
        ) from error


def jaxpr_digest(closed: Any) -> str:
    """64 hexadecimal digits that name a traced program, its constants included.

    Args:
        closed: a ``ClosedJaxpr``.

    Returns:
        SHA-256 of the program's text, without addresses, and of every constant in it.

    Example:
        >>> one, two, three = (
        ...     jax.make_jaxpr(lambda x, k=k: x * k)(1.0) for k in (2.0, 2.0, 3.0))
        >>> jaxpr_digest(one) == jaxpr_digest(two) != jaxpr_digest(three)
        True
    """
    found = hashlib.sha256(_ADDRESS.sub("", str(closed.jaxpr)).encode())
    for value in _constants(closed):
        if jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.ascontiguousarray(value)
        found.update(f" {array.dtype} {array.shape} ".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _constants(closed: Any) -> Iterator[Any]:
    """The constants of a program, and of every program within it."""
    yield from getattr(closed, "consts", ())
    jaxpr = getattr(closed, "jaxpr", closed)
    for equation in jaxpr.eqns:
        is_program = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")  # noqa: E731
        values = jax.tree.leaves(list(equation.params.values()), is_leaf=is_program)
        for value in values:
            if is_program(value):
                yield from _constants(value)


def _within(grad_fn: ClippedGradFn, recipe: Any, params: Params, batch: Any) -> Any:
    """The same in the largest micro-batch whose temporary memory fits the budget."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if recipe.mesh is not None:
        rows //= recipe.mesh.size
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype), batch
    )
    budget = recipe.memory_mib * 2**20
    size = fit_microbatch(grad_fn, params, shapes, budget, recipe.layers)
    return dataclasses.replace(grad_fn, microbatch_size=size)
