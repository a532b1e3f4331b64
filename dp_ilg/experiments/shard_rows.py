"""What a row of a shard is: names, shapes and types that files can hold."""

import re
from typing import Any, NamedTuple

import jax
import numpy as np

_NAME = re.compile(r"|[A-Za-z0-9_-][A-Za-z0-9_.-]*")


class RowShape(NamedTuple):
    """Shape and type of one row of an array.

    Example:
        >>> RowShape((2, 3), np.dtype("float32")).bytes
        24
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        """Of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def flat(batch: Any) -> dict[str, np.ndarray]:
    """Names the arrays of a batch by their places: x, or x.0 and x.1.

    Args:
        batch: arrays in dicts and tuples.

    Returns:
        The arrays by name.

    Raises:
        ValueError: for names that clash or that files cannot have.

    Example:
        >>> sorted(flat({"x": (np.ones(1), np.ones(1))}))
        ['x.0', 'x.1']
    """
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    names = [jax.tree_util.keystr(p, simple=True, separator=".") for p, _ in leaves]
    if len(set(names)) < len(names) or not all(map(_NAME.fullmatch, names)):
        raise ValueError(
            f"The arrays are called {', '.join(names)}, but files are named after "
            "them: use different names of letters, digits, '-', '_' and '.'."
        )
    return {n or "rows": np.asarray(a) for n, (_, a) in zip(names, leaves, strict=True)}


def check_block(name: str, array: np.ndarray, row: RowShape) -> None:
    """Refuses rows of another type: to convert them would change the data.

    Args:
        name: of the array.
        array: some rows of it.
        row: what the first row is.

    Raises:
        ValueError: if they differ, or are no numbers.

    Example:
        >>> check_block("x", np.ones(2), RowShape((), np.dtype(float)))
    """
    if row.dtype.kind not in "biuf" or array.dtype != row.dtype:
        raise ValueError(
            f"The rows of {name} are {row.dtype} at first and {array.dtype} later on; "
            "give all of them one type of numbers."
            if array.dtype != row.dtype
            else f"The rows of {name} are {row.dtype}; shards hold numbers only."
        )
