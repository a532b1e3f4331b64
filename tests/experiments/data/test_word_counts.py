"""Counts of words: against loops, and the same model, gradients and clips as of ids."""

import collections
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.experiments.data.datasets import Dataset, load_dataset
from dp_ilg.experiments.data.features import with_features
from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.data.word_counts import PUBLIC_WORDS, word_counts
from dp_ilg.experiments.models.networks import build_model
from dp_ilg.experiments.models.sizes import Facts

TOKENS = 50


def texts(count, length=30, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, TOKENS, (count, length)).astype(np.uint16)
    ids[np.arange(length) >= rng.integers(0, length + 1, (count, 1))] = 0
    return ids


def dataset(count=20):
    y = np.arange(count, dtype=np.int32) % 2
    return Dataset(
        "t", texts(count), y, texts(6, seed=1), y[:6], 2, "", num_tokens=TOKENS
    )


def test_counts_are_those_of_a_loop_and_padding_is_none(monkeypatch):
    monkeypatch.setattr("dp_ilg.experiments.data.word_counts._ROWS", 7)
    ids = texts(20)
    found = word_counts(ids, TOKENS)
    for row, counted in zip(ids, found, strict=True):
        for token in range(TOKENS):
            expected = 0 if token == 0 else np.sum(row == token)
            assert counted[token] == expected
    many = np.full((1, 300), 4, np.uint16)
    assert word_counts(many, TOKENS)[0, 4] == 255


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("engine", ["bookkeeping", "vmap"])
def test_the_same_gradients_shares_and_clips_as_of_ids(framework, engine):
    raw, counted = dataset(), with_features(dataset(), "word_counts")
    found = []
    for data in (raw, counted):
        facts = Facts(np.zeros_like(data.x_train[0]), 2, TOKENS)
        sizes = dict(embed_dim=4, hidden=(3,), embed_init=0.5)
        model = build_model("embedding", facts, framework=framework, **sizes)
        params = model.init(jax.random.key(0))
        cut = dp_ilg.layers.blocks("embedding/embedding", num_blocks=3)
        bands = dp_ilg.layers.by_leaf(cut)
        geometry = dp_ilg.Geometry.of(params, np.arange(1.0, 8.0), bands)
        grad_fn = dp_ilg.clipped_grad(model.loss_fn, l2_clip_norm=0.3, engine=engine)
        batch = (jnp.asarray(data.x_train), jnp.asarray(data.y_train))
        found.append((params, jax.jit(grad_fn)(params, batch, geometry=geometry)))
    (params, ids), (other, counts) = found
    for one, two in ((params, other), (ids.gradients, counts.gradients)):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(ids.layer_shares, counts.layer_shares, rtol=2e-5)
    assert float(jnp.abs(ids.layer_shares).max()) > 1


def test_refusals_are_one_sentence():
    with pytest.raises(ValueError, match="made of texts with one label"):
        with_features(load_dataset("digits"), "word_counts")
    lines = dataclasses.replace(dataset(), y_train=np.zeros((20, 30), np.int32))
    with pytest.raises(ValueError, match="made of texts with one label"):
        with_features(lines, "word_counts")
    facts = Facts(np.zeros(TOKENS, np.uint8), 2, TOKENS)
    with pytest.raises(ValueError, match="takes words in their order"):
        build_model("transformer", facts)


# ------------------------------------------------------------------- a public list


class FakeList:
    """Stands for the package wordfreq, which CI does not install."""

    @staticmethod
    def top_n_list(language, count):
        assert (language, count) == ("en", PUBLIC_WORDS)
        return [f"word{i}" for i in range(40, 0, -1)]


def with_words(data):
    """Words by falling frequency in the texts themselves, as imdb.npz has them."""
    words = ("<pad>", "<start>", "<oov>", *(f"word{i}" for i in range(3, TOKENS)))
    return dataclasses.replace(data, words=words)


def test_words_are_numbered_by_the_public_list(monkeypatch):
    monkeypatch.setitem(sys.modules, "wordfreq", FakeList)
    data = with_words(dataset())
    found = with_features(data, "public_words")
    assert (
        found.num_tokens == len(found.words) == 43 and found.x_train.dtype == "uint16"
    )
    for before, after in zip(data.x_train.ravel(), found.x_train.ravel(), strict=True):
        word = data.words[before]
        expected = before if before < 3 else 2
        if word in found.words[3:]:
            expected = found.words.index(word)
        assert after == expected
    assert "wordfreq's public list" in found.note
    counted = with_features(data, "public_words_counts")
    assert np.array_equal(counted.x_train, word_counts(found.x_train, 43))


def test_another_text_changes_no_other_under_the_public_list(monkeypatch):
    """Under the file's own order it does: one text more, and every id may move."""
    monkeypatch.setitem(sys.modules, "wordfreq", FakeList)

    def ordered(texts):
        """The file that these texts would make: words by their own frequency."""
        counts = collections.Counter(w for t in texts for w in t)
        words = sorted(counts, key=lambda w: (-counts[w], w))
        vocab = ("<pad>", "<start>", "<oov>", *words)
        ids = np.array([[vocab.index(w) for w in t] for t in texts], np.uint16)
        y = np.zeros(len(ids), np.int32)
        return Dataset("t", ids, y, ids, y, 2, "", num_tokens=len(vocab), words=vocab)

    rare, often = ["word1", "word2", "word2"], ["word1"] * 3
    few, many = ordered([rare]), ordered([rare, often])
    assert not np.array_equal(few.x_train[0], many.x_train[0])
    one, two = (with_features(data, "public_words") for data in (few, many))
    assert np.array_equal(one.x_train[0], two.x_train[0]) and one.words == two.words


def test_a_list_that_is_not_installed_and_texts_without_words(monkeypatch):
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(DataError, match=r'pip install "dp_ilg\[words\]"'):
        with_features(with_words(dataset()), "public_words")
    with pytest.raises(ValueError, match="needs texts and the words behind"):
        with_features(dataset(), "public_words_counts")
    with pytest.raises(ValueError, match="needs texts and the words behind"):
        with_features(load_dataset("digits"), "public_words")
