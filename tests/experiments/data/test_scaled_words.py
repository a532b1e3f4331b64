"""Scaled words: against loops, alone of each text, and from ranks only."""

import dataclasses

import numpy as np
import pytest

from dp_ilg.experiments.data import word_counts
from dp_ilg.experiments.data.datasets import Dataset
from dp_ilg.experiments.data.features import with_features
from dp_ilg.experiments.data.text_features import TEXT_FEATURES
from dp_ilg.experiments.data.words.scaled import (
    ROW_LENGTH,
    STOP_WORDS,
    even,
    log_rank,
    scaled_words,
)

WORDS = ("<pad>", "<start>", "<oov>", *(f"w{rank}" for rank in range(1, 30)))


def texts(count, length=12, seed=0):
    ids = np.random.default_rng(seed).integers(1, len(WORDS), (count, length))
    ids[:, length // 2 :] *= np.random.default_rng(1).integers(0, 2, (count, 1))
    return ids.astype(np.uint16)


def by_hand(text, most, scale):
    """Word by word, in float64."""
    row = np.zeros(most)
    for rank in range(1, most + 1):
        row[rank - 1] = np.sqrt(np.sum(text == rank + 2)) * scale(rank)
    return ROW_LENGTH * row / max(np.linalg.norm(row), 1e-6)


@pytest.mark.parametrize(
    "scale, one",
    [(log_rank, lambda r: np.log(1 + r / STOP_WORDS)), (even, lambda r: 1)],
)
@pytest.mark.parametrize("most", [7, 29, 40])
def test_rows_are_those_of_a_loop(scale, one, most):
    ids = texts(9)
    found = scaled_words(ids, WORDS, most, scale)
    for text, row in zip(ids, found, strict=True):
        np.testing.assert_allclose(row, by_hand(text, most, one), atol=1e-5)


def test_a_row_is_as_long_as_any_other_and_marks_are_no_words():
    found = scaled_words(texts(9), WORDS, 29)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), ROW_LENGTH, rtol=1e-5)
    assert not scaled_words(np.array([[0, 1, 2, 2]]), WORDS, 29).any()


def test_a_row_is_of_its_own_text_alone():
    one, other = texts(6), texts(6, seed=5)
    other[2] = one[2]
    here, there = (scaled_words(ids, WORDS, 29)[2] for ids in (one, other))
    np.testing.assert_array_equal(here, there)


def dataset():
    y = np.arange(8, dtype=np.int32) % 2
    parts = (texts(8), y, texts(4, seed=2), y[:4])
    return Dataset("t", *parts, 2, "", num_tokens=len(WORDS), words=WORDS)


def test_features_are_a_row_of_the_table_and_kept(tmp_path):
    found = with_features(dataset(), "even_words_4000", tmp_path)
    assert found.x_train.shape == (8, 4000) and found.num_tokens == 0
    np.testing.assert_allclose(
        found.x_train, scaled_words(texts(8), WORDS, 4000, even), rtol=2e-3
    )
    assert len(list(tmp_path.glob("even_words_4000-*.npy"))) == 2


def test_rows_that_differ_have_tags_that_differ():
    tags = [row.tag for row in TEXT_FEATURES.values()]
    assert len({*tags}) == len(tags)


def test_ranks_of_a_public_list_do_not_follow_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DP_ILG_CACHE", str(tmp_path))
    monkeypatch.setattr(word_counts, "_public_words", lambda: ["w9", "w1"])
    data = dataset()
    found = with_features(data, "public_words_scaled").x_train
    for text, row in zip(data.x_train, found, strict=True):
        assert (row[0] > 0) == bool(np.any(text == 11))
        assert (row[1] > 0) == bool(np.any(text == 3))
        assert not row[2:].any()


def test_texts_without_their_words_are_refused(tmp_path):
    bare = dataclasses.replace(dataset(), words=())
    with pytest.raises(ValueError, match="needs the words themselves"):
        with_features(bare, "scaled_words_4000", tmp_path)
