"""Fixed features of images or texts in their place, computed once and kept on disk.

A row of `FEATURES` is a function of one batch of images that learns nothing, a row of
`PATCH_FEATURES` looks at photographs that ship in packages first, a row of
`TEXT_FEATURES` is one of texts, with public weights from elsewhere. What it
makes of a data set is stored under a digest of pixels and row, so that the runs of a
sweep share it, as a file that is mapped rather than read.
"""

import dataclasses
import hashlib
from collections import ChainMap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dp_ilg.experiments.data.container import Dataset, MadeOf
from dp_ilg.experiments.data.images.patches import PATCH_FEATURES
from dp_ilg.experiments.data.images.scattering import (
    NUM_COEFFICIENTS,
    photo_features,
    scattering_features,
)
from dp_ilg.experiments.data.kept import DTYPE, Kind, cache_folder, kept
from dp_ilg.experiments.data.own.features import outside_features
from dp_ilg.experiments.data.text_features import TEXT_FEATURES, text_chunks
from dp_ilg.experiments.data.word_counts import public_order, word_counts
from dp_ilg.registry.lookup import resolve, table

RAW = "raw"
COUNTS = "word_counts"  # of texts, which are no images
PUBLIC = "public_words"  # ids by a public list
EVEN = "standardized"  # of images, which stay images
# name -> images [batch, height, width, channels] to features [batch, k]; a change of
# what a row computes needs a new name in the digest: its second entry
FEATURES: dict[str, tuple[Callable[[Array], Array], str]] = {
    RAW: (lambda images: images, ""),
    "scattering": (scattering_features, "scattering J2 L8 groups 27 float16"),
    "photo_scattering": (
        photo_features,
        "opponent mirrored scattering J2 L8 groups 27 float16",
    ),
}
_CHANNELS = {
    "scattering": NUM_COEFFICIENTS,
    "photo_scattering": NUM_COEFFICIENTS,
}  # feature maps of one colour
_CHUNK_PIXELS = 50_000  # what fits a processor's cache on its way through
_LEAST_CONTRAST = 0.1  # added to an image's own, so that an empty one stays empty


def with_features(data: Dataset, name: str, cache: Path | None = None) -> Dataset:
    """Replaces images by a row of `FEATURES`, texts by counts or `TEXT_FEATURES`.

    Args:
        data: images, float32[N, height, width, channels], or token ids.
        name: the row, or a function from outside, see `outside_features`; "raw"
            leaves the data as they are, "standardized" takes its own mean off each
            image and divides by its standard deviation (plus 0.1);
            "word_counts" is for texts, "public_words" numbers their words by a public
            list, "public_words_counts" counts those; "scaled_words_4000" scales the
            most frequent words by their rank, "even_words_4000" does not,
            "words_and_vectors_4000" and "toned_words_4000" add what public weights and
            a public lexicon know of them, "public_words_scaled" scales those of the
            public list; "photo_patches" is for colour images, its filters come from
            photographs; "word_vectors" and "sentence_encoder" have weights that come
            inside packages of their own.
        cache: the folder for results; by default `cache_folder()`. One that cannot be
            written to is done without.

    Returns:
        The data set with float16[N, features] inputs, mapped from files where possible,
        float32 images or uint8[N, tokens] counts, and a note that says what was done.

    Raises:
        ValueError: for an unknown row, data that are no images (or no texts with one
            label), images of a shape the row cannot take, or a package that is absent.

    Privacy:
        Row i is a function of image i alone and of public constants, so the guarantee
        for features is the guarantee for images and costs nothing. The files hold the
        data in another form: they are made readable by their owner only.

    Example:
        >>> import tempfile
        >>> from dp_ilg.experiments.data.datasets import load_dataset
        >>> folder = Path(tempfile.mkdtemp())
        >>> with_features(load_dataset("digits"), "scattering", folder).x_train.shape
        (1437, 324)
    """
    found = resolve("features", name, FEATURE_ROWS, "data.features")
    if name not in FEATURE_ROWS:
        return outside_features(data, name, found)
    if name == RAW:
        return data
    if name in _QUICK:
        return _QUICK[name](data)
    if name in TEXT_FEATURES:
        return _encoded(data, name, cache or cache_folder())
    _check_images(data, name)
    folder = cache or cache_folder()
    x_train, x_test = (_features(x, name, folder) for x in (data.x_train, data.x_test))
    note = f"{data.note} Inputs are fixed {name} features, each of its own image alone."
    maps = _CHANNELS.get(name, 0) * data.x_train.shape[-1]
    return dataclasses.replace(
        data,
        x_train=x_train,
        x_test=x_test,
        note=note,
        map_shape=(maps, x_train.shape[1] // maps) if maps else None,
        made_of=_made_of(data, FEATURES[name][0]) if name in FEATURES else None,
    )


def _made_of(images: Dataset, compute: Callable[[Any], Any]) -> MadeOf:
    return MadeOf(images.x_train.shape[1:], images.x_train.dtype, compute)


def feature_names() -> tuple[str, ...]:
    """What ``data.features`` may be.

    Example:
        >>> feature_names()[:4]
        ('raw', 'scattering', 'photo_scattering', 'word_counts')
    """
    return tuple(name for rows in _TABLES for name in rows)


def _counted(data: Dataset) -> Dataset:
    _check_texts(data, COUNTS)
    texts = (data.x_train, data.x_test)
    x_train, x_test = (word_counts(np.asarray(x), data.num_tokens) for x in texts)
    note = f"{data.note} Inputs are counts of words, their order is not used."
    return dataclasses.replace(data, x_train=x_train, x_test=x_test, note=note)


def _standardized(data: Dataset) -> Dataset:
    _check_images(data, EVEN)
    x_train, x_test = (_even(x) for x in (data.x_train, data.x_test))
    note = f"{data.note} Each image is centred and scaled by its own mean and contrast."
    made_of = _made_of(data, partial(_even, xp=jnp))
    return dataclasses.replace(
        data, x_train=x_train, x_test=x_test, note=note, made_of=made_of
    )


def _even(images: Any, xp: Any = np) -> Any:
    pixels = (1, 2, 3)
    centred = images - xp.mean(images, axis=pixels, keepdims=True)
    contrast = xp.std(centred, axis=pixels, keepdims=True)
    return (centred / (contrast + _LEAST_CONTRAST)).astype(np.float32)


# too quick to be kept on disk
_QUICK: dict[str, Callable[[Dataset], Dataset]] = {
    COUNTS: _counted,
    EVEN: _standardized,
    PUBLIC: public_order,
    f"{PUBLIC}_counts": lambda data: _counted(public_order(data)),
    f"{PUBLIC}_scaled": lambda data: _encoded(
        public_order(data), "scaled_words_4000", cache_folder()
    ),
}


_TABLES: list[Any] = [FEATURES, _QUICK, TEXT_FEATURES, PATCH_FEATURES]
FEATURE_ROWS = table("features", ChainMap(*_TABLES))


def _check_images(data: Dataset, name: str) -> None:
    if not isinstance(data.x_train, np.ndarray) or data.x_train.ndim != 4:
        raise ValueError(
            f"data.features is {name!r}, which is made of images, but {data.name} has "
            f"none; set data.features to {RAW!r}."
        )


def _encoded(data: Dataset, name: str, folder: Path) -> Dataset:
    """Texts as public vectors; ids and vocabulary are not needed any more."""
    _check_texts(data, name)
    if not data.words:
        raise ValueError(
            f"data.features is {name!r}, which needs the words themselves, but the "
            f"file of {data.name} has no vocab; add it, or choose {COUNTS!r}."
        )
    row = TEXT_FEATURES[name]
    words = hashlib.sha256("\n".join(data.words).encode()).hexdigest()
    x_train, x_test = (
        kept(
            np.asarray(x),
            Kind(name, f"{row.tag} {words}", row.width),
            lambda x=x: text_chunks(name, np.asarray(x), data.words),
            folder,
        )
        for x in (data.x_train, data.x_test)
    )
    note = f"{data.note} Inputs are public {name} of each text alone."
    vectors = dict(x_train=x_train, x_test=x_test, num_tokens=0, words=())
    return dataclasses.replace(data, note=note, **vectors)


def _check_texts(data: Dataset, name: str) -> None:
    if not data.num_tokens or data.y_train.ndim != 1:
        raise ValueError(
            f"data.features is {name!r}, which is made of texts with one label, but "
            f"{data.name} has none; set data.features to {RAW!r}."
        )


def _features(images: Any, name: str, folder: Path) -> np.ndarray:
    if name in PATCH_FEATURES:
        return PATCH_FEATURES[name].of(images, name, folder)
    compute, tag = FEATURES[name]
    width = jax.eval_shape(compute, images[:1]).shape[1]
    kind = Kind(name, tag, width)
    return kept(images, kind, lambda: _chunks(images, name), folder)


def _chunks(images: np.ndarray, name: str) -> Iterator[np.ndarray]:
    """Features of a few images at a time; one shape, so compiled once."""
    compute = jax.jit(FEATURES[name][0])
    size = max(1, _CHUNK_PIXELS // int(np.prod(images.shape[1:])))
    for begin in range(0, len(images), size):
        rows = images[begin : begin + size]
        missing = ((0, size - len(rows)), (0, 0), (0, 0), (0, 0))
        found = np.asarray(compute(np.pad(rows, missing)))
        yield found[: len(rows)].astype(DTYPE)
