"""Synthetic examples: noise that has the outline of images or texts, and no data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dp_ilg.base import Example
from dp_ilg.geometry.priors import zipf
from dp_ilg.registry.lookup import resolve, table

LENGTH = 200
"""Words of a made-up text that is given as the words it has."""


class Public(NamedTuple):
    """Public facts that a generator may need.

    Attributes:
        classes: how many labels there are, or None.
        tokens: how many ids there are, or None.
    """

    classes: int | None = None
    tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Generator:
    """A row of `GENERATORS`: made-up inputs of the shape of the real ones.

    Attributes:
        name: its key.
        fits: whether it can fill an array of this shape and dtype.
        fill: ``(key, shape, dtype, public) -> array``; the first axis is the batch.
        words: what it fills, for errors.
    """

    name: str
    fits: Callable[[Any], bool]
    fill: Callable[[Any, tuple[int, ...], Any, Public], Array]
    words: str

    def __call__(
        self, key: Any, shape: tuple[int, ...], dtype: Any, public: Public
    ) -> Array:
        """Fills an array."""
        return self.fill(key, shape, dtype, public)


def pink_images(key: Any, shape: tuple[int, ...], dtype: Any, public: Public) -> Array:
    """Noise whose amplitude falls as 1 / frequency, as that of photographs does.

    Over the first two axes of an example (of one axis for signals), each channel by
    itself; every image has mean 1/2 and standard deviation 1/4, cut to [0, 1].

    Args:
        key: public randomness.
        shape: ``[batch, height, width, ...]`` or ``[batch, length]``.
        dtype: of floats.
        public: not read.

    Returns:
        The images.

    Example:
        >>> found = pink_images(jax.random.key(0), (2, 8, 8, 1), jnp.float32, Public())
        >>> found.shape, bool((found >= 0).all() & (found <= 1).all())
        ((2, 8, 8, 1), True)

    Reference: Field 1987 (spectra of natural images).
    """
    del public
    axes = tuple(range(1, min(len(shape), 3)))
    grids = np.meshgrid(*[np.fft.fftfreq(shape[a]) for a in axes], indexing="ij")
    radius = np.sqrt(sum(np.square(g) for g in grids))
    fall = np.where(radius > 0, 1 / np.where(radius > 0, radius, 1), 0)
    fall = fall.reshape(1, *fall.shape, *[1] * (len(shape) - 1 - len(axes)))
    white = jax.random.truncated_normal(key, -5.0, 5.0, shape, jnp.float32)
    pink = jnp.fft.ifftn(jnp.fft.fftn(white, axes=axes) * fall, axes=axes).real
    rest = tuple(range(1, len(shape)))
    spread = jnp.std(pink, axis=rest, keepdims=True)
    pink = pink / jnp.where(spread > 0, spread, 1)
    return jnp.clip(0.5 + 0.25 * pink, 0, 1).astype(dtype)


def gaussian(key: Any, shape: tuple[int, ...], dtype: Any, public: Public) -> Array:
    """Independent entries of mean 0 and variance 1, cut at 5.

    Args:
        key: public randomness.
        shape: of the batch.
        dtype: of floats.
        public: not read.

    Returns:
        The entries.

    Example:
        >>> gaussian(jax.random.key(0), (2, 3), jnp.float32, Public()).shape
        (2, 3)
    """
    del public
    return jax.random.truncated_normal(key, -5.0, 5.0, shape, jnp.float32).astype(dtype)


def zipf_tokens(key: Any, shape: tuple[int, ...], dtype: Any, public: Public) -> Array:
    """Ids drawn by Zipf's law: id k in proportion to 1 / (k + 1).

    Args:
        key: public randomness.
        shape: ``[batch, length]``.
        dtype: of whole numbers.
        public: how many ids there are.

    Returns:
        The ids.

    Raises:
        ValueError: where nobody says how many ids there are.

    Example:
        >>> found = zipf_tokens(jax.random.key(0), (2, 5), jnp.int32, Public(tokens=9))
        >>> found.shape, bool((found < 9).all())
        ((2, 5), True)

    Reference: Zipf 1949.
    """
    if public.tokens is None:
        raise ValueError(
            "zipf_tokens does not know how many ids there are; give the probe "
            "num_tokens=, a public fact."
        )
    below = jnp.asarray(np.cumsum(zipf(public.tokens)), jnp.float32)
    drawn = jnp.searchsorted(below, jax.random.uniform(key, shape))
    return jnp.minimum(drawn, public.tokens - 1).astype(dtype)


def zipf_words(key: Any, shape: tuple[int, ...], dtype: Any, public: Public) -> Array:
    """Which words a text of 200 words by Zipf's law has: 1 or 0, rows of length 1.

    Args:
        key: public randomness.
        shape: ``[batch, words]``, columns sorted by how common they are.
        dtype: of floats or whole numbers, which stay 0 and 1.
        public: not read.

    Returns:
        The rows.

    Example:
        >>> found = zipf_words(jax.random.key(0), (2, 50), jnp.float32, Public())
        >>> [round(float(x), 4) for x in jnp.linalg.norm(found, axis=1)]
        [1.0, 1.0]
    """
    del public
    there = -np.expm1(LENGTH * np.log1p(-np.minimum(zipf(shape[-1]), 1 - 1e-9)))
    found = jax.random.uniform(key, shape) < jnp.asarray(there, jnp.float32)
    if not jnp.issubdtype(dtype, jnp.floating):
        return found.astype(dtype)
    found = found.astype(jnp.float32)
    length = jnp.linalg.norm(found, axis=-1, keepdims=True)
    return (found / jnp.maximum(length, 1)).astype(dtype)


def _floats(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating) and len(leaf.shape) > 0


def _row(leaf: Any) -> bool:
    return len(leaf.shape) == 1


def _any(leaf: Any) -> bool:
    return True


def _whole(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.integer) and len(leaf.shape) > 0


_ROWS = {
    "pink_images": Generator("pink_images", _floats, pink_images, "floats with axes"),
    "gaussian": Generator("gaussian", _floats, gaussian, "floats with axes"),
    "zipf_tokens": Generator("zipf_tokens", _whole, zipf_tokens, "rows of ids"),
    "zipf_words": Generator("zipf_words", _row, zipf_words, "one number a word"),
}


def fitting(key: Any, shape: tuple[int, ...], dtype: Any, public: Public) -> Array:
    """By the row that an array calls for.

    "zipf_words" where its only axis is as long as there are tokens, else "zipf_tokens"
    for whole numbers, "pink_images" for floats with two axes or more and "gaussian" for
    the others.

    Args:
        key: public randomness.
        shape: of the batch.
        dtype: of its entries.
        public: facts.

    Returns:
        The batch.

    Example:
        >>> found = fitting(jax.random.key(0), (2, 5), jnp.int32, Public(tokens=9))
        >>> found.dtype == jnp.int32
        True
    """
    name = "pink_images" if len(shape) > 2 else "gaussian"
    if not jnp.issubdtype(dtype, jnp.floating):
        name = "zipf_tokens"
    if shape[1:] == (public.tokens,):
        name = "zipf_words"
    return _ROWS[name](key, shape, dtype, public)


GENERATORS: Mapping[str, Generator] = table(
    "generator", _ROWS | {"auto": Generator("auto", _any, fitting, "any input")}
)


def as_generator(name: Any) -> Generator:
    """The row of a name.

    Args:
        name: a row, an entry point of ``dp_ilg.generators``, ``package.module:name`` or
            ``./file.py:name`` of a function ``(key, shape, dtype, public) -> array``.

    Returns:
        The row.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> as_generator("auto").name
        'auto'
    """
    found = resolve("generator", name, GENERATORS, "batch")
    if isinstance(found, Generator):
        return found
    return Generator(name, _any, found, "any input")


def made_up(row: Generator, example: Any, size: int, public: Public) -> Callable:
    """A function that makes batches by a row, and labels at random.

    Leaves of an example that have no axes are labels: whole numbers are drawn evenly
    below `Public.classes`, bools evenly, floats from a normal law. The others are
    filled by the row.

    Args:
        row: of `GENERATORS`.
        example: shapes and dtypes of ONE example.
        size: examples of a batch.
        public: facts.

    Returns:
        key -> batch.

    Raises:
        ValueError: for an example that the row cannot fill, or labels whose number
            nobody says.

    Example:
        >>> example = jax.ShapeDtypeStruct((4,), jnp.float32), jnp.int32(0)
        >>> make = made_up(GENERATORS["gaussian"], example, 3, Public(classes=2))
        >>> [leaf.shape for leaf in make(jax.random.key(0))]
        [(3, 4), (3,)]
    """
    shapes = [shape_of(leaf) for leaf in jax.tree.leaves(example)]
    for leaf in shapes:
        if leaf.shape and not row.fits(leaf):
            raise ValueError(
                f"The generator {row.name} fills {row.words}, but the example has "
                f"{leaf.dtype} of shape {leaf.shape}; take another of "
                f"{sorted(GENERATORS)}, or a function key -> batch of your own."
            )
        if not leaf.shape and jnp.issubdtype(leaf.dtype, jnp.integer):
            _check_classes(public)

    def make(key: Any) -> Example:
        keys = jax.random.split(key, len(shapes))
        filled = [
            row(k, (size, *leaf.shape), leaf.dtype, public)
            if leaf.shape
            else _labels(k, size, leaf.dtype, public)
            for k, leaf in zip(keys, shapes, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(example), filled)

    return make


def shape_of(leaf: Any) -> Any:
    """Shape and dtype of an array, a number or what stands for one.

    Example:
        >>> shape_of(np.zeros(3, np.float32)).shape
        (3,)
    """
    dtype = getattr(leaf, "dtype", None) or jnp.asarray(leaf).dtype
    return jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.canonicalize_dtype(dtype))


def _check_classes(public: Public) -> None:
    if public.classes is None:
        raise ValueError(
            "The example has a whole number for a label, and the probe does not know "
            "how many there are; give it num_classes=, a public fact."
        )


def _labels(key: Any, size: int, dtype: Any, public: Public) -> Array:
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.random.randint(key, (size,), 0, public.classes or 1).astype(dtype)
    if jnp.issubdtype(dtype, jnp.bool_):
        return jax.random.bernoulli(key, shape=(size,))
    return gaussian(key, (size,), dtype, public)
