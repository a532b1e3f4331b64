"""What a row of a shard is: names, shapes and types that files can hold, and pixels."""

import re
from typing import Any, NamedTuple

import jax
import numpy as np

from dp_ilg.experiments.data.files import DataError

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

    Rows that are not finite would be absent from every step, as an error of the one
    who writes them; training must not tell, so it is told here, and not which.

    Args:
        name: of the array.
        array: some rows of it.
        row: what the first row is.

    Raises:
        ValueError: if they differ, or are no numbers.
        DataError: if some are not finite.

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
    check_finite(name, array)


def check_finite(name: str, array: Any) -> None:
    """Refuses rows that are not finite, without saying which.

    Args:
        name: of the array.
        array: rows of it; anything with a dtype that NumPy can read.

    Raises:
        DataError: if some are NaN or infinite.

    Privacy:
        For who writes the data, not for a training step: there such rows are absent
        and nobody is told.

    Example:
        >>> check_finite("x", np.array([1.0, np.nan]))
        Traceback (most recent call last):
        dp_ilg.experiments.data.files.DataError: Some rows of x are not finite; ...
    """
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(
            f"Some rows of {name} are not finite; leave them out or fill them in."
        )


class Pixels:
    """Images of bytes as float32 in [0, 1] with a channel axis, a few at a time.

    The same numbers as those of images that are loaded into memory.

    Attributes:
        shape: ``(rows, height, width, channels)``.
        dtype: float32.

    Example:
        >>> pixels = Pixels(np.full((3, 2, 2), 51, np.uint8))
        >>> pixels[np.array([1])].shape, float(pixels[:1].max())
        ((1, 2, 2, 1), 0.2...)
    """

    dtype = np.dtype(np.float32)

    def __init__(self, images: Any):
        """Takes uint8 images with three or four axes; reads none."""
        self._images = images
        self.shape = (*images.shape, 1) if len(images.shape) == 3 else images.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return 4

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        return unit_interval(np.asarray(self._images[rows]))

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)

    def content_digest(self) -> str:
        """That of the bytes, see `ShardedArray.content_digest`."""
        return self._images.content_digest()


def unit_interval(images: np.ndarray) -> np.ndarray:
    """Bytes as numbers from 0 to 1.

    Args:
        images: uint8[N, height, width] or uint8[N, height, width, channels].

    Returns:
        float32[N, height, width, channels], divided by 255.

    Example:
        >>> unit_interval(np.full((1, 2, 2), 255, np.uint8)).max()
        np.float32(1.0)
    """
    scaled = images.astype(np.float32)
    scaled /= 255
    return scaled if scaled.ndim == 4 else scaled[..., None]
