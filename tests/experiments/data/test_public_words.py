"""Scaled words with public vectors beside them, or a public lexicon's tone in them."""

import numpy as np
import pytest

from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.data.words import public
from dp_ilg.experiments.data.words.public import SHARE, TONE, toned, with_vectors
from dp_ilg.experiments.data.words.scaled import ROW_LENGTH, log_rank, scaled_words

WORDS = ("<pad>", "<start>", "<oov>", *(f"w{i}" for i in range(30)))
MOST = 20
TABLE = np.random.default_rng(7).normal(size=(len(WORDS), 4)).astype(np.float32)


def vectors(words):
    assert words == WORDS
    return TABLE


def texts(count, seed=0):
    return np.random.default_rng(seed).integers(0, len(WORDS), (count, 12))


def test_vectors_stand_beside_the_words_at_one_length():
    ids = texts(8)
    found, rows = with_vectors(ids, WORDS, MOST, vectors), scaled_words(ids, WORDS, 20)
    assert found.shape == (8, MOST + 4) and found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), ROW_LENGTH, rtol=1e-5)
    words, beside = found[:, :MOST], found[:, MOST:]
    factor = np.linalg.norm(words, axis=1, keepdims=True) / ROW_LENGTH
    np.testing.assert_allclose(words / factor, rows, rtol=1e-4, atol=1e-5)
    means = np.einsum("nw,wk->nk", rows, TABLE[3:23])
    away = beside / factor / ROW_LENGTH / SHARE  # affine in the means, by hand
    slopes = (away[1:] - away[0]) / (means[1:] - means[0])
    np.testing.assert_allclose(slopes, slopes[0, 0], rtol=1e-3)


def test_made_up_texts_are_the_centre_and_the_unit_of_length():
    ranks = np.arange(1, 31)
    draws = np.random.default_rng(3).choice(
        30, (3000, 180), p=1 / ranks / sum(1 / ranks)
    )
    found = with_vectors(draws + 3, WORDS, MOST, vectors)
    factor = np.linalg.norm(found[:, :MOST], axis=1, keepdims=True)
    beside = found[:, MOST:] / factor / SHARE
    assert np.abs(beside.mean(0)).max() < 0.05
    assert abs(np.linalg.norm(beside, axis=1).mean() - 1) < 0.05


def test_a_row_is_of_its_own_text_alone_and_an_empty_one_is_zero():
    one, other = texts(6), texts(6, seed=5)
    other[2] = one[2]
    here, there = (with_vectors(ids, WORDS, MOST, vectors)[2] for ids in (one, other))
    np.testing.assert_array_equal(here, there)
    assert not with_vectors(np.array([[0, 1, 2]]), WORDS, MOST, vectors).any()


def test_words_with_a_tone_count_for_more_whatever_their_sign(monkeypatch):
    monkeypatch.setattr(public, "lexicon", lambda: {"w2": -3.0, "w4": 2.0, "x": 4.0})
    scale = log_rank(MOST)
    scale[2] *= 1 + 3 * TONE
    scale[4] *= 1 + 2 * TONE
    ids = texts(5)
    wanted = scaled_words(ids, WORDS, MOST, lambda n: scale)
    np.testing.assert_allclose(toned(ids, WORDS, MOST), wanted, rtol=1e-5)


def lexicon_of(tmp_path, monkeypatch, text):
    folder = tmp_path / "fakelexicon"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / public._FILE).write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(public, "_PACKAGE", "fakelexicon")
    public.lexicon.cache_clear()


def test_the_lexicon_is_read_as_a_file(tmp_path, monkeypatch):
    lexicon_of(tmp_path, monkeypatch, "good\t1.9\t0.9\t[2]\nbad\t-2.5\t0.7\t[-2]\n")
    assert public.lexicon() == {"good": 1.9, "bad": -2.5}
    public.lexicon.cache_clear()


@pytest.mark.parametrize("text", [None, "good\n", "good\tvery\n"])
def test_a_lexicon_that_is_absent_or_damaged_is_one_sentence(
    text, tmp_path, monkeypatch
):
    monkeypatch.setattr(public, "_PACKAGE", "no_such_lexicon")
    public.lexicon.cache_clear()
    if text is not None:
        lexicon_of(tmp_path, monkeypatch, text)
    with pytest.raises(DataError, match="cannot be read"):
        public.lexicon()
    public.lexicon.cache_clear()
