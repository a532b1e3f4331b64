"""Which rows a lot holds: read once for the step, and named in the ledger.

A step may be repeated for free if it sums the same rows. Data that change when they are
read again (an augmentation drawn by the reader, an array written to) would put the same
noise on another sum, whose difference shows the rows. So the rows that were read are
part of what a step is released from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from dp_ilg.training.feeds import Feed, FeedError
from dp_ilg.training.loop.binding import Binding


class Marked(tuple):
    """A batch and its mask, with the digest of the rows they were made of.

    Attributes:
        digest: 64 hexadecimal digits; as private as the rows.

    Example:
        >>> Marked.of(("rows", "mask"), "00").digest
        '00'
    """

    digest: str

    @classmethod
    def of(cls, placed: tuple[Any, Any], digest: str) -> Marked:
        """Hangs the digest on what was placed."""
        found = cls(placed)
        found.digest = digest
        return found


def rows_digest(batch: Any) -> str:
    """64 hexadecimal digits that name the rows of a batch.

    Args:
        batch: any tree of host arrays.

    Returns:
        SHA-256 of names, types, shapes and all bytes.

    Example:
        >>> one, two = rows_digest(np.zeros(3)), rows_digest(np.zeros((3, 1)))
        >>> one == rows_digest(np.zeros(3)), one == two
        (True, False)
    """
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        array = np.ascontiguousarray(leaf)
        name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} "
        found.update(name.encode())
        found.update(array.data if array.size else b"")
    return found.hexdigest()


def marking(place: Callable[[Any], Any]) -> Callable[[Any], Marked]:
    """Places a batch, and names its rows; a feed calls it in its thread.

    Example:
        >>> len(marking(lambda batch: batch)((np.zeros(2), np.zeros(2, bool))).digest)
        64
    """
    return lambda batch: Marked.of(place(batch), rows_digest(batch))


def read_lot(feed: Feed, binding: Binding, step: int) -> tuple[Any, str]:
    """The chunks of a step, and the digest of all their rows.

    Several chunks are read twice, once for the digest, so that one is held at a time.

    Args:
        feed: whose batches are `Marked`.
        binding: of the run.
        step: which.

    Returns:
        The chunks, and 64 hexadecimal digits.

    Raises:
        FeedError: for rows that could not be read, and, as the chunks are taken, for
            rows that are others the second time.
    """
    chunks = feed.chunks(step)
    if len(chunks) == 1:
        return chunks, chunks[0].digest
    wanted = [
        rows_digest((binding.rows.rows_at(step, rows), mask))
        for rows, mask in binding.sampler.chunks(step)
    ]
    whole = hashlib.sha256(" ".join(wanted).encode()).hexdigest()
    return _unchanged(chunks, wanted, step), whole


def _unchanged(chunks: Any, wanted: list[str], step: int) -> Iterator[Any]:
    for chunk, digest in zip(chunks, wanted, strict=True):
        if chunk.digest != digest:
            raise FeedError(
                f"The rows of step {step} were others when they were read again; a "
                "repeated step would give their difference away, so data must give "
                "the same rows every time: draw augmentations by augment=."
            )
        yield chunk
