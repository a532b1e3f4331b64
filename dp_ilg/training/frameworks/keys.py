"""Keys of examples: a function of the key, the step and the number of the example.

A step that is repeated after a crash must release the same numbers, so dropout and
augmentation may not depend on an example's place in the batch or on how often a step
ran. They depend on these three and on nothing else.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def example_key(key: Any, step: Any, row: Any) -> Any:
    """The key of one example at one step.

    ``fold_in`` four times: the step, then the two words of the row number. A loop with
    keys of its own gets the same ones by these lines.

    Args:
        key: a PRNG key used for nothing else, secret.
        step: number of the step, at least 0; traced or not.
        row: number of the example in the data, as the two words of `row_words`, uint32
            ``[2]``, or an integer of at most 32 bits; traced or not.

    Returns:
        One typed key.

    Privacy: random numbers that are drawn apart from the data; they change no claim.

    Example:
        >>> key = jax.random.key(0)
        >>> one = example_key(key, 3, row_words(np.array([7]))[0])
        >>> bool(one == example_key(key, 3, 7)), bool(one == example_key(key, 4, 7))
        (True, False)
    """
    words = jax.numpy.asarray(row)
    if words.ndim == 0:
        words = jax.numpy.stack([jax.numpy.zeros_like(words), words])
    at_step = jax.random.fold_in(key, step)
    return jax.random.fold_in(jax.random.fold_in(at_step, words[0]), words[1])


def example_keys(key: Any, step: Any, rows: Any) -> Any:
    """`example_key` of every row of a batch.

    Args:
        key: as for `example_key`.
        step: as for `example_key`.
        rows: the words of the rows, uint32 ``[batch, 2]``, or integers ``[batch]``.

    Returns:
        Typed keys, ``[batch]``.

    Privacy: as `example_key`.

    Example:
        >>> example_keys(jax.random.key(0), 0, row_words([5, 2**40, -1])).shape
        (3,)
    """
    return jax.vmap(lambda row: example_key(key, step, row))(jax.numpy.asarray(rows))


def row_words(rows: Any) -> np.ndarray:
    """Row numbers of 64 bits as two words each, which any device computes with.

    Args:
        rows: integers ``[batch]``; -1 is padding.

    Returns:
        uint32 ``[batch, 2]``, the high word first.

    Raises:
        TypeError: for anything but whole numbers.

    Example:
        >>> row_words([1, 2**32]).tolist()
        [[0, 1], [1, 0]]
    """
    rows = np.asarray(rows)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise TypeError(
            f"rows has dtype {rows.dtype} and shape {rows.shape}, but must be a list "
            "of whole numbers; pass Chunk.indices."
        )
    wide = rows.astype(np.int64).view(np.uint64)
    words = [(wide >> np.uint64(32)), wide & np.uint64(0xFFFFFFFF)]
    return np.stack(words, axis=-1).astype(np.uint32)
