"""Data sets of the user's own: an .npz file, a folder, or a function of a module.

What is a public fact and not in the arrays (how many classes there are, how large the
vocabulary is, what inputs are divided by) is stated in the configuration or the file.
It is never taken from the private rows, since that would be a release.
"""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dp_ilg.experiments.config.data import DataConfig
from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.data.datasets import LOADERS, load_dataset
from dp_ilg.experiments.data.files import DataError, read_npz
from dp_ilg.experiments.data.folders import is_folder_name, load_folder
from dp_ilg.experiments.data.own.arrays import as_dataset
from dp_ilg.experiments.data.shards import INDEX
from dp_ilg.registry.lookup import described, resolve

NOT_STATED = "What was computed from the data beforehand is not stated."
_ASKED = ("x_train", "y_train", "x_test", "y_test")
_FACTS = ("num_classes", "num_tokens", "note")


def is_data_path(name: str) -> bool:
    """Whether a data set's name is the path of a file or folder.

    Args:
        name: as in ``data.name``.

    Returns:
        True if it ends in .npz, or has a slash and names no function.

    Example:
        >>> [is_data_path(n) for n in ("./rows", "my.npz", "digits", "./my.py:load")]
        [True, True, False, False]
    """
    names_code = re.search(r"\.py:[\w.]+$", name)
    return name.endswith(".npz") or (is_folder_name(name) and not names_code)


def load_named(chosen: DataConfig, data_dir: Path | None = None) -> Dataset:
    """Loads whatever ``data.name`` names.

    Args:
        chosen: the section "data".
        data_dir: where data files of rows of `LOADERS` are.

    Returns:
        The data set. Its note says what the maker said was computed from the data, or
        that nothing was said.

    Raises:
        DataError: in one sentence, for data that are absent, damaged, of another shape,
            or lack a fact, naming what was found.

    Privacy:
        Facts that are stated are public and cost nothing. The test part, and whatever
        the maker computed beforehand, no guarantee covers.

    Example:
        >>> load_named(DataConfig(name="no.npz"))
        Traceback (most recent call last):
        dp_ilg.experiments.data.files.DataError: The file no.npz cannot be opened (No \
such file or directory); check the path.
    """
    name = chosen.name
    if is_data_path(name):
        return _of_path(Path(name), chosen)
    if name in LOADERS:
        return _agreed(load_dataset(name, data_dir), chosen)
    return _of_function(name, resolve("dataset", name, LOADERS, "data.name"), chosen)


def _of_path(path: Path, chosen: DataConfig) -> Dataset:
    if path.suffix == ".npz":
        return _made(path.stem, str(path), _npz(path), chosen)
    if not path.is_dir():
        there = "is a file, but no .npz" if path.exists() else "does not exist"
        raise DataError(
            f"{path} {there}; give a folder, or arrays x_train, y_train, x_test and "
            "y_test in a file that numpy.savez wrote."
        )
    if (path / INDEX).exists():
        return _agreed(load_folder(path), chosen)
    arrays = {file.stem: _npy(file) for file in sorted(path.glob("*.npy"))}
    if "x_train" not in arrays:
        there = ", ".join(sorted(f.name for f in path.iterdir())[:8]) or "nothing"
        raise DataError(
            f"{path} holds {there}, but neither index.json (dp-ilg shards) nor "
            "x_train.npy, y_train.npy, x_test.npy and y_test.npy; write them with "
            "numpy.save, or give a file ./NAME.npz."
        )
    return _made(path.name, str(path), arrays, chosen)


def _npz(path: Path) -> dict[str, np.ndarray]:
    """What there is of the arrays and facts; others by name only, for the error."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [Path(n).stem for n in archive.namelist() if n.endswith(".npy")]
    except (OSError, ValueError, zipfile.BadZipFile):
        names = ["x_train"]  # the reader has a sentence for each of these
    wanted = [name for name in names if name in (*_ASKED, *_FACTS)]
    return {name: np.empty(0) for name in names} | read_npz(path, wanted)


def _npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"The file {path} is no readable .npy file ({type(error).__name__}); write "
            "it with numpy.save."
        ) from None


def _of_function(name: str, function: Any, chosen: DataConfig) -> Dataset:
    try:
        found = function()
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - somebody else's code
        words = " ".join(str(error).split())
        raise DataError(
            f"data.name is {name!r}, which raises {type(error).__name__}: {words}; "
            "see docs/guides/extend.md."
        ) from error
    if isinstance(found, Dataset):
        return _agreed(found, chosen)
    if isinstance(found, tuple | list) and len(found) == len(_ASKED):
        found = dict(zip(_ASKED, found, strict=True))
    if not isinstance(found, Mapping):
        raise DataError(
            f"data.name is {name!r}, which returns {described(found)}, but must return "
            "a mapping with x_train, y_train, x_test and y_test, or these four."
        )
    return _made(name.rpartition(":")[2], name, dict(found), chosen)


def _made(
    name: str, source: str, arrays: dict[str, Any], chosen: DataConfig
) -> Dataset:
    facts = {key: arrays.pop(key) for key in _FACTS if key in arrays}
    said = str(facts["note"]).strip() if "note" in facts else ""
    whole = {key: int(facts[key]) for key in _FACTS[:2] if key in facts}
    return as_dataset(name, source, arrays, whole, said or NOT_STATED, chosen)


def _agreed(data: Dataset, chosen: DataConfig) -> Dataset:
    """Data that state their own facts; the configuration cannot say otherwise."""
    for field, own in (("num_classes", data.num_classes), ("num_tokens", None)):
        given = getattr(chosen, field)
        if given is not None and given != (data.num_tokens if own is None else own):
            there = data.num_tokens if own is None else own
            raise DataError(
                f"data.{field} is {given}, but {chosen.name} states {there} itself; "
                "leave it out."
            )
    if chosen.scale is not None:
        raise DataError(
            f"data.scale is {chosen.scale:g}, but {chosen.name} says itself how it is "
            "scaled; leave it out."
        )
    return data
