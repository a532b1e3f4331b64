"""Texts as counts of their words, and as ids by a public list instead of their own.

Counts are what a mean of vectors needs. A public list is what the order of an
embedding's rows needs, where it must not be computed from the texts trained on.
"""

import dataclasses
import importlib
from collections.abc import Sequence

import numpy as np

from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.data.files import DataError

PUBLIC_WORDS = 20_000  # of the list, chosen by hand
_MARKS = ("<pad>", "<start>", "<unk>")  # as imdb.npz has them
_UNKNOWN = _MARKS.index("<unk>")
_ROWS = 1000  # texts that are counted at once


def public_order(data: Dataset) -> Dataset:
    """Texts by the public list of English words that the package wordfreq brings.

    Args:
        data: texts with one label, their ids below `num_tokens` and their `words`.

    Returns:
        The same texts as uint16 ids: 0 to 2 as before, then the list's words by falling
        frequency in public texts. A word that is not in the list becomes 2.

    Raises:
        ValueError: for data that are no texts or have no words.
        DataError: if the package is not installed.

    Privacy:
        Text i depends on text i and on the list. What is left of the file's own
        vocabulary: a word that it does not have was 2 already, whichever list reads it.

    Example:
        >>> public_order.__name__
        'public_order'

    Reference: Speer 2022, the package wordfreq (Apache-2.0, its data CC BY-SA 4.0).
    """
    if not data.num_tokens or data.y_train.ndim != 1 or not data.words:
        raise ValueError(
            f"data.features is 'public_words', which needs texts and the words behind "
            f"their ids, but {data.name} lacks them; set data.features to 'raw'."
        )
    words = (*_MARKS, *_public_words())
    x_train, x_test = (
        by_list(np.asarray(x), data.words, words) for x in (data.x_train, data.x_test)
    )
    note = (
        f"{data.note} Here they are numbered by wordfreq's public list of "
        f"{len(words) - len(_MARKS):,} words; only which rare words count as unknown "
        "still follows the file's own vocabulary."
    )
    found = dict(x_train=x_train, x_test=x_test, words=words, num_tokens=len(words))
    return dataclasses.replace(data, note=note, **found)


def by_list(
    tokens: np.ndarray, words: Sequence[str], public: Sequence[str]
) -> np.ndarray:
    """Numbers the words of texts by another list.

    Args:
        tokens: ids, ``[N, length]``, places in `words`.
        words: the list that they are numbered by.
        public: the other list; the first three of both are marks, not words.

    Returns:
        uint16 ``[N, length]``, places in `public`; 2 for a word that is not in it.

    Example:
        >>> own = ["<pad>", "<start>", "<oov>", "movie", "the"]
        >>> by_list(np.array([[1, 4, 3, 0]]), own, ["", "", "", "the", "of"]).tolist()
        [[1, 3, 2, 0]]
    """
    marks = len(_MARKS)
    places = {word: i for i, word in enumerate(public) if i >= marks}
    table = [places.get(word, _UNKNOWN) for word in words[marks:]]
    return np.array([*range(marks), *table], np.uint16)[tokens]


def _public_words() -> Sequence[str]:
    try:
        wordfreq = importlib.import_module("wordfreq")
    except ImportError:
        raise DataError(
            'The public list of words is not installed; pip install "dp_ilg[words]".'
        ) from None
    return wordfreq.top_n_list("en", PUBLIC_WORDS)


def word_counts(tokens: np.ndarray, num_tokens: int) -> np.ndarray:
    """Counts the words of each text.

    The mean of a text's word vectors is its counts times the table of vectors. For
    10,000 words a matrix product of counts is several times faster than lookups and,
    in the derivative, their scattered sums.

    Args:
        tokens: uint16 ids, ``[N, length]``; 0 is padding and not counted.
        num_tokens: size of the vocabulary.

    Returns:
        uint8 ``[N, num_tokens]``; a word that comes more than 255 times counts as 255.

    Privacy: row i is a function of text i alone, so nothing is spent.

    Example:
        >>> word_counts(np.array([[3, 1, 3, 0]], np.uint16), 5).tolist()
        [[0, 1, 0, 2, 0]]
    """
    counts = np.empty((len(tokens), num_tokens), np.uint8)
    for begin in range(0, len(tokens), _ROWS):
        part = tokens[begin : begin + _ROWS].astype(np.int64)
        places = np.arange(len(part))[:, None] * num_tokens + part
        found = np.bincount(places.ravel(), minlength=len(part) * num_tokens)
        counts[begin : begin + _ROWS] = np.minimum(found, 255).reshape(len(part), -1)
    counts[:, 0] = 0
    return counts
