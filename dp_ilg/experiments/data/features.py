"""Fixed features of images or texts in their place, computed once and kept on disk.

A row of `FEATURES` is a function of one batch of images that learns nothing, a row of
`TEXT_FEATURES` one of texts, with public weights from elsewhere. What it
makes of a data set is stored under a digest of pixels and row, so that the runs of a
sweep share it, as a file that is mapped rather than read.
"""

import contextlib
import dataclasses
import hashlib
import os
import tempfile
import time
import zlib
from collections import ChainMap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.data.own.features import outside_features
from dp_ilg.experiments.data.scattering import (
    NUM_COEFFICIENTS,
    photo_features,
    scattering_features,
)
from dp_ilg.experiments.data.text_features import TEXT_FEATURES, text_chunks
from dp_ilg.experiments.data.word_counts import public_order, word_counts
from dp_ilg.registry.lookup import resolve, table

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

RAW = "raw"
COUNTS = "word_counts"  # of texts, which are no images
PUBLIC = "public_words"  # ids by a public list
EVEN = "standardized"  # of images, which stay images
CACHE_VARIABLE = "DP_ILG_CACHE"
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
_DTYPE = np.dtype(np.float16)  # normalised features: rounding moves them by 5e-4
_CHUNK_PIXELS = 50_000  # what fits a processor's cache on its way through
_CHECKSUM_BYTES = 4
_LEAST_CONTRAST = 0.1  # added to an image's own, so that an empty one stays empty
_DRAFT_SECONDS = 86_400  # nobody writes for a day


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
            "public_words_scaled" scales those of the public list; "word_vectors" and
            "sentence_encoder" have weights that come inside packages of their own.
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
    )


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
    return dataclasses.replace(data, x_train=x_train, x_test=x_test, note=note)


def _even(images: Any) -> np.ndarray:
    pixels = (1, 2, 3)
    centred = images - np.mean(images, axis=pixels, keepdims=True)
    contrast = np.std(centred, axis=pixels, keepdims=True)
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


_TABLES: list[Any] = [FEATURES, _QUICK, TEXT_FEATURES]
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
        _kept(
            np.asarray(x),
            _Kind(name, f"{row.tag} {words}", row.width),
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


def cache_folder() -> Path:
    """Where features are kept.

    Returns:
        The folder that the environment variable DP_ILG_CACHE names, else ``dp_ilg`` in
        the user's cache folder.

    Privacy:
        What is kept there is as private as the data it was computed from.

    Example:
        >>> cache_folder().name != ""
        True
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dp_ilg"


class _Kind(NamedTuple):
    """Which features: their name, what decides them, how many there are."""

    name: str
    tag: str
    width: int


def _features(images: Any, name: str, folder: Path) -> np.ndarray:
    compute, tag = FEATURES[name]
    width = jax.eval_shape(compute, images[:1]).shape[1]
    kind = _Kind(name, tag, width)
    return _kept(images, kind, lambda: _chunks(images, name), folder)


def _kept(inputs: Any, kind: _Kind, chunks: Callable, folder: Path) -> np.ndarray:
    """Mapped from the cache; computed first if it is not there whole."""
    path = folder / f"{kind.name}-{_digest(inputs, kind.tag)}.npy"
    shape = (len(inputs), kind.width)
    found = _read(path, shape)
    if found is not None:
        return found
    try:
        with _alone(folder):
            found = _read(path, shape)  # another run may have been there first
            if found is None:
                _write(path, shape, chunks())
    except OSError:  # no room, no right: then without
        return np.concatenate([np.empty((0, kind.width), _DTYPE), *chunks()])
    found = found if found is not None else _read(path, shape)
    if found is None:
        raise OSError(f"The file {path} cannot be read back; check its disk.")
    return found


def _digest(inputs: np.ndarray, tag: str) -> str:
    digest = hashlib.sha256()
    digest.update(f"{tag} {inputs.dtype} {inputs.shape} ".encode())
    for part in inputs:
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()[:32]


def _chunks(images: np.ndarray, name: str) -> Iterator[np.ndarray]:
    """Features of a few images at a time; one shape, so compiled once."""
    compute = jax.jit(FEATURES[name][0])
    size = max(1, _CHUNK_PIXELS // int(np.prod(images.shape[1:])))
    for begin in range(0, len(images), size):
        rows = images[begin : begin + size]
        missing = ((0, size - len(rows)), (0, 0), (0, 0), (0, 0))
        found = np.asarray(compute(np.pad(rows, missing)))
        yield found[: len(rows)].astype(_DTYPE)


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The file as a map, or None if it is not exactly what was written."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.memmap) or found.dtype != _DTYPE:
            return None
        end = found.offset + found.nbytes
        with path.open("rb") as file:
            file.seek(end)
            checksum = file.read()
    except (OSError, ValueError, EOFError):
        return None
    fits = found.shape == shape and checksum == _checksum(found)
    return found if fits else None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other run computes features: two would do the same work."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a disk without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(path: Path, shape: tuple[int, int], chunks: Iterator[np.ndarray]) -> None:
    """Under another name first: a run that is killed leaves no half file behind."""
    _clear_drafts(path.parent)
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".draft")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            header = {"descr": _DTYPE.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            checksum = 0
            for chunk in chunks:
                content = chunk.astype(_DTYPE).tobytes()
                checksum = zlib.crc32(content, checksum)
                file.write(content)
            file.write(checksum.to_bytes(_CHECKSUM_BYTES, "little"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def _clear_drafts(folder: Path) -> None:
    """Removes what runs that were killed left behind."""
    for draft in folder.glob("*.draft"):
        with contextlib.suppress(OSError):  # another run was faster
            if time.time() - draft.stat().st_mtime > _DRAFT_SECONDS:
                draft.unlink()


def _checksum(found: np.ndarray) -> bytes:
    checksum = 0
    for part in np.array_split(found, max(1, found.nbytes >> 24)):
        checksum = zlib.crc32(np.ascontiguousarray(part).data, checksum)
    return checksum.to_bytes(_CHECKSUM_BYTES, "little")
