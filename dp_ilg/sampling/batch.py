"""Batches sealed with their padding mask, and masks that were forgotten.

A draw has no fixed size, a compiled step has: what is missing is padding, which must
not count. A `SealedBatch` brings its own mask. Where examples come bare, a mask that
somebody drew and never looked at is a mask forgotten.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SealedBatch:
    """The examples of one chunk, and which of its rows are padding.

    `dp_ilg.clipped_grad` functions, lots and steps take it whole. It goes through
    ``jit``, ``device_put`` and ``jax.tree.map`` of single rows like any tree, and
    unpacks as ``examples, is_padding_example = batch`` for whoever computes by hand.

    Attributes:
        examples: arrays with a leading axis of rows; rows of padding are zeros.
        is_padding_example: bool ``[rows]``.
        rows: how many rows the chunk had; static, so that a batch that was cut,
            stacked or joined with another is found out.

    Privacy: as private as the data. Zeros are not absence: a row of padding that counts
    would tell how many were drawn.

    Example:
        >>> from dp_ilg.sampling.poisson import PoissonSampler
        >>> (chunk,) = PoissonSampler(5, 0.4, key=0, chunk_size=5).chunks(0)
        >>> batch = chunk.take({"x": np.arange(5.0)})
        >>> batch.examples["x"].shape, batch.is_padding_example.dtype
        ((5,), dtype('bool'))
        >>> batch[:2]
        Traceback (most recent call last):
        TypeError: A sealed batch of 5 rows is not cut by index, since examples that ...
    """

    examples: Any
    is_padding_example: Any
    rows: int = dataclasses.field(metadata={"static": True})

    def __iter__(self) -> Iterator[Any]:
        """The examples, then the mask."""
        return iter((self.examples, self.is_padding_example))

    def __getitem__(self, index: Any) -> Any:
        """Raises: a part of a draw is another sample than the one accounted."""
        raise TypeError(
            f"A sealed batch of {self.rows} rows is not cut by index, since examples "
            "that were drawn must count; give clipped_grad a microbatch_size=, the "
            "sampler a chunk_size=, or read batch.examples."
        )


def opened(batch: Any, mask: Any = None) -> tuple[Any, Any]:
    """The examples and the mask of a batch, sealed or bare.

    Args:
        batch: a `SealedBatch`, or examples.
        mask: the mask given beside, or None; ``False`` says that nothing is padding.

    Returns:
        Both; the mask None where there is none.

    Raises:
        ValueError: for a sealed batch that was changed, or has a second mask beside it;
            for bare examples without mask, as many as a draw with padding has whose
            mask nobody has looked at.

    Example:
        >>> opened(SealedBatch(np.ones(2), np.array([False, True]), 2))[1].tolist()
        [False, True]
        >>> opened(np.ones(2))[1] is None
        True
    """
    if not isinstance(batch, SealedBatch):
        said = isinstance(mask, bool | np.bool_) and not mask
        if mask is None or said:
            _check_not_forgotten(batch)
        return batch, None if said else mask
    if mask is not None and mask is not batch.is_padding_example:
        raise ValueError(
            "The sealed batch brings its own mask, but is_padding_example was given "
            "beside it; leave it out."
        )
    own = batch.is_padding_example
    lengths = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch.examples)}
    changed = jnp.shape(own) != (batch.rows,) or lengths != {(batch.rows,)}
    if changed or jnp.result_type(own) != np.dtype(bool):
        raise ValueError(
            f"The sealed batch was drawn with {batch.rows} rows, but arrives with a "
            f"mask of {jnp.result_type(own)}{list(jnp.shape(own))} and examples of "
            f"lengths {sorted(lengths)}; hand it over as chunk.take(data) made it."
        )
    return batch.examples, own


def examples_of(batch: Any) -> Any:
    """The examples of a batch, sealed or bare, for whoever reads shapes alone.

    Example:
        >>> examples_of(SealedBatch("examples", None, 2)), examples_of("examples")
        ('examples', 'examples')
    """
    return batch.examples if isinstance(batch, SealedBatch) else batch


class Draw:
    """A draw with padding whose mask nobody has read yet; kept as long as its chunks.

    Attributes:
        rows: of each chunk.

    Example:
        >>> draw = Draw(7)
        >>> draw.rows, draw in UNREAD, draw.read(), draw in UNREAD
        (7, True, None, False)
    """

    def __init__(self, rows: int):
        """Remembers it, weakly."""
        self.rows = rows
        UNREAD.add(self)

    def read(self) -> None:
        """Somebody has looked at the mask."""
        UNREAD.discard(self)


UNREAD: weakref.WeakSet[Draw] = weakref.WeakSet()


def _check_not_forgotten(batch: Any) -> None:
    """Raises for as many bare examples as a live draw has whose mask is unread."""
    forgotten = {draw.rows for draw in list(UNREAD)}
    if not forgotten:
        return
    leaves = jax.tree.leaves(batch)
    rows = np.shape(leaves[0])[:1] if leaves else ()
    if rows and rows[0] in forgotten:
        raise ValueError(
            f"A batch of {rows[0]} rows came without a mask, as many as a chunk of the "
            "sampler that has padding and whose mask nobody has read; take the rows "
            "with chunk.take(data), or pass "
            "is_padding_example=chunk.is_padding_example."
        )
