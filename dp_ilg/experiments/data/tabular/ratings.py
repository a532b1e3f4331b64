"""Ratings as examples: who rated what, which part a rating is in, and its scale."""

from collections.abc import Sequence

import numpy as np

from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.data.files import DataError

STARS = (1.0, 5.0)
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_FIFTH = 5


def rated(
    name: str,
    parts: tuple[np.ndarray, np.ndarray, np.ndarray],
    sizes: Sequence[int],
    note: str,
) -> Dataset:
    """Makes a data set of ratings from one to five; one rating is one example.

    Args:
        name: its row.
        parts: int32[N, columns] ids, those of who rates and of what is rated first;
            float32[N, k] numbers; and the N ratings.
        sizes: how many ids each column has.
        note: where it is from, and what of it is public.

    Returns:
        The data set; about a fifth of the pairs of who and what are the test part.

    Raises:
        DataError: for ratings off their scale, or a part without any.

    Privacy:
        Which part a rating is in depends on its own two ids alone, so that a rating
        more or less moves no other. The scale is public: what is predicted starts at
        its middle, not at the mean of the ratings.

    Example:
        >>> ids = np.stack([np.arange(100), np.arange(100)], axis=1).astype(np.int32)
        >>> parts = ids, np.zeros((100, 0), np.float32), np.full(100, 4)
        >>> data = rated("made up", parts, (100, 100), "Made up.")
        >>> len(data.y_train) + len(data.y_test), data.measure.name
        (100, 'mse')
    """
    ids, numbers, ratings = parts
    low, high = STARS
    ratings = np.asarray(ratings, np.float32)
    if not ((ratings >= low) & (ratings <= high)).all():
        raise DataError(
            f"{name} has a rating outside {low:g} to {high:g}; take its file again."
        )
    test = in_test_part(ids[:, 0], ids[:, 1])
    if test.all() or not test.any():
        raise DataError(f"{name} has {len(ids)} ratings, all in one part; give more.")
    return Dataset(
        name,
        (ids[~test], numbers[~test]),
        ratings[~test],
        (ids[test], numbers[test]),
        ratings[test],
        num_classes=1,
        note=note,
        num_categories=tuple(sizes),
        target_range=STARS,
    )


def in_test_part(who: np.ndarray, what: np.ndarray) -> np.ndarray:
    """Which ratings are for testing: a fifth of all pairs, by a public hash.

    Args:
        who: ids of those who rate.
        what: ids of what is rated.

    Returns:
        ``bool[N]``; ratings of one pair are all in one part.

    Example:
        >>> who, what = np.divmod(np.arange(100_000), 1000)
        >>> bool(0.19 < in_test_part(who, what).mean() < 0.21)
        True
    """
    mixed = who.astype(np.uint64) << np.uint64(32) | what.astype(np.uint64)
    add, first, second = (np.uint64(number) for number in _MIX)
    mixed = mixed + add  # wraps around, as SplitMix64 has it
    mixed = (mixed ^ (mixed >> np.uint64(30))) * first
    mixed = (mixed ^ (mixed >> np.uint64(27))) * second
    mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed % np.uint64(_FIFTH) == 0


def whole_numbers(column: str, words: Sequence[str], source: str) -> np.ndarray:
    """Ids as integers, or a sentence that shows the one that is none.

    Args:
        column: its name, for the message.
        words: what stands in the file.
        source: the file.

    Returns:
        ``int64[N]``.

    Raises:
        DataError: for anything but digits.

    Example:
        >>> whole_numbers("user_id", ["7", "x9"], "u.inter")
        Traceback (most recent call last):
        dp_ilg.experiments.data.files.DataError: u.inter has 'x9' in the column \
user_id, which must hold integers; number its values, from 1.
    """
    bad = next((w for w in words if not (w.isascii() and w.isdigit())), None)
    if bad is not None:
        raise DataError(
            f"{source} has {bad!r} in the column {column}, which must hold integers; "
            "number its values, from 1."
        )
    return np.array([int(word) for word in words], np.int64)


def numbered(
    column: str, ids: np.ndarray, size: int, source: str, least: int = 1
) -> np.ndarray:
    """Ids from `least` to `size` as ids from 0, or a sentence.

    Args:
        column: its name, for the message.
        ids: as the file has them.
        size: the largest there may be, a public fact.
        source: the file.
        least: the smallest.

    Returns:
        ``int32[N]``.

    Raises:
        DataError: for an id outside; its table has fewer rows.

    Example:
        >>> numbered("item_id", np.array([1, 1683]), 1682, "u.inter")
        Traceback (most recent call last):
        dp_ilg.experiments.data.files.DataError: u.inter has the item_id 1683, but \
the table has rows for 1 to 1682 only; take the file as it was published.
    """
    bad = ids[(ids < least) | (ids > size)]
    if bad.size:
        raise DataError(
            f"{source} has the {column} {bad[0]}, but the table has rows for {least} "
            f"to {size} only; take the file as it was published."
        )
    return (ids - least).astype(np.int32)
