"""Data sets as folders of shards, for `dp-ilg shards` and ``--data.name ./rows``."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.data.shard_rows import Pixels
from dp_ilg.experiments.data.shards import (
    INDEX,
    ShardedArray,
    open_shards,
    read_index,
    write_shards,
)

_LABELS = 1_000_000  # checked at a time


def is_folder_name(name: str) -> bool:
    """Whether a data set's name is the path of a folder.

    Args:
        name: as in ``data.name``.

    Returns:
        True if there is a slash in it, as in ``./rows``.

    Example:
        >>> is_folder_name("digits"), is_folder_name("data/rows")
        (False, True)
    """
    return "/" in name or "\\" in name


def save_dataset(data: Dataset, folder: str | Path, rows_per_shard: int | None) -> Path:
    """Writes a data set as a folder that ``dp-ilg train --data.name FOLDER`` takes.

    Args:
        data: the data set.
        folder: where to; must not exist.
        rows_per_shard: as for `write_shards`.

    Returns:
        The folder; its own shards are the training rows, ``test`` in it the test rows.

    Raises:
        DataError: if the folder exists, or some rows are not finite.
        OSError: if it cannot be written.

    Example:
        >>> import tempfile
        >>> from dp_ilg.experiments.data.datasets import load_dataset
        >>> folder = Path(tempfile.mkdtemp()) / "digits"
        >>> path = save_dataset(load_dataset("digits"), folder, 500)
        >>> sorted(p.name for p in path.iterdir())[:3]
        ['index.json', 'test', 'x-00000.npy']
    """
    folder = Path(folder)
    facts = {
        "name": data.name,
        "num_classes": data.num_classes,
        "note": data.note,
        "num_tokens": data.num_tokens,
        "num_categories": list(data.num_categories),
    }
    rows = {"x": data.x_train, "y": data.y_train}
    test = {"test": {"x": data.x_test, "y": data.y_test}}
    return write_shards(
        rows, folder, rows_per_shard=rows_per_shard, facts=facts, parts=test
    )


def load_folder(folder: str | Path) -> Dataset:
    """Opens a folder that `save_dataset` wrote; training rows stay on the disk.

    Images of bytes (uint8 with three or four axes) are pixels: they come as float32
    divided by 255, as those that are loaded into memory.

    Args:
        folder: the training rows; the test rows in its part ``test`` are read into
            memory.

    Returns:
        The data set; ``x_train`` and ``y_train`` are `ShardedArray`, or
        `dp_ilg.experiments.data.shard_rows.Pixels` of one.

    Raises:
        DataError: for a folder that is absent, damaged or holds something else.

    Example:
        >>> load_folder("no/such/folder")
        Traceback (most recent call last):
        dp_ilg.experiments.data.files.DataError: no/such/folder/index.json cannot ...
    """
    folder = Path(folder)
    facts, train = read_index(folder)["facts"], open_shards(folder)
    if not (folder / "test" / INDEX).is_file():
        raise DataError(
            f"{folder} has no part test to evaluate on; write it with `dp-ilg shards "
            "--data`, or with parts={'test': ...}."
        )
    test = open_shards(folder / "test")
    if "num_classes" not in facts or "y" not in train or set(train) != set(test):
        raise DataError(
            f"{folder} holds no training and test rows x and y; write it with "
            "`dp-ilg shards`."
        )
    whole = {name: np.asarray(array) for name, array in test.items()}
    for name, array in train.items():
        if (array.shape[1:], array.dtype) != (whole[name].shape[1:], whole[name].dtype):
            raise DataError(
                f"{folder} holds {array.dtype}{list(array.shape[1:])} as {name} to "
                f"train on and {whole[name].dtype}{list(whole[name].shape[1:])} to "
                "test; write both alike."
            )
    _check_labels(folder, train["y"], facts)
    return Dataset(
        facts["name"],
        jax.tree.map(_scaled, _inputs(train)),
        train["y"],
        jax.tree.map(lambda a: np.asarray(_scaled(a)), _inputs(whole)),
        whole["y"],
        num_classes=facts["num_classes"],
        note=f"{facts['note']} Read from shards in {folder}.",
        num_tokens=facts["num_tokens"],
        num_categories=tuple(facts["num_categories"]),
    )


def _check_labels(folder: Path, labels: ShardedArray, facts: dict[str, Any]) -> None:
    """As for files: whole numbers below the number of classes, or of tokens."""
    if labels.dtype.kind not in "iu":
        raise DataError(f"{folder} has {labels.dtype} labels; write whole numbers.")
    most = facts["num_classes"] if labels.ndim == 1 else facts["num_tokens"]
    for first in range(0, len(labels), _LABELS):
        part = labels[first : first + _LABELS]
        if part.size and not (0 <= part.min() and part.max() < most):
            raise DataError(
                f"{folder} has labels outside 0..{most - 1}; write the folder again."
            )


def _scaled(array: Any) -> Any:
    """Images of bytes as numbers from 0 to 1; anything else as it is."""
    is_image = array.dtype == np.uint8 and array.ndim in (3, 4)
    return Pixels(array) if is_image else array


def _inputs(arrays: dict[str, Any]) -> Any:
    """One array, or a tuple of those that are called x.0, x.1 and so on."""
    if "x" in arrays:
        return arrays["x"]
    return tuple(arrays[f"x.{i}"] for i in range(len(arrays) - 1))
