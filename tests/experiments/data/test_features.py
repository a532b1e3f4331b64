"""Features in place of pixels: cached, mapped, private files, refusals."""

import dataclasses
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from dp_ilg.experiments.config.schema import Config, DataConfig
from dp_ilg.experiments.data import features
from dp_ilg.experiments.data.datasets import Dataset, load_dataset
from dp_ilg.experiments.data.features import FEATURES, cache_folder, with_features
from dp_ilg.experiments.data.images.scattering import scattering_features
from dp_ilg.experiments.runs.job import load_data


@pytest.fixture
def digits():
    whole = load_dataset("digits")
    parts = dict(x_train=whole.x_train[:20], y_train=whole.y_train[:20])
    return dataclasses.replace(
        whole, **parts, x_test=whole.x_test[:7], y_test=whole.y_test[:7]
    )


@pytest.fixture
def counted(monkeypatch):
    """A cheap row, and a list that grows with every array it is computed for."""
    calls = []
    compute = features._chunks

    def chunks(images, name):
        calls.append(len(images))
        return compute(images, name)

    double = lambda images: images.reshape(len(images), -1) * 2.0  # noqa: E731
    monkeypatch.setitem(FEATURES, "double", (double, "double"))
    monkeypatch.setattr(features, "_chunks", chunks)
    monkeypatch.setattr(features, "_CHUNK_PIXELS", 8 * 64)
    return calls


def only_files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_scattering_is_computed_image_by_image(digits, tmp_path):
    found = with_features(digits, "scattering", tmp_path)
    known = scattering_features(jnp.asarray(digits.x_train))
    assert np.shape(found.x_test) == (7, 324)
    assert np.asarray(found.x_train).dtype == np.float16
    np.testing.assert_allclose(found.x_train, known, atol=4e-3)  # float16, up to 4
    assert found.y_train is digits.y_train
    assert "fixed scattering features" in found.note


def test_a_second_call_maps_the_file(digits, tmp_path, counted):
    first = with_features(digits, "double", tmp_path)
    second = with_features(digits, "double", tmp_path)
    assert counted == [20, 7]
    assert isinstance(second.x_train, np.memmap) and not second.x_train.flags.writeable
    np.testing.assert_array_equal(second.x_train, first.x_train)
    np.testing.assert_array_equal(
        second.x_train, (2 * digits.x_train.reshape(20, -1)).astype(np.float16)
    )


def test_other_pixels_have_a_file_of_their_own(digits, tmp_path, counted):
    with_features(digits, "double", tmp_path)
    x = digits.x_train.copy()
    x[3, 1, 1] += 0.25
    found = with_features(dataclasses.replace(digits, x_train=x), "double", tmp_path)
    assert len(only_files(tmp_path)) == 3
    assert (found.x_train[3] != 2 * digits.x_train[3].ravel()).sum() == 1


def test_files_are_the_owners(digits, tmp_path, counted):
    folder = tmp_path / "new"
    with_features(digits, "double", folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_runs_at_once_compute_once(digits, tmp_path, counted):
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(with_features, digits, "double", tmp_path) for _ in range(2)
        ]
    first, second = (np.asarray(run.result().x_train) for run in runs)
    np.testing.assert_array_equal(first, second)
    assert sorted(counted) == [7, 20]


def garbage(content):
    return b"garbage" * 9


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGE = {
    "empty": lambda content: b"",
    "garbage": garbage,
    "cut": lambda content: content[:-100],
    "without its checksum": lambda content: content[:-4],
    "longer": lambda content: content + b"x",
    "a flipped bit": flipped,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_computed_again(damage, digits, tmp_path, counted):
    known = np.array(with_features(digits, "double", tmp_path).x_train)
    for path in tmp_path.iterdir():
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    found = with_features(digits, "double", tmp_path)
    np.testing.assert_array_equal(found.x_train, known)
    assert counted == [20, 7] * 2
    assert len(only_files(tmp_path)) == 2


def test_a_run_that_dies_leaves_nothing_that_is_believed(digits, tmp_path, counted):
    def dies(images):
        raise KeyboardInterrupt

    row = FEATURES["double"]
    FEATURES["double"] = (
        lambda x: row[0](x) if len(x) == 1 else dies(x),
        "double",
    )
    with pytest.raises(KeyboardInterrupt):
        with_features(digits, "double", tmp_path)
    assert only_files(tmp_path) == []
    (tmp_path / "killed.draft").write_bytes(b"half")
    os.utime(tmp_path / "killed.draft", (0, time.time() - 100_000))
    FEATURES["double"] = row
    with_features(digits, "double", tmp_path)
    assert not (tmp_path / "killed.draft").exists()


def test_a_folder_that_cannot_be_made_is_done_without(digits, tmp_path, counted):
    (tmp_path / "file").write_text("")
    found = with_features(digits, "double", tmp_path / "file" / "cache")
    assert np.shape(found.x_train) == (20, 64) and not isinstance(
        found.x_train, np.memmap
    )


def test_the_environment_chooses_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DP_ILG_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"
    monkeypatch.delenv("DP_ILG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dp_ilg"


def test_raw_is_nothing_at_all(digits, tmp_path):
    assert with_features(digits, "raw", tmp_path) is digits
    assert only_files(tmp_path) == []


def test_unknown_features_are_refused_before_data_is_looked_for():
    config = Config(data=DataConfig(name="mnist", features="scatering"))
    with pytest.raises(
        ValueError, match="'scatering', which .*did you mean scattering"
    ):
        load_data(config)


@pytest.mark.parametrize("kind", ["texts", "table"])
def test_features_of_what_is_no_image_are_refused(kind, tmp_path):
    ids = np.ones((4, 6), np.uint16)
    x = ids if kind == "texts" else (ids.astype(np.int32), ids.astype(np.float32))
    data = Dataset("words", x, ids[:, 0], x, ids[:, 0], num_classes=2, note="")
    with pytest.raises(ValueError, match="made of images, but words has none; set"):
        with_features(data, "scattering", tmp_path)


def test_images_of_another_size_are_refused(digits, tmp_path):
    odd = dataclasses.replace(digits, x_train=digits.x_train[:, :7, :7])
    with pytest.raises(ValueError, match="not 7 x 7; pad or crop"):
        with_features(odd, "scattering", tmp_path)


def test_standardized_images_are_images_of_their_own(digits):
    found = with_features(digits, "standardized")
    assert found.x_train.shape == digits.x_train.shape and found.map_shape is None
    image = digits.x_train[3].astype(np.float64)
    expected = (image - image.mean()) / (image.std() + 0.1)
    np.testing.assert_allclose(found.x_train[3], expected, rtol=1e-4, atol=1e-6)
    assert found.x_train.dtype == np.float32
    others = dataclasses.replace(digits, x_train=digits.x_train[3:4])
    np.testing.assert_array_equal(
        with_features(others, "standardized").x_train[0], found.x_train[3]
    )
    blank = dataclasses.replace(digits, x_test=np.ones((2, 8, 8, 1), np.float32))
    assert (with_features(blank, "standardized").x_test == 0).all()  # nothing seen
    assert "own mean and contrast" in found.note
    texts = dataclasses.replace(digits, x_train=digits.x_train[:, 0, :, 0])
    with pytest.raises(ValueError, match="is made of images, but digits has none"):
        with_features(texts, "standardized")
