"""Data of any kind as rows: how many there are, which data they are, and their keys."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dp_ilg.sampling.gather import length, take
from dp_ilg.training.frameworks.keys import row_words as number_words

_MOST_BYTES = 4 << 30  # of one array, read as a whole
_SPREAD = 4096  # rows of what is larger, or no array
_BLOCK = 1 << 16  # rows hashed at once


class Rows:
    """Examples by position, each with its own words for a key where the loss takes one.

    Attributes:
        words: two words of a key, or None: then examples travel without.

    Example:
        >>> rows = Rows({"x": np.arange(4.0)})
        >>> len(rows), rows.rows(np.array([2, -1]))["x"].tolist()
        (4, [2.0, 0.0])
    """

    def __init__(self, data: Any):
        """Takes whatever `dp_ilg.sampling.gather.take` reads, or a `Source`."""
        self._data = data
        self._read = getattr(data, "rows", None)
        self.words: np.ndarray | None = None
        self._one_reader = threading.Lock()

    def __len__(self) -> int:
        return len(self._data) if self._read else length(self._data)

    def rows(self, indices: np.ndarray) -> Any:
        """Gathers rows; see `dp_ilg.training.sources.Source.rows`."""
        with self._one_reader:  # the feed's thread reads ahead
            if self._read is not None:
                return self._read(indices)
            return take(self._data, indices)

    def rows_at(self, step: int, indices: np.ndarray) -> Any:
        """The rows of a step: with `row_words` beside them where there are words."""
        found = self.rows(indices)
        if self.words is None:
            return found
        return found, row_words(self.words, step, indices)

    def digest(self) -> str:
        """64 hexadecimal digits that name the data; as private as they are.

        Arrays of up to 4 GiB are read as a whole. Of larger ones, and of what is no
        array, types, shapes and 4,096 rows spread over all of them decide.
        """
        found = hashlib.sha256()
        _digest_into(found, self._data, self)
        return found.hexdigest()


def row_words(words: np.ndarray, step: int, indices: np.ndarray) -> np.ndarray:
    """What the key of each row is made of: uint32 ``[rows, 5]``.

    Args:
        words: two words of the run's key for examples.
        step: which step.
        indices: int64 ``[rows]``, which examples; -1 for padding.

    Returns:
        The key's words, the step, and the row number's high and low word.

    Example:
        >>> row_words(np.array([8, 9], np.uint32), 3, np.array([2**32 + 5])).tolist()
        [[8, 9, 3, 1, 5]]
    """
    found = np.empty((len(indices), 5), np.uint32)
    found[:, :2], found[:, 2], found[:, 3:] = words, step, number_words(indices)
    return found


def _digest_into(found: Any, data: Any, rows: Rows) -> None:
    if isinstance(data, Mapping):
        for name, part in data.items():
            found.update(f"{name!r} ".encode())
            _digest_into(found, part, rows)
        return
    if isinstance(data, tuple) and not rows._read:
        found.update(f"{len(data)} ".encode())
        for part in data:
            _digest_into(found, part, rows)
        return
    named = getattr(data, "fingerprint", None) or getattr(data, "_fingerprint", None)
    if isinstance(named, str):
        found.update(named.encode())
        return
    reader = rows if rows._read else Rows(data)
    count = len(reader)
    whole = isinstance(data, np.ndarray | jax.Array) and data.nbytes <= _MOST_BYTES
    wanted = np.arange(count)
    if not whole and count > _SPREAD:
        wanted = np.linspace(0, count - 1, _SPREAD).astype(np.int64)
    found.update(f"{count} ".encode())
    for first in range(0, len(wanted), _BLOCK):
        block = reader.rows(wanted[first : first + _BLOCK])
        for path, leaf in jax.tree_util.tree_leaves_with_path(block):
            array = np.ascontiguousarray(leaf)
            name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} "
            found.update(name.encode())
            found.update(array.tobytes())
