"""Gathering rows: a batch out of whatever holds examples.

What has a length and positions will do: arrays, memory maps, dicts of them, lists of
examples, and the data sets of other libraries.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

PADDING = -1


def take(source: Any, indices: Any) -> Any:
    """Gathers the rows of a chunk into one batch.

    Args:
        source: an array (NumPy, memory map, JAX), a dict or tuple of sources, or any
            object with `len` and `source[int]` (a list of examples, a Hugging Face
            `Dataset`, a Grain source); its `__getitems__(list)` is used if it has one.
        indices: integers, -1 for padding: `Chunk.indices`.

    Returns:
        The batch in NumPy arrays, in the structure of the source or of its examples,
        with a leading axis; rows of padding are zero.

    Raises:
        ValueError: for an empty source, parts of unequal length, an index out of range
            or examples that differ in shape.
        TypeError: for indices that are no integers, or a source without positions.

    Privacy:
        Zeros are not absence: pass `is_padding_example` to the gradient, too (law: zero
        is absent).

    Example:
        >>> take({"x": np.eye(3), "y": np.array([4, 5, 6])}, [2, -1])["y"].tolist()
        [6, 0]
        >>> take([("a", 1.0), ("b", 2.0)], [1])[1].tolist()
        [2.0]
    """
    wanted = np.asarray(indices)
    if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
        raise TypeError(
            f"indices must be a list of integers, not {wanted.dtype} of shape "
            f"{wanted.shape}; pass Chunk.indices."
        )
    return _take(source, wanted.astype(np.int64), length(source))


def _take(source: Any, wanted: np.ndarray, length: int) -> Any:
    if isinstance(source, Mapping):
        return {name: _take(part, wanted, length) for name, part in source.items()}
    if isinstance(source, tuple):
        return _like(source, [_take(part, wanted, length) for part in source])
    if wanted.size and not PADDING <= wanted.min() <= wanted.max() < length:
        bad = wanted[(wanted < PADDING) | (wanted >= length)][0]
        raise ValueError(
            f"index {bad} is outside a source of {length} examples; build the sampler "
            f"with num_examples={length}."
        )
    is_drawn = wanted != PADDING
    # With nobody drawn, example 0 lends its shape; none of its values is kept.
    picked = wanted[is_drawn] if is_drawn.any() else np.zeros(1, np.int64)
    return _spread(_rows(source, picked), is_drawn)


def length(source: Any) -> int:
    """Counts the rows of anything that `take` reads.

    Args:
        source: as for `take`.

    Returns:
        The common length of all its parts.

    Raises:
        ValueError: for an empty source, or parts of unequal length.
        TypeError: for a source without positions, a loader above all.

    Example:
        >>> length({"x": np.eye(3), "y": [4, 5, 6]})
        3
    """
    if isinstance(source, Mapping | tuple):
        parts = source.values() if isinstance(source, Mapping) else source
        lengths = sorted({length(part) for part in parts}) or [0]
        if len(lengths) > 1:
            raise ValueError(
                f"the source's parts hold {lengths[0]} and {lengths[-1]} examples; "
                "give every part the same number."
            )
        count = lengths[0]
    else:
        refuse_loader(source)
        try:
            count = len(source)
        except TypeError as error:
            raise TypeError(
                f"a source needs len and indexing, not so {type(source).__name__}; "
                "pass arrays, a dict of arrays or a list of examples."
            ) from error
    if not count:
        raise ValueError("the source holds no examples; pass at least one.")
    return count


def refuse_loader(source: Any) -> None:
    """Raises for what hands out batches of its own instead of examples by position.

    Args:
        source: anything; a ``torch.utils.data.DataLoader``, a ``grain.DataLoader``, a
            ``tf.data.Dataset`` or an iterator is a loader.

    Raises:
        TypeError: for a loader, with what to give instead.

    Privacy: a loader shuffles and cuts batches of one size, or says nothing of how it
        draws. "Shuffled epochs, accounted as Poisson samples" claims an epsilon that
        nobody has proven, and that is too small.

    Example:
        >>> refuse_loader(np.eye(3))
        >>> refuse_loader(iter([np.eye(3)]))
        Traceback (most recent call last):
        TypeError: list_iterator hands out batches in an order and of a size of its ...
    """
    if hasattr(source, "__getitem__") or hasattr(source, "__getitems__"):
        return
    if hasattr(source, "__iter__") or hasattr(source, "__next__"):
        inner = getattr(source, "dataset", None)
        told = "its dataset (loader.dataset)" if inner is not None else "what it reads"
        raise TypeError(
            f"{type(source).__name__} hands out batches in an order and of a size of "
            "its own, which is no Poisson sample, so that no plan's epsilon holds for "
            f"them; pass {told}, an object with len and source[int], from which the "
            "plan's sampler draws."
        )


def _rows(source: Any, picked: np.ndarray) -> Any:
    """Returns the picked examples, stacked; `picked` is never empty."""
    if hasattr(source, "iloc"):  # pandas would look labels up, not positions
        raise TypeError(
            f"{type(source).__name__} is indexed by label; pass its to_numpy() instead."
        )
    if hasattr(source, "shape") and hasattr(source, "dtype"):
        return np.asarray(source[picked])
    if hasattr(source, "__getitems__"):
        return _stack(source.__getitems__(picked.tolist()))
    return _stack([source[i] for i in picked.tolist()])


def _stack(examples: Sequence[Any]) -> Any:
    """Stacks examples leaf by leaf; a list inside an example is one array."""
    first = examples[0]
    if isinstance(first, Mapping):
        return {name: _stack([e[name] for e in examples]) for name in first}
    if isinstance(first, tuple):
        return _like(first, [_stack(part) for part in zip(*examples, strict=True)])
    arrays = [np.asarray(example) for example in examples]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(
            f"examples have shapes {shapes[0]} and {shapes[-1]}; "
            "pad or crop them to one shape."
        )
    return np.stack(arrays)


def _spread(rows: Any, is_drawn: np.ndarray) -> Any:
    """Puts the rows where somebody was drawn and zeros elsewhere."""

    def spread(leaf: np.ndarray) -> np.ndarray:
        full = np.zeros((len(is_drawn), *leaf.shape[1:]), leaf.dtype)
        full[is_drawn] = leaf[: is_drawn.sum()]
        return full

    return jax.tree.map(spread, rows)


def _like(example: tuple[Any, ...], parts: list[Any]) -> tuple[Any, ...]:
    """Returns the parts as a tuple of the example's own type."""
    return type(example)(*parts) if hasattr(example, "_fields") else tuple(parts)
