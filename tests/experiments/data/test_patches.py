"""Filters of photographs: by hand, image by image, and never from the images."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.data.features import with_features
from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.data.images import patches, photographs
from dp_ilg.experiments.data.images.patches import (
    PATCH_FEATURES,
    PatchFeatures,
    make_bank,
    patch_means,
    public_basis,
)

NAME = "photo_patches"
SMALL = PatchFeatures(
    filters=6, size=3, grid=2, samples=400, crops=20, width=5, norm=2.0
)


def photo(seed):
    return np.random.default_rng(seed).integers(0, 256, (64, 70, 3), np.uint8)


def images(count, side=10, seed=3):
    draws = np.random.default_rng(seed).random((count, side, side, 3))
    return draws.astype(np.float32)


@pytest.fixture
def shipped(monkeypatch):
    """Two made-up photographs in place of those of the packages."""
    given = [(photo(0), photo(1))]
    monkeypatch.setattr(patches, "photographs", lambda: given[0])
    monkeypatch.setitem(PATCH_FEATURES, NAME, SMALL)
    return given


def data(train, test):
    labels = [np.zeros(len(x), np.int32) for x in (train, test)]
    return Dataset("made up", train, labels[0], test, labels[1], 10, "Made up.")


def by_hand(bank, image):
    """Responses of one image place by place, without its mirror image."""
    places = image.shape[0] - SMALL.size + 1
    edges = [round(i * places / SMALL.grid) for i in range(SMALL.grid + 1)]
    total = np.zeros((2, SMALL.grid, SMALL.grid, SMALL.filters))
    for row in range(places):
        for column in range(places):
            square = image[row : row + SMALL.size, column : column + SMALL.size]
            flat = square.astype(np.float64).ravel()
            flat = (flat - flat.mean()) / np.sqrt(flat.var() + SMALL.contrast)
            found = flat @ bank.kernel - bank.offset
            i, j = (np.searchsorted(edges, p, "right") - 1 for p in (row, column))
            area = (edges[i + 1] - edges[i]) * (edges[j + 1] - edges[j])
            for k, sign in enumerate((1, -1)):
                excess = np.maximum(sign * found - SMALL.threshold, 0)
                total[k, i, j] += excess / area
    return total.ravel()


def test_means_are_those_of_places_counted_by_hand():
    bank = make_bank(SMALL, (photo(0),))
    x = images(2)
    found = patch_means(SMALL, bank, jnp.asarray(x))
    known = [(by_hand(bank, i) + by_hand(bank, i[:, ::-1])) / 2 for i in x]
    assert np.max(known) > 0.1
    np.testing.assert_allclose(found, known, atol=2e-5)


def test_a_power_is_taken_of_the_means_over_both_mirror_images():
    bank, x = make_bank(SMALL, (photo(0),)), images(2)
    chosen = dataclasses.replace(SMALL, power=0.5)
    found = patch_means(chosen, bank, jnp.asarray(x))
    known = [np.sqrt((by_hand(bank, i) + by_hand(bank, i[:, ::-1])) / 2) for i in x]
    assert np.max(known) > 0.3
    np.testing.assert_allclose(found, known, atol=5e-3)
    np.testing.assert_allclose(np.square(found), np.square(known), atol=2e-5)


def test_a_power_has_files_of_its_own_and_no_power_the_old_ones(shipped, tmp_path):
    x = images(3)
    old = with_features(data(x, x), NAME, tmp_path)
    assert "power" not in SMALL._tag and SMALL._tag == str(SMALL)
    PATCH_FEATURES[NAME] = dataclasses.replace(SMALL, power=0.5)  # put back by shipped
    new = with_features(data(x, x), NAME, tmp_path)
    assert new.x_train.filename != old.x_train.filename
    assert np.abs(new.x_train - old.x_train).max() > 0.05
    assert len(list(tmp_path.rglob("photo_basis*"))) == 2


def test_filters_whiten_what_they_were_made_of():
    """Responses spread as white noise through filters of length 1."""
    chosen = dataclasses.replace(SMALL, samples=4000, filters=200, ridge=1e-6)
    bank = make_bank(chosen, (photo(0),))
    sample = patches._normalised(photographs.patches((photo(0),), 4000, 3, 0), chosen)
    spread = (sample @ bank.kernel - bank.offset).std(0)
    np.testing.assert_allclose(spread, 1, atol=0.05)
    np.testing.assert_allclose(
        (sample @ bank.kernel - bank.offset).mean(0), 0, atol=0.01
    )


def test_features_are_of_one_length_and_of_their_own_image_alone(shipped, tmp_path):
    x = images(4)
    found = with_features(data(x, x[::-1].copy()), NAME, tmp_path)
    assert found.x_train.shape == (4, 5) and found.x_train.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(found.x_train, axis=1), 2.0, atol=2e-3)
    np.testing.assert_array_equal(found.x_train, found.x_test[::-1])
    assert np.abs(found.x_train[0] - found.x_train[1]).max() > 0.05
    mirrored = with_features(data(x[:, :, ::-1].copy(), x), NAME, tmp_path / "mirrored")
    np.testing.assert_allclose(mirrored.x_train, found.x_train, atol=4e-3)


def test_no_image_enters_filters_or_basis(shipped, tmp_path):
    """Other images in: the same file of the basis, byte for byte."""
    for folder, seed in (("one", 3), ("other", 4)):
        with_features(data(images(4, seed=seed), images(2)), NAME, tmp_path / folder)
    one, other = (
        {p.name: p.read_bytes() for p in (tmp_path / folder).rglob("photo_basis*")}
        for folder in ("one", "other")
    )
    assert len(one) == 1 and one == other


def test_other_photographs_are_other_features_in_another_file(shipped, tmp_path):
    x = images(4)
    one = with_features(data(x, x), NAME, tmp_path)
    again = with_features(data(x, x), NAME, tmp_path)
    assert one.x_train.filename == again.x_train.filename
    shipped[0] = (photo(0), photo(2))
    other = with_features(data(x, x), NAME, tmp_path)
    assert other.x_train.filename != one.x_train.filename
    assert np.abs(other.x_train - one.x_train).max() > 0.05


def test_a_basis_spreads_its_own_rows_as_it_says():
    rows = np.random.default_rng(0).normal(size=(30, 50)) * np.geomspace(3, 0.5, 50)
    rows = rows.astype(np.float32) + 1
    for whitening in (0.0, 0.5):
        basis = public_basis(rows, 8, whitening)
        spread = np.square(rows @ basis[:-1] - basis[-1]).mean(0)
        if whitening:
            np.testing.assert_allclose(spread, spread[0], rtol=1e-3)
        else:
            variances = np.linalg.svd(rows - rows.mean(0))[1] ** 2 / len(rows)
            np.testing.assert_allclose(spread, variances[:8], rtol=1e-3)
    np.testing.assert_allclose((rows @ basis[:-1] - basis[-1]).mean(0), 0, atol=1e-3)


@pytest.mark.parametrize("shape", [(10, 10, 1), (10, 12, 3), (5, 5, 3)])
def test_pictures_that_do_not_fit_are_refused(shipped, tmp_path, shape):
    x = np.zeros((2, *shape), np.float32)
    with pytest.raises(ValueError, match="takes square images of 3 colours and at"):
        with_features(data(x, x), NAME, tmp_path)


def test_without_the_packages_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(photographs, "FILES", (("no_such_package", "a.png"),))
    photographs.photographs.cache_clear()
    with pytest.raises(DataError, match=r"pip install \"dp_ilg\[photographs\]\""):
        photographs.photographs()
    photographs.photographs.cache_clear()


def test_crops_are_squares_of_the_photographs():
    flat = np.full((50, 64, 3), 51, np.uint8)
    found = photographs.crops((flat, flat), 5, 8, seed=0)
    np.testing.assert_allclose(found, 0.2, atol=1e-6)
    one, again, other = (photographs.crops((photo(0),), 5, 8, s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.05
