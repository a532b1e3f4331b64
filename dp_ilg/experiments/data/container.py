"""What a data set is: its two parts, and the public facts about them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dp_ilg.experiments.config.kinds import Measure, measure_of_task
from dp_ilg.experiments.data.files import DataError

_SYSTEM_FOLDER = Path("/usr/share/datasets")  # where Debian installs Fashion-MNIST

Inputs = Any  # an array or a tuple of arrays, in memory, mapped or in shards


class MadeOf(NamedTuple):
    """What inputs that are features were computed from, and how.

    Attributes:
        shape: of ONE raw input, such as an image.
        dtype: of its entries.
        compute: raw inputs ``[batch, ...]`` to features; JAX can trace it, and row i is
            a function of raw input i alone.

    Privacy: holds no data.

    Example:
        >>> MadeOf((28, 28, 1), "float32", lambda images: images - 0.5).shape
        (28, 28, 1)
    """

    shape: tuple[int, ...]
    dtype: Any
    compute: Callable[[Any], Any]


@dataclass(frozen=True)
class Dataset:
    """One data set, split into training and test examples.

    Attributes:
        name: its row in `LOADERS`.
        x_train: inputs, one example a row: float32[N, height, width, channels] in
            [0, 1] for images, uint16[N, 256] token ids for texts (0 is padding) or
            uint8[N, num_tokens] counts of words, and for tables a tuple of
            int32[N, columns] ids and float32[N, columns] numbers.
        y_train: int32[N] labels from 0; for texts to continue int32[N, 16], the token
            that follows each; float32[N] where numbers are asked for.
        x_test: inputs for testing, of the same kind.
        y_test: their labels.
        num_classes: the number of classes; 1 where numbers are asked for.
        note: where it came from, and what in it the guarantee does not cover.
        num_tokens: size of the vocabulary of texts, else 0.
        num_categories: number of ids of each categorical column of tables, else empty.
        words: the vocabulary of texts, if their file has it as "vocab".
        map_shape: (channels, positions) of inputs that are flat feature maps, or None.
        target_range: the least and the largest answer, where numbers are asked for; a
            public fact such as a scale of ratings, or None for classes.
        made_of: how inputs follow from raw ones, so that features of synthetic inputs
            can be computed; None where inputs are raw, or nobody can trace how.

    Raises:
        DataError: for ids outside the tables that `num_categories` makes for them: a
            row that does not exist would be read from the last one, silently.

    Privacy:
        The guarantee of a run covers `x_train` and `y_train`. What was computed from
        data beforehand, and the test set, it does not cover; see `note`.

    Example:
        >>> from dp_ilg.experiments.data.datasets import load_dataset
        >>> digits = load_dataset("digits")
        >>> digits.x_train.shape, digits.num_classes, digits.measure.name
        ((1437, 8, 8, 1), 10, 'accuracy')
    """

    name: str
    x_train: Inputs
    y_train: Any
    x_test: Inputs
    y_test: np.ndarray
    num_classes: int
    note: str
    num_tokens: int = 0
    num_categories: tuple[int, ...] = ()
    words: tuple[str, ...] = ()
    map_shape: tuple[int, int] | None = None
    target_range: tuple[float, float] | None = None
    made_of: MadeOf | None = None

    def __post_init__(self):
        if self.num_categories:
            for part in (self.x_train, self.x_test):
                check_ids(self.name, part[0], self.num_categories)

    @property
    def measure(self) -> Measure:
        """By what a model of it is measured."""
        return measure_of_task(self.target_range is not None)


def check_ids(name: str, ids: np.ndarray, sizes: tuple[int, ...]) -> None:
    """Raises unless every id has a row in the table of its column.

    Args:
        name: of the data, for the message.
        ids: whole numbers ``[examples, columns]``.
        sizes: rows of each column's table.

    Raises:
        DataError: for ids that are no integers, or a table with fewer rows than ids.

    Privacy:
        Only whether they fit is told, as for labels; nothing is kept of it.

    Example:
        >>> check_ids("mine", np.array([[0, 5]]), (2, 5))
        Traceback (most recent call last):
        dp_ilg.experiments.data.files.DataError: mine has the id 5 in column 1, whose \
table has 5 rows, 0 to 4; state as many rows as there are ids.
    """
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" or ids.shape[1:] != (len(sizes),):
        raise DataError(
            f"{name} has ids {ids.dtype}{list(ids.shape)}, but they must be integers, "
            f"a column for each of {len(sizes)} tables; number the categories from 0."
        )
    for column, size in enumerate(sizes):
        found = ids[:, column]
        bad = found[(found < 0) | (found >= size)]
        if bad.size:
            raise DataError(
                f"{name} has the id {bad[0]} in column {column}, whose table has "
                f"{size} rows, 0 to {size - 1}; state as many rows as there are ids."
            )


def data_folders(name: str, data_dir: Path | None) -> list[Path]:
    """Where the files of a data set may be.

    Args:
        name: its row.
        data_dir: a folder of data files, or None.

    Returns:
        Folders, in the order in which they are looked through.

    Example:
        >>> len(data_folders("adult", None)), len(data_folders("adult", Path("data")))
        (1, 4)
    """
    dashed = name.replace("_", "-")
    given = [data_dir, data_dir / name, data_dir / dashed] if data_dir else []
    return [*given, _SYSTEM_FOLDER / dashed]
