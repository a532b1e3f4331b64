"""Bags of words in a public geometry: what a private linear model is trained upon.

A common word says little of a text and makes up most of its length. So the square roots
of counts are multiplied by a scale that grows with the logarithm of the rank, and each
row is brought to one length. Noise of one size then falls on words by what they are
likely to say, although the scale has not seen a single text.
"""

from collections.abc import Callable, Sequence

import numpy as np

from dp_ilg.experiments.data.word_counts import word_counts

ROW_LENGTH = 10.0
"""The norm of a row: a bias beside it, whose input is 1, is a tenth of an example."""
STOP_WORDS = 50.0
"""The rank at which the logarithm sets in; chosen on held-out training texts."""
_MARKS = 3  # padding, start and unknown come first and are no words


def log_rank(most: int) -> np.ndarray:
    """The scale of words by falling frequency: ``log(1 + rank / 50)``.

    Under Zipf's law a word of rank r is in a share of texts that falls as 1 / r, so
    that this is its inverse document frequency in nats, less a constant.

    Args:
        most: how many words.

    Returns:
        float32 ``[most]``, from the first rank on.

    Privacy: a function of ranks alone.

    Example:
        >>> [round(float(x), 2) for x in log_rank(100)[[0, 49, 99]]]
        [0.02, 0.69, 1.1]

    Reference: Sparck Jones 1972 (inverse document frequency); Zipf 1935.
    """
    return np.log1p(np.arange(1, most + 1) / STOP_WORDS).astype(np.float32)


def even(most: int) -> np.ndarray:
    """One scale for all words: what a scale by rank is compared with.

    Args:
        most: how many words.

    Returns:
        float32 ``[most]`` of ones.

    Example:
        >>> even(2).tolist()
        [1.0, 1.0]
    """
    return np.ones(most, np.float32)


def scaled_words(
    texts: np.ndarray,
    words: Sequence[str],
    most: int,
    scale: Callable[[int], np.ndarray] = log_rank,
) -> np.ndarray:
    """Rows of scaled words, one a text.

    Args:
        texts: ``[N, length]`` places in `words`; 0 is padding.
        words: by falling frequency, after three marks.
        most: how many of the most frequent words are kept.
        scale: what their number is turned into, a public scale of each.

    Returns:
        float32 ``[N, most]`` of norm `ROW_LENGTH`; zero for a text without such words.

    Privacy: row i is a function of text i, of the order of `words` and of public
    constants, so nothing is spent; the order is what its maker computed it from.

    Example:
        >>> words = ["<pad>", "<start>", "<oov>", "the", "film"]
        >>> rows = scaled_words(np.array([[1, 3, 4, 4]]), words, 2)
        >>> [round(float(x), 2) for x in rows[0]]
        [3.36, 9.42]
    """
    counts = word_counts(texts, max(len(words), most + _MARKS))
    counts = counts[:, _MARKS : most + _MARKS].astype(np.float32)
    rows = np.sqrt(counts) * scale(most)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (ROW_LENGTH / np.maximum(norms, 1e-6)) * rows
