"""Public vectors in place of words: what a private head is trained upon.

A row of `TEXT_FEATURES` turns texts into vectors with weights that come inside a Python
package and were learnt on other texts. Row i is a function of text i alone.
"""

import functools
import heapq
import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dp_ilg.experiments.data.encoder import BLOCKS, encode_texts, read_safetensors
from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.data.word_counts import word_counts
from dp_ilg.experiments.data.words import public, scaled

_TEXTS = 500  # turned into vectors at once
_VECTORS = ("wordllama", "l2_supercat_256.safetensors")
_PIECES = "l2_supercat_tokenizer_config.json"


class TextFeatures(NamedTuple):
    """One way of turning texts into vectors.

    Attributes:
        compute: ``(texts [N, length], words) -> float [N, width]``.
        width: of a vector.
        tag: names what is computed; a change of that needs another.

    Example:
        >>> TEXT_FEATURES["word_vectors"].width
        256
    """

    compute: Callable[[np.ndarray, Sequence[str]], np.ndarray]
    width: int
    tag: str


def mean_vectors(texts: np.ndarray, words: Sequence[str]) -> np.ndarray:
    """The mean of the words' vectors, scaled to norm 1; see `word_table`.

    Args:
        texts: ``[N, length]`` indices of `words`; 0 is padding.
        words: the vocabulary.

    Returns:
        float32 ``[N, 256]``; zero for a text without words.

    Raises:
        DataError: if the package wordllama is not installed.

    Privacy: row i is a function of text i alone; the vectors are public.

    Example:
        >>> mean_vectors.__name__
        'mean_vectors'
    """
    counts = word_counts(texts, len(words)).astype(np.float32)
    means = counts @ word_table(tuple(words))
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-6)


def encoded_texts(texts: np.ndarray, words: Sequence[str]) -> np.ndarray:
    """The frozen encoder's vectors less what random words give, which all share.

    The centre is the mean over 96 made-up texts of 120 words each, drawn from the
    vocabulary by Zipf's law, so that it needs no private text.

    Args:
        texts: ``[N, length]`` indices of `words`; 0 is padding.
        words: the vocabulary, by falling frequency.

    Returns:
        float32 ``[N, 768]``, of norm about 1.

    Raises:
        DataError: if the encoder's package is not installed.

    Privacy: row i is a function of text i and of the vocabulary alone.

    Example:
        >>> encoded_texts.__name__
        'encoded_texts'
    """
    return (encode_texts(texts, words) - _centre(tuple(words))) / np.float32(_SPREAD)


_SPREAD = 3.0  # the norm of reviews' vectors around the centre is about 3


@functools.lru_cache(maxsize=1)
def _centre(words: tuple[str, ...]) -> np.ndarray:
    weights = zipf(words)
    dice = np.random.default_rng(0)
    texts = dice.choice(len(words), (96, 120), p=weights / weights.sum())
    return encode_texts(texts, words).astype(np.float32).mean(0)


def zipf(words: Sequence[str]) -> np.ndarray:
    """Zipf's law: the frequency of a vocabulary's words, by their order alone.

    Args:
        words: by falling frequency; those in ``<...>`` are none.

    Returns:
        float64 ``[words]``, 1 over the rank of each word; sums to 1.

    Example:
        >>> (6 * zipf(["<pad>", "the", "movie"])).tolist()
        [0.0, 4.0, 2.0]

    Reference: Zipf 1935.
    """
    real = np.array([not _is_mark(word) for word in words])
    weights = np.where(real, 1 / np.maximum(np.cumsum(real), 1), 0.0)
    return weights / max(weights.sum(), 1e-9)


def _is_mark(word: str) -> bool:
    return word.startswith("<") and word.endswith(">")


@functools.lru_cache(maxsize=1)
def word_table(words: tuple[str, ...]) -> np.ndarray:
    """WordLlama's vectors of words: centred and partly whitened by Zipf's law.

    A word's vector is the sum of those of its pieces, scaled to norm 1. What all words
    share tells texts apart badly and hides the rest in noise: their mean, weighted as
    `zipf` says, is taken off, and directions are scaled by the covariance under the
    same weights, with 0.3 of the mean variance added.

    Args:
        words: in lower case, by falling frequency; those in ``<...>`` have none.

    Returns:
        float32 ``[words, 256]``.

    Raises:
        DataError: if the package is not installed, or not as expected.

    Privacy: a function of the vocabulary and its order alone.

    Example:
        >>> word_table.cache_parameters()["maxsize"]
        1

    Reference: the package wordllama (MIT): token vectors of several language models,
    concatenated and trained as a sentence encoder of 256 dimensions.
    """
    found = importlib.util.find_spec(_VECTORS[0])
    if found is None or not found.submodule_search_locations:
        raise DataError(
            'The word vectors are not installed; pip install "dp_ilg[encoders]".'
        )
    folder = Path(next(iter(found.submodule_search_locations)))
    try:
        table = read_safetensors(folder / "weights" / _VECTORS[1])["embedding.weight"]
        text = (folder / "tokenizers" / _PIECES).read_text(encoding="utf-8")
        model = json.loads(text)["model"]
        ids, order = model["vocab"], {m: i for i, m in enumerate(model["merges"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The word vectors in {folder} cannot be read ({error}); install them "
            "again."
        ) from None
    vectors = np.zeros((len(words), table.shape[1]), np.float32)
    for index, word in enumerate(words):
        if not _is_mark(word):
            own = [
                ids[piece] for piece in merged("\u2581" + word, order) if piece in ids
            ]
            vectors[index] = table[own].astype(np.float32).sum(0)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return _whitened(vectors / np.maximum(norms, 1e-6), zipf(words))


def _whitened(vectors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Centred and scaled along the directions of the weighted covariance."""
    centred = np.where(weights[:, None] > 0, vectors - weights @ vectors, 0.0)
    values, directions = np.linalg.eigh((centred * weights[:, None]).T @ centred)
    scales = np.sqrt(np.maximum(values, 0) + 0.3 * values.mean() + 1e-12)
    return (centred @ directions / scales).astype(np.float32)


def merged(word: str, order: dict[str, int]) -> list[str]:
    """Joins a word's letters into pieces, the pair that was learnt first at a time.

    Args:
        word: the word, its start marked as the pieces mark it.
        order: "left right" -> rank of the pair.

    Returns:
        The pieces.

    Example:
        >>> merged("abab", {"a b": 0, "ab ab": 1, "b a": 2})
        ['abab']

    Reference: Sennrich et al. 2016 (byte-pair encoding).
    """
    parts = list(word)
    while len(parts) > 1:
        pairs = [
            (order[f"{a} {b}"], i)
            for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
            if f"{a} {b}" in order
        ]
        if not pairs:
            break
        _, i = heapq.nsmallest(1, pairs)[0]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def text_chunks(
    name: str, texts: np.ndarray, words: Sequence[str]
) -> Iterator[np.ndarray]:
    """The vectors of some hundred texts at a time.

    Args:
        name: a row of `TEXT_FEATURES`.
        texts: ``[N, length]`` indices of `words`.
        words: the vocabulary.

    Yields:
        ``[up to 500, width]``.

    Example:
        >>> list(text_chunks("word_vectors", np.zeros((0, 3), np.uint16), ["<pad>"]))
        []
    """
    for begin in range(0, len(texts), _TEXTS):
        yield TEXT_FEATURES[name].compute(texts[begin : begin + _TEXTS], words)


def _words(most: int, scale: Callable[[int], np.ndarray]) -> TextFeatures:
    """Bags of words, which need no weights from elsewhere."""
    tag = f"sqrt counts {scale.__name__} {most} {scaled.STOP_WORDS} {scaled.ROW_LENGTH}"
    compute = functools.partial(scaled.scaled_words, most=most, scale=scale)
    return TextFeatures(compute, most, tag)


# The width of the encoder's blocks is 384.
TEXT_FEATURES: dict[str, TextFeatures] = {
    "word_vectors": TextFeatures(mean_vectors, 256, "wordllama l2 256 white unit"),
    "sentence_encoder": TextFeatures(
        encoded_texts, 384 * len(BLOCKS), f"MiniLM-L6-v2 {BLOCKS} 128 centred"
    ),
    "scaled_words_4000": _words(4000, scaled.log_rank),
    "scaled_words_8000": _words(8000, scaled.log_rank),
    "even_words_4000": _words(4000, scaled.even),
    "words_and_vectors_4000": TextFeatures(
        functools.partial(public.with_vectors, most=4000, vectors=word_table),
        4000 + 256,
        f"words 4000 beside wordllama l2 256 white {public.SHARE}",
    ),
    "toned_words_4000": TextFeatures(
        functools.partial(public.toned, most=4000),
        4000,
        f"words 4000 toned by vader {public.TONE}",
    ),
}
