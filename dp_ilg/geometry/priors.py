"""Public knowledge as vectors: how often rows are met, before any data is read.

A prior says which share of an example's squared gradient an entry is expected to have.
For a row of an embedding, or an input feature that is 0 or 1, that is how often it
occurs: ``I_r^2 = p_r``. Each function says from which public fact its vector comes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np

from dp_ilg import validation
from dp_ilg.geometry.layers import paths


def zipf(ranks: Any, exponent: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """How often words occur, by Zipf's law: in proportion to ``(rank + shift)^-s``.

    Public fact: the order of the words by how common they are in the language, say of
    a published list. An order that was counted in the training texts is not public.

    Args:
        ranks: how many words there are, sorted by falling frequency; or the rank of
            each, from 1.
        exponent: s; about 1 for words.
        shift: of Mandelbrot's law; flattens the first ranks.

    Returns:
        float64 relative frequencies, one a word; those of a whole list sum to 1.

    Raises:
        ValueError: for no words, a rank below 1, or numbers that are negative.

    Privacy: free as long as the ranks are public.

    Example:
        >>> [round(float(p), 3) for p in zipf(3)]
        [0.545, 0.273, 0.182]
        >>> (zipf([2, 2]) * 2).tolist()
        [1.0, 1.0]

    Reference: Zipf 1949; Mandelbrot 1953 (the shift).
    """
    if isinstance(ranks, int | np.integer):
        validation.whole("ranks", int(ranks))
        ranks = np.arange(1, int(ranks) + 1)
    found = vector("ranks", ranks)
    if found.min() < 1:
        raise ValueError(
            f"ranks hold {found.min():g}, but count from 1, the most common word."
        )
    for name, value in (("exponent", exponent), ("shift", shift)):
        validation.rate(name, value)
    return _relative((found + shift) ** -float(exponent))


def occurrence(frequencies: Any, length: Any) -> np.ndarray:
    """How many texts of a length a word occurs in, from how often it is used.

    ``1 - (1 - p)^length``: the expected square of a binary feature "the text has the
    word".

    Args:
        frequencies: relative ones, such as those of `zipf`.
        length: words of a text, a public figure.

    Returns:
        float64 shares of texts, one a word.

    Raises:
        ValueError: for frequencies above 1 or below 0, or a length that is none.

    Privacy: free as long as both are public.

    Example:
        >>> occurrence([0.5, 0.0], 2).tolist()
        [0.75, 0.0]
    """
    found = vector("frequencies", frequencies)
    validation.positive("length", length)
    if found.max() > 1:
        raise ValueError(f"frequencies hold {found.max():g}, but are at most 1.")
    return -np.expm1(float(length) * np.log1p(-np.minimum(found, 1 - 1e-12)))


def idf(shares: Any, documents: float = 1e5) -> np.ndarray:
    """The weight that rare words get in retrieval: ``log((1 + D) / (1 + D p))``.

    A feature scale, not a share: noise is to be in inverse proportion. Pass
    ``Prior({path: 1 / idf(...)}, rule="given")``.

    Args:
        shares: of documents that hold a word, such as those of `occurrence`.
        documents: D, a public figure; a word in less than one of D is no rarer still.

    Returns:
        float64 weights, one a word, at least 0.01.

    Raises:
        ValueError: for shares that are negative, or D below 1.

    Privacy: free as long as the shares are public: of a law, not counted in the
    training texts, as the usual idf is.

    Example:
        >>> [round(float(s), 2) for s in idf([0.1, 0.001], documents=1000)]
        [2.29, 6.22]

    Reference: Sparck Jones 1972.
    """
    found = vector("shares", shares)
    validation.positive("documents", documents)
    raw = np.log1p(float(documents)) - np.log1p(float(documents) * found)
    return np.maximum(raw, 0.01)


def cardinality(sizes: Sequence[int]) -> np.ndarray:
    """How often the rows of a table are met that holds several columns below another.

    Public fact: how many values a column can have. An example has one value of each, so
    that a row of a column with c values is met by one example in c.

    Tables of their own need no such vector: there ``source="public"`` says the same,
    since its rule already divides by the size of a group.

    Args:
        sizes: values of each column, in the order of the table.

    Returns:
        float64, one entry a row: ``1 / c`` for every row of a column of c values.

    Raises:
        ValueError: for no columns, or a size below 1.

    Privacy: free: sizes are those of a code book, not of the values that occur.

    Example:
        >>> cardinality([1, 2]).tolist()
        [1.0, 0.5, 0.5]
    """
    counted = [validation.count("sizes", size) for size in sizes]
    if not counted or min(counted) < 1:
        raise ValueError(f"sizes are {list(sizes)}, but need one size or more above 0.")
    return np.concatenate([np.full(size, 1 / size) for size in counted])


def frequency(counts: Any, pseudo_count: float = 1.0) -> np.ndarray:
    """Relative frequencies from counts in public data, of texts of the same language.

    Args:
        counts: how often each row was met in *public* data.
        pseudo_count: added to each, so that what was not seen is rare, not impossible.

    Returns:
        float64 relative frequencies that sum to 1.

    Raises:
        ValueError: for counts that are negative or not finite.
        TypeError: for `PrivateCounts`.

    Privacy: free if the counts are public. Counts of the training data are a release of
    their own that no epsilon here covers.

    Example:
        >>> frequency([7, 0, 0]).tolist()
        [0.8, 0.1, 0.1]
    """
    validation.positive("pseudo_count", pseudo_count)
    return _relative(vector("counts", counts) + float(pseudo_count))


def fan_in(params: Any) -> dict[str, float]:
    """How long gradients of leaves are to each other, from shapes alone.

    Where inputs of a layer have entries of size 1, the gradient of its kernel is
    ``sqrt(fan-in)`` times as long as that of its bias. Of an embedding one row is read,
    so it counts as 1.

    Args:
        params: tree of parameters, or their shapes; kernels end with the outputs.

    Returns:
        Leaf name -> importance, for ``source="public"``, ``public_importance=`` and
        ``layers="leaf"``.

    Raises:
        ValueError: for an empty tree.

    Privacy: free: shapes are public.

    Example:
        >>> fan_in({"dense": {"kernel": np.zeros((9, 2)), "bias": np.zeros(2)}})
        {'dense/bias': 1.0, 'dense/kernel': 3.0}
    """
    found = {}
    for path, leaf in paths(params):
        shape = np.shape(leaf) if np.ndim(leaf) > 1 and path[-1] != "embedding" else ()
        found["/".join(path)] = float(np.sqrt(np.prod(shape[:-1], dtype=float)))
    if not found:
        raise ValueError("The parameter tree is empty; there is nothing to weigh.")
    return found


@dataclasses.dataclass(frozen=True)
class PrivateCounts:
    """Counts of the private rows themselves: no prior, and no array.

    Attributes:
        _counts: float64, one a row.

    Privacy: raw values of the training data, which must not leave. Nothing here takes
    them for a prior; sum them with noise first, and charge that as a `prior_releases`
    of the plan.

    Example:
        >>> private_counts([[0, 2], [2, 2]], 3)
        PrivateCounts(3 rows, <hidden>)
    """

    _counts: np.ndarray

    def __repr__(self) -> str:
        return f"PrivateCounts({len(self._counts)} rows, <hidden>)"

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(_REFUSAL)


_REFUSAL = (
    "These counts were made from the training data, so they are no prior; take public "
    "counts, a law such as dp_ilg.priors.zipf, or counts released with noise that the "
    "plan charges (prior_releases=)."
)


def private_counts(ids: Any, size: int) -> PrivateCounts:
    """In how many examples each row is met, kept apart from what is public.

    Args:
        ids: whole numbers ``[examples, ...]`` of private data.
        size: how many rows there are.

    Returns:
        `PrivateCounts`, which every prior refuses.

    Raises:
        ValueError: for ids outside the table.

    Privacy: for looking at one's own data; not private.

    Example:
        >>> frequency(private_counts([[0, 2]], 3))
        Traceback (most recent call last):
        TypeError: These counts were made from the training data, so they are no ...
    """
    rows = np.asarray(ids)
    rows = rows.reshape(len(rows), -1)
    if rows.size and not (rows.min() >= 0 and rows.max() < size):
        raise ValueError(
            f"ids reach outside the {size} rows of the table; give its real size."
        )
    counts = np.zeros(size)
    for row in rows:
        counts[np.unique(row)] += 1
    return PrivateCounts(counts)


def vector(name: str, values: Any) -> np.ndarray:
    """A public vector of numbers that are not negative.

    Args:
        name: what the caller calls it.
        values: numbers in one row.

    Returns:
        float64 ``[n]``.

    Raises:
        ValueError: for no numbers, another shape, or entries that are negative, NaN or
            infinite.
        TypeError: for `PrivateCounts`.

    Example:
        >>> vector("shares", [1, -1])
        Traceback (most recent call last):
        ValueError: shares hold -1 at place 1, but must be finite and not negative.
    """
    if isinstance(values, PrivateCounts):
        raise TypeError(_REFUSAL)
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} are {validation.shown(values)}, but must be numbers."
        ) from None
    if found.ndim != 1 or not found.size:
        raise ValueError(f"{name} have shape {found.shape}, but must be one vector.")
    bad = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if bad.size:
        raise ValueError(
            f"{name} hold {found[bad[0]]:g} at place {bad[0]}, but must be finite and "
            "not negative."
        )
    return found


def _relative(values: np.ndarray) -> np.ndarray:
    return values / values.sum()


def per_axis(path: str, given: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """What a prior says of each axis of a leaf, in vectors of the right length.

    Args:
        path: of the leaf.
        given: a vector for the first axis, or a tuple with a vector or None an axis;
            a function of the length of the axis, such as `zipf`, stands for a vector.
        shape: of the leaf.

    Returns:
        One vector or None an axis.

    Raises:
        ValueError: for more axes than the leaf has, a vector of another length, only
            zeros, and as `vector`.

    Example:
        >>> per_axis("embedding", [1, 2, 3], (3, 4))[1] is None
        True
        >>> per_axis("embedding", [1, 2], (3, 4))
        Traceback (most recent call last):
        ValueError: The prior of embedding has 2 entries, but axis 0 of it has 3; ...
    """
    axes = given if isinstance(given, tuple) else (given,)
    if len(axes) > len(shape):
        raise ValueError(
            f"The prior of {path} speaks of {len(axes)} axes, but {path} has "
            f"{len(shape)}; give one vector or None an axis."
        )
    found = []
    for axis, values in enumerate(axes):
        if values is None:
            found.append(None)
            continue
        made = values(shape[axis]) if callable(values) else values
        one = vector(f"The prior's entries of {path}", made)
        if len(one) != shape[axis]:
            raise ValueError(
                f"The prior of {path} has {len(one)} entries, but axis {axis} of it "
                f"has {shape[axis]}; give one entry each."
            )
        if not one.any():
            raise ValueError(f"The prior of {path} is 0 everywhere; leave it out.")
        found.append(one)
    return (*found, *[None] * (len(shape) - len(axes)))
