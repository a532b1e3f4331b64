"""Out of memory as one sentence that says which micro-batch to try."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

_SIGNS = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


class OutOfMemory(ValueError):
    """A step needs more memory than there is.

    Example:
        >>> issubclass(OutOfMemory, ValueError)
        True
    """


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
        dp_ilg.experiments.memory_limits.OutOfMemory: Out of memory with a micro-batch \
of 64; try --run.microbatch-size 32 in a new run folder.
    """
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        known = isinstance(error, MemoryError) or any(s in str(error) for s in _SIGNS)
        if not known:
            raise
        raise OutOfMemory(_advice(microbatch())) from error


def _advice(size: int) -> str:
    if size > 1:
        return (
            f"Out of memory with a micro-batch of {size}; try --run.microbatch-size "
            f"{size // 2} in a new run folder."
        )
    return (
        "Out of memory even with a micro-batch of 1; use a smaller model or a machine "
        "with more memory."
    )
