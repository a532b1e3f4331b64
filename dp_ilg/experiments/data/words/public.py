"""Scaled words with public knowledge beside them: of their meaning, or of their tone.

`with_vectors` puts the mean of public word vectors beside a bag of words, so that a
linear model can move words of like meaning together. `toned` gives more room to words
that a public lexicon calls good or bad. Neither reads a label.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.data.words.scaled import ROW_LENGTH, log_rank, scaled_words

SHARE = 0.2
"""The length of the vectors, as a part of the words'; chosen on held-out reviews."""
TONE = 0.25
"""What a valence of 1 adds to a word's scale; chosen on held-out reviews."""
_PACKAGE, _FILE = "vaderSentiment", "vader_lexicon.txt"
_MARKS = 3  # padding, start and unknown come first and are no words
_TEXTS, _LENGTH = 1000, 180  # made up, to know what texts share
Vectors = Callable[[tuple[str, ...]], np.ndarray]


def with_vectors(
    texts: np.ndarray, words: Sequence[str], most: int, vectors: Vectors
) -> np.ndarray:
    """A bag of scaled words, and beside it the mean of their public vectors.

    The vectors' centre and length are those of made-up texts by Zipf's law.

    Args:
        texts: ``[N, length]`` places in `words`; 0 is padding.
        words: by falling frequency, after three marks.
        most: how many of the most frequent words are kept.
        vectors: the public vectors of a vocabulary, ``[words, width]``.

    Returns:
        float32 ``[N, most + width]`` of norm `ROW_LENGTH`; zero for a text without such
        words.

    Privacy: row i is a function of text i, of the order of `words` and of public
    constants, so nothing is spent.

    Example:
        >>> words = ["<pad>", "<start>", "<oov>", "the", "film"]
        >>> rows = with_vectors(np.array([[3, 4]]), words, 2, lambda w: np.eye(5))
        >>> rows.shape, round(float(np.linalg.norm(rows)), 4)
        ((1, 7), 10.0)
    """
    rows = scaled_words(texts, words, most)
    table = np.zeros((most, vectors(tuple(words)).shape[1]), np.float32)
    known = vectors(tuple(words))[_MARKS : most + _MARKS]
    table[: len(known)] = known
    centre, spread = _centre(tuple(words), most, vectors)
    found = SHARE * ROW_LENGTH / spread * (rows @ table - centre)
    both = np.concatenate([rows, found], axis=1)
    both *= ROW_LENGTH / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-6)
    return np.where(rows.any(1, keepdims=True), both, 0).astype(np.float32)


@functools.lru_cache(maxsize=2)
def _centre(
    words: tuple[str, ...], most: int, vectors: Vectors
) -> tuple[np.ndarray, np.floating]:
    """Mean of the vectors of made-up texts, and how long they are around it."""
    ranks = np.arange(1, max(len(words) - _MARKS, 1) + 1)
    below = np.cumsum(1 / ranks)
    dice = np.random.default_rng(0).random((_TEXTS, _LENGTH))
    texts = np.searchsorted(below, dice * below[-1]) + _MARKS
    rows = scaled_words(texts, words, most)
    known = vectors(words)[_MARKS : most + _MARKS]
    found = rows[:, : len(known)] @ known
    centre = found.mean(0)
    length = np.linalg.norm(found - centre, axis=1).mean()
    return centre, np.maximum(length, np.float32(1e-6))


def toned(texts: np.ndarray, words: Sequence[str], most: int) -> np.ndarray:
    """A bag of scaled words in which those of a public lexicon of tone count for more.

    A word's scale is `log_rank` times ``1 + TONE |valence|``; the lexicon's valences go
    from -4 to 4, and what it does not list has none. The sign is not used.

    Args:
        texts: ``[N, length]`` places in `words`; 0 is padding.
        words: by falling frequency, after three marks.
        most: how many of the most frequent words are kept.

    Returns:
        float32 ``[N, most]`` of norm `ROW_LENGTH`.

    Raises:
        DataError: if the package vaderSentiment is not installed.

    Privacy: as `with_vectors`.

    Example:
        >>> toned.__name__
        'toned'

    Reference: Hutto and Gilbert, ICWSM 2014 (VADER), whose valences people gave.
    """
    known = lexicon()
    own = np.zeros(most, np.float32)
    listed = list(words)[_MARKS : most + _MARKS]
    own[: len(listed)] = [abs(known.get(word, 0.0)) for word in listed]
    return scaled_words(texts, words, most, lambda n: log_rank(n) * (1 + TONE * own))


@functools.lru_cache(maxsize=1)
def lexicon() -> dict[str, float]:
    """The valences of VADER's words, read as a file of its package.

    Returns:
        word -> valence from -4 to 4.

    Raises:
        DataError: if the package is not installed, or not as expected.

    Privacy: public, and made without the texts trained on.

    Example:
        >>> lexicon.cache_parameters()["maxsize"]
        1
    """
    spec = importlib.util.find_spec(_PACKAGE)
    places = (spec and spec.submodule_search_locations) or [f"no {_PACKAGE}"]
    try:
        lines = (Path(places[0]) / _FILE).read_text(encoding="utf-8").splitlines()
        found = [line.split("\t")[:2] for line in lines if line.strip()]
        return {word: float(valence) for word, valence in found}
    except (OSError, ValueError) as error:
        raise DataError(
            f"The lexicon of {_PACKAGE} cannot be read ({type(error).__name__}); pip "
            'install "dp_ilg[encoders]".'
        ) from error
