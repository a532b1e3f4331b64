"""Loaders: real data as it is, damaged data as one sentence."""

import gzip
import io
import os
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import sklearn.datasets

from dp_ilg.experiments.data import container
from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.data.datasets import LOADERS, load_dataset
from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.data.tabular import adult, flights
from dp_ilg.sampling.gather import take

REAL = Path(os.environ.get("DP_ILG_DATA", Path(__file__).parents[4] / "shared/data"))
needs_real_data = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"no real data: {REAL} is no folder (set DP_ILG_DATA)"
)


@pytest.fixture(autouse=True)
def _no_system_data(monkeypatch, tmp_path):
    monkeypatch.setattr(container, "_SYSTEM_FOLDER", tmp_path / "no system data")


@pytest.fixture
def offline(monkeypatch):
    """OpenML as seen without a network."""

    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", refuse)
    for module in (adult, flights):
        monkeypatch.setattr(module, "_PACKAGE", "no_such_package")


def savez(path: Path, arrays: dict[str, Any]) -> None:
    """Writes the arrays that are not None."""
    np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


def fails(*args) -> str:
    """Returns the message of `load_dataset`, which must be one sentence."""
    with pytest.raises(DataError) as caught:
        load_dataset(*args)
    text = str(caught.value)
    assert text.endswith(".") and ". " not in text and "\n" not in text, text
    return text


def check_whole(dataset: Dataset) -> None:
    """What every loader promises of its result."""
    for x, y in (
        (dataset.x_train, dataset.y_train),
        (dataset.x_test, dataset.y_test),
    ):
        for part in x if isinstance(x, tuple) else (x,):
            assert len(part) == len(y) > 0
            if part.dtype.kind == "f":
                assert part.dtype == np.float32 and np.isfinite(part).all()
        assert y.dtype == np.int32 and y.ndim == 1
        assert 0 <= y.min() and y.max() < dataset.num_classes
    assert dataset.note.endswith(".")
    batch = take((dataset.x_train, dataset.y_train), [0, -1])
    assert batch[1].tolist() == [dataset.y_train[0], 0]


# ------------------------------------------------------------------ real data


def test_digits():
    digits = load_dataset("digits")
    check_whole(digits)
    assert isinstance(digits.x_train, np.ndarray)
    assert isinstance(digits.x_test, np.ndarray)
    assert digits.x_train.shape == (1437, 8, 8, 1)
    assert len(digits.y_test) == 360
    assert digits.x_train.min() == 0 and digits.x_train.max() == 1
    bundled: Any = sklearn.datasets.load_digits()
    assert np.array_equal(digits.x_test[0, ..., 0] * 16, bundled.images[0])
    assert digits.y_test.tolist() == bundled.target[::5].tolist()


def test_digits_can_be_learned():
    """Inputs and labels belong together: class means alone classify the test part."""
    digits = load_dataset("digits")
    assert isinstance(digits.x_train, np.ndarray)
    means = [digits.x_train[digits.y_train == c].mean(axis=0) for c in range(10)]
    gaps = np.asarray(digits.x_test)[:, None] - np.stack(means)
    guesses = (gaps**2).sum(axis=(2, 3, 4)).argmin(axis=1)
    assert (guesses == digits.y_test).mean() > 0.85


@needs_real_data
@pytest.mark.parametrize(
    ("name", "shape", "num_test"),
    [
        ("mnist", (60_000, 28, 28, 1), 10_000),
        ("imdb", (25_000, 256), 25_000),
        pytest.param("cifar10", (50_000, 32, 32, 3), 10_000, marks=pytest.mark.slow),
    ],
)
def test_real_files(name, shape, num_test):
    if not (REAL / f"{name}.npz").is_file():
        pytest.skip(f"{REAL} has no {name}.npz")
    dataset = load_dataset(name, REAL)
    check_whole(dataset)
    assert isinstance(dataset.x_train, np.ndarray)
    assert dataset.x_train.shape == shape
    assert len(dataset.y_test) == num_test
    if name == "imdb":
        assert dataset.num_tokens == 10_000 and "not covered" in dataset.note
        assert dataset.x_train.max() == 9999
    else:
        assert dataset.x_train.max() == 1 and "Nothing is computed" in dataset.note


def test_fashion_mnist_as_debian_installs_it(monkeypatch):
    folder = Path("/usr/share/datasets")
    if not (folder / "fashion-mnist").is_dir():
        pytest.skip(f"{folder} has no fashion-mnist")
    monkeypatch.setattr(container, "_SYSTEM_FOLDER", folder)
    dataset = load_dataset("fashion_mnist")
    check_whole(dataset)
    assert np.shape(dataset.x_train) == (60_000, 28, 28, 1)
    assert np.bincount(dataset.y_train).tolist() == [6000] * 10


# --------------------------------------------------------------- small files

IMAGES = np.arange(8 * 28 * 28).reshape(8, 28, 28).astype(np.uint8)
LABELS = np.arange(8, dtype=np.uint8)
MNIST: dict[str, Any] = {
    "x_train": IMAGES,
    "y_train": LABELS,
    "x_test": IMAGES[:3],
    "y_test": LABELS[:3],
}
IMDB: dict[str, Any] = {
    "x_train": np.array([[1, 5, 9999], [1, 2, 0]], np.uint16),
    "y_train": np.array([0, 1]),
    "x_test": np.array([[1, 3, 0]], np.uint16),
    "y_test": np.array([1]),
}


def idx(array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def write_idx(folder: Path, dash="-", suffix="-ubyte", packed=False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        for name, array in (
            (f"{prefix}-images{dash}idx3{suffix}", MNIST[f"x_{part}"]),
            (f"{prefix}-labels{dash}idx1{suffix}", MNIST[f"y_{part}"]),
        ):
            content = idx(array)
            if packed:
                name, content = f"{name}.gz", gzip.compress(content)
            (folder / name).write_bytes(content)


def check_small_mnist(dataset):
    check_whole(dataset)
    assert np.array_equal(dataset.x_train[..., 0], IMAGES.astype(np.float32) / 255)
    assert dataset.y_test.tolist() == [0, 1, 2]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("folder", ["", "mnist"])
def test_npz(tmp_path, save, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    save(tmp_path / folder / "mnist.npz", **MNIST)
    check_small_mnist(load_dataset("mnist", tmp_path))
    check_small_mnist(load_dataset("mnist", str(tmp_path)))


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
@pytest.mark.parametrize("folder", ["", "NAME", "DASHED"])
@pytest.mark.parametrize("dash", ["-", "."])
@pytest.mark.parametrize("suffix", ["-ubyte", ""])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path, name, folder, dash, suffix, packed):
    names = {"NAME": name, "DASHED": name.replace("_", "-")}
    write_idx(tmp_path / names.get(folder, ""), dash, suffix, packed)
    dataset = load_dataset(name, tmp_path)
    check_small_mnist(dataset)
    assert str(tmp_path) in dataset.note


def test_npz_comes_before_idx(tmp_path):
    write_idx(tmp_path)
    savez(tmp_path / "mnist.npz", MNIST | {"x_train": IMAGES * 0})
    assert not np.any(load_dataset("mnist", tmp_path).x_train)


def test_imdb_npz(tmp_path):
    np.savez(tmp_path / "imdb.npz", **IMDB)
    imdb = load_dataset("imdb", tmp_path)
    check_whole(imdb)
    assert isinstance(imdb.x_train, np.ndarray) and imdb.x_train.dtype == np.uint16
    assert imdb.num_tokens == 10_000 and imdb.num_classes == 2


# --------------------------------------------------------------------- absent


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", sorted({*LOADERS} - {"digits", "python_docs"}))
@pytest.mark.parametrize("given_folder", [False, True])
def test_absent_data_says_where_to_get_it(tmp_path, name, given_folder):
    text = fails(name, tmp_path if given_folder else None)
    assert "--data-dir" in text and "get " in text and name in text
    assert (str(tmp_path) in text) == given_folder


def test_unknown_name_and_absent_folder():
    assert "digits, mnist" in fails("minst")
    assert "/nonexistent" in fails("mnist", "/nonexistent")


def test_without_scikit_learn(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert "dp_ilg[experiments]" in fails("digits")


def test_one_idx_file_missing(tmp_path):
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    assert "lacks t10k-labels-idx1-ubyte" in fails("mnist", tmp_path)


# ------------------------------------------------------------- damaged arrays


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mnist", {"x_train": IMAGES[:, :, :5]}, "x_train"),
        ("mnist", {"x_train": IMAGES / 255}, "float64"),
        ("mnist", {"x_train": np.full((8, 28, 28), np.nan)}, "float64"),
        ("mnist", {"x_train": np.uint8(3)}, "x_train"),
        ("mnist", {"x_train": IMAGES[:0], "y_train": LABELS[:0]}, "at least one"),
        ("mnist", {"y_train": LABELS[:5]}, "each of 8 examples"),
        ("mnist", {"y_train": LABELS + 3}, "3 to 10"),
        ("mnist", {"y_test": np.array([0, 1, -1])}, "-1 to 1"),
        ("mnist", {"y_train": LABELS.astype(float)}, "y_train"),
        ("mnist", {"y_train": np.eye(8, dtype=np.uint8)}, "y_train"),
        ("mnist", {"y_train": np.array(list(range(8)), object)}, "pickled"),
        ("mnist", {"y_train": np.zeros(8, [("a", "u1")])}, "neither numbers"),
        ("mnist", {"x_test": None}, "no array 'x_test'"),
        ("imdb", {"x_train": np.full((2, 3), 10_000, np.uint16)}, "token 10000"),
        ("imdb", {"x_train": np.zeros((2, 3), np.int64)}, "uint16"),
        ("imdb", {"x_train": np.zeros(2, np.uint16)}, "x_train"),
        ("imdb", {"x_test": np.zeros((1, 4), np.uint16)}, "x_test"),
        ("imdb", {"y_train": np.array([0, 2])}, "0 to 2"),
    ],
)
def test_bad_arrays(tmp_path, name, changes, words):
    arrays = {"mnist": MNIST, "imdb": IMDB}[name] | changes
    path = tmp_path / f"{name}.npz"
    savez(path, arrays)
    text = fails(name, tmp_path)
    assert words in text and str(path) in text


def test_files_that_are_no_npz(tmp_path):
    path = tmp_path / "mnist.npz"
    np.savez(path, **MNIST)
    whole = path.read_bytes()
    npy = io.BytesIO()
    np.save(npy, IMAGES)
    for content in (b"", whole[:-30], whole[: len(whole) // 2], npy.getvalue()):
        path.write_bytes(content)
        assert str(path) in fails("mnist", tmp_path)


def test_pickles_are_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    path = tmp_path / "mnist.npz"
    path.write_bytes(pickle.dumps(Trap()))
    fails("mnist", tmp_path)
    savez(path, MNIST | {"x_train": np.array([Trap()], object)})
    assert "pickled" in fails("mnist", tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_wrong_shape_in_idx(tmp_path):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx(IMAGES[:, :20]))
    assert "[8, 20, 28]" in fails("mnist", tmp_path)


# --------------------------------------------------------------------- OpenML


def _pixels_bunch(num_rows=14, **changes):
    pixels = np.tile(np.arange(784.0) % 256, (num_rows, 1))
    target = np.array([str(i % 10) for i in range(num_rows)], object)
    return SimpleNamespace(**({"data": pixels, "target": target} | changes))


@pytest.mark.parametrize(
    ("name", "openml_name"),
    [("mnist", "mnist_784"), ("fashion_mnist", "Fashion-MNIST")],
)
def test_images_from_openml(monkeypatch, tmp_path, name, openml_name):
    def fetch(asked, *, version, as_frame, parser, **_):
        assert (asked, version, as_frame) == (openml_name, 1, False)
        return _pixels_bunch()

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    dataset = load_dataset(name, tmp_path)
    check_whole(dataset)
    assert np.shape(dataset.x_train) == (12, 28, 28, 1)
    assert dataset.y_test.tolist() == [2, 3]
    assert np.asarray(dataset.x_train).max() == 1 and "OpenML" in dataset.note


@pytest.mark.parametrize(
    "changes",
    [
        {"data": np.zeros((14, 783))},
        {"data": np.full((14, 784), np.nan)},
        {"data": np.full((14, 784), 256.0)},
        {"data": np.full((14, 784), 0.5)},
        {"target": np.array(["shoe"] * 14, object)},
    ],
)
def test_strange_images_from_openml(monkeypatch, changes):
    monkeypatch.setattr(
        sklearn.datasets, "fetch_openml", lambda *_, **__: _pixels_bunch(**changes)
    )
    assert "OpenML" in fails("mnist")
