"""A memory budget, and running out of memory as one sentence with the remedy."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import Params
from dp_ilg.clipping.clipped_grad import ClippedGradFn
from dp_ilg.clipping.memory import fit_microbatch
from dp_ilg.sampling.poisson import PoissonSampler

_SIGNS = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


class OutOfMemory(ValueError):
    """A step needs more memory than there is.

    Example:
        >>> issubclass(OutOfMemory, ValueError)
        True
    """


def budgeted(
    grad_fn: ClippedGradFn, params: Params, rows: Any, plan: PrivacyPlan, run: Any
) -> ClippedGradFn:
    """The same clipped gradient in micro-batches that fit ``run.memory_mib``.

    Args:
        grad_fn: what `dp_ilg.clipped_grad` returned.
        params: the parameters, or their shapes.
        rows: the training examples; only shapes are read.
        plan: says how large a batch is.
        run: the section `run` of a configuration.

    Returns:
        The function with the largest micro-batch that fits.

    Raises:
        ValueError: if one example is too much already.

    Privacy:
        Shapes alone decide.

    Example:
        >>> import dp_ilg, jax.numpy as jnp, numpy as np
        >>> from dp_ilg.experiments.config.run import RunConfig
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5,
        ...     num_examples=100, batch_size=20, num_steps=1)
        >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p))
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
        >>> found = budgeted(grad_fn, jnp.ones((9, 9)), np.ones((100, 9)), plan,
        ...     RunConfig(memory_mib=1.0))
        >>> found.microbatch_size
        44
    """
    sampler = PoissonSampler.for_plan(plan, key=0, chunk_size=run.chunk_size)
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((sampler.chunk_size, *a.shape[1:]), a.dtype),
        rows,
    )
    budget = run.memory_mib * 2**20
    size = fit_microbatch(grad_fn, params, batch, budget)
    return dataclasses.replace(grad_fn, microbatch_size=size)


def ran_out(error: BaseException) -> bool:
    """Whether an error means that there is not enough memory.

    Args:
        error: of Python, NumPy or XLA.

    Returns:
        True for a `MemoryError` and XLA's RESOURCE_EXHAUSTED.

    Example:
        >>> ran_out(MemoryError()), ran_out(ValueError("out of memory"))
        (True, False)
    """
    if isinstance(error, jax.errors.JaxRuntimeError):
        return any(sign in str(error) for sign in _SIGNS)
    return isinstance(error, MemoryError)


@contextmanager
def memory_advice(microbatch: Callable[[], int]) -> Iterator[None]:
    """Turns running out of memory into an `OutOfMemory` that says what to try.

    Args:
        microbatch: says how many examples are differentiated at once; asked only
            after a failure.

    Yields:
        Nothing.

    Raises:
        OutOfMemory: for a `MemoryError`, or XLA's RESOURCE_EXHAUSTED.

    Privacy:
        The step that failed is in the ledger and has released nothing. Another
        micro-batch rounds otherwise, so it is another run, with its own folder.

    Example:
        >>> with memory_advice(lambda: 64):
        ...     raise MemoryError
        Traceback (most recent call last):
        dp_ilg.training.memory_limits.OutOfMemory: Out of memory with a micro-batch \
of 64; try --run.microbatch-size 32, or a smaller --run.chunk-size, in a new run folder.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not ran_out(error):
            raise
        raise OutOfMemory(_advice(microbatch())) from error


def _advice(size: int) -> str:
    if size > 1:
        return (
            f"Out of memory with a micro-batch of {size}; try --run.microbatch-size "
            f"{size // 2}, or a smaller --run.chunk-size, in a new run folder."
        )
    return (
        "Out of memory even with a micro-batch of 1; use a smaller --run.chunk-size, a "
        "smaller model or a machine with more memory."
    )
