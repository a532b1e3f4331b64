"""A folder of shards: any number of rows in plain .npy files, mapped, not read whole.

``index.json`` says what is there: the number of rows, the arrays with their shapes and
types, and a SHA-256 of every file. A folder is written under another name and renamed
when it is complete, so one that can be opened is whole.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dp_ilg import validation
from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.data.locks import locked
from dp_ilg.experiments.data.shard_rows import RowShape, check_block, flat
from dp_ilg.sampling.gather import length, take

INDEX = "index.json"
_FORMAT = 1
_SHARD_BYTES, _BLOCK_BYTES = 2**28, 2**22
_DRAFT = re.compile(r"\..+\.[0-9a-f]{8}")


class ShardedArray:
    """One array of a folder: rows by position, read from mapped files.

    Attributes:
        shape: ``(rows, ...)``, as of an array.
        dtype: of its entries.

    Privacy:
        Rows come back as arrays in memory. Which parts of the files are read shows
        which rows were drawn to whoever can watch the disk.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "rows"
        >>> _ = write_shards({"x": np.arange(10.0)}, folder, rows_per_shard=4)
        >>> open_shards(folder)["x"][np.array([9, 0, 5])].tolist()
        [9.0, 0.0, 5.0]
    """

    def __init__(
        self, files: list[tuple[Path, str]], row: RowShape, rows: int, per: int
    ):
        """Names the files; nothing is opened."""
        self.shape, self.dtype = (rows, *row.shape), row.dtype
        self._files, self._per = files, per
        self._maps: dict[int, np.ndarray] = {}

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)

    def __getitem__(self, rows: Any) -> np.ndarray:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        picked = np.asarray(rows)
        if picked.ndim != 1 or picked.dtype.kind not in "iu":
            raise TypeError("Shards are indexed by a list of integers or a slice.")
        found = np.empty((len(picked), *self.shape[1:]), self.dtype)
        if picked.size and not 0 <= picked.min() <= picked.max() < len(self):
            bad = picked.min() if picked.min() < 0 else picked.max()
            raise IndexError(
                f"Row {bad} is not among {len(self)} rows; give 0 to {len(self) - 1}."
            )
        shards = picked // self._per
        for shard in np.unique(shards).tolist():
            here = shards == shard
            found[here] = self._map(shard)[picked[here] - shard * self._per]
        return found

    def content_digest(self) -> str:
        """Reads every file once and compares it with the index.

        Returns:
            A SHA-256 over all rows' files.

        Raises:
            DataError: if a file is not what it was when it was written.
        """
        whole = hashlib.sha256(f"{self.dtype} {self.shape}".encode())
        for path, known in self._files:
            if file_digest(path) != known:
                raise DataError(
                    f"{path} is not what its index says; write the folder again."
                )
            whole.update(known.encode())
        return whole.hexdigest()

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._maps:
            path, _ = self._files[shard]
            self._maps[shard] = self._opened(path, shard)
        return self._maps[shard]

    def _opened(self, path: Path, shard: int) -> np.ndarray:
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"{path} cannot be read ({type(error).__name__}); write it again."
            ) from None
        rows = min(self._per, len(self) - shard * self._per)
        if found.shape != (rows, *self.shape[1:]) or found.dtype != self.dtype:
            raise DataError(
                f"{path} holds {found.dtype}{list(found.shape)}, not what its index "
                "says; write the folder again."
            )
        return found


def write_shards(
    source: Any,
    folder: str | Path,
    *,
    rows_per_shard: int | None = None,
    facts: Mapping[str, Any] | None = None,
    parts: Mapping[str, Any] | None = None,
) -> Path:
    """Converts any source into a folder of shards, a few MiB at a time.

    Args:
        source: what `dp_ilg.sampling.gather.take` reads; its rows are arrays in
            dicts and tuples, whose names and places become file names.
        folder: where to; must not exist.
        rows_per_shard: rows of a file; by default what makes 256 MiB.
        facts: JSON values that are kept in the index.
        parts: names to further sources, each a folder of shards inside this one.

    Returns:
        The folder, readable by its owner only.

    Raises:
        DataError: if the folder exists, if rows cannot be read, or if some are not
            finite.
        ValueError: for a source without rows, or rows that differ in type.
        OSError: if it cannot be written; then, and after a kill, there is no folder.

    Privacy:
        The files hold the data as they are. What the source says of a row that it
        cannot read is dropped, since it may quote the row.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "rows"
        >>> sorted(p.name for p in write_shards({"x": np.eye(3)}, folder).iterdir())
        ['index.json', 'x-00000.npy']
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise DataError(f"{folder} exists; choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_drafts(folder)
    draft = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    draft.mkdir(mode=0o700)
    try:
        with locked(draft):
            for name, part in (parts or {}).items():
                (draft / name).mkdir()
                _fill(draft / name, part, rows_per_shard, {})
            _fill(draft, source, rows_per_shard, dict(facts or {}))
            os.rename(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder


def open_shards(folder: str | Path) -> dict[str, ShardedArray]:
    """Opens a folder that `write_shards` made; no row is read.

    Args:
        folder: where it is.

    Returns:
        The arrays by name; ``take`` and the trainer read them like arrays in memory.

    Raises:
        DataError: if the index or a file is absent, damaged or of another format.

    Example:
        >>> open_shards("no/such/folder")
        Traceback (most recent call last):
        dp_ilg.experiments.data.files.DataError: no/such/folder/index.json cannot be \
read (FileNotFoundError); give a folder of shards.
    """
    folder = Path(folder)
    index = read_index(folder)
    rows, per = index["rows"], index["rows_per_shard"]
    found = {}
    for name, row in index["arrays"].items():
        shape = RowShape(tuple(row["shape"]), np.dtype(row["dtype"]))
        files = [(folder / file, digest) for file, digest in row["files"]]
        for shard, (path, _) in enumerate(files):
            held = min(per, rows - shard * per) * shape.bytes
            if not path.is_file() or path.stat().st_size < held:
                raise DataError(f"{path} is absent or cut; write the folder again.")
        found[name] = ShardedArray(files, shape, rows, per)
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """Reads and checks ``index.json``.

    Args:
        folder: of shards.

    Returns:
        Its content: `rows`, `rows_per_shard`, `arrays` and `facts`.

    Raises:
        DataError: if it is absent, damaged or of another format.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        sealed = index.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read ({type(error).__name__}); give a folder of shards."
        ) from None
    except AttributeError:
        raise DataError(f"{path} is no index; give a folder of shards.") from None
    if sealed != _seal(index):
        raise DataError(f"{path} is damaged; write the folder again.")
    if index.get("dp_ilg_shards") != _FORMAT:
        raise DataError(f"{path} has an unknown format; this version reads {_FORMAT}.")
    return index


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read a few MiB at a time.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.

    Raises:
        DataError: if it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    return digest.hexdigest()


def _seal(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _fill(draft: Path, source: Any, per: int | None, facts: dict[str, Any]) -> None:
    rows = length(source)
    first = flat(_read(source, np.zeros(1, np.int64)))
    shapes = {name: RowShape(a.shape[1:], a.dtype) for name, a in first.items()}
    widest = max(max(shape.bytes for shape in shapes.values()), 1)
    per = max(1, _SHARD_BYTES // widest) if per is None else per
    validation.whole("rows_per_shard", per)
    arrays: dict[str, Any] = {
        name: {"shape": list(s.shape), "dtype": s.dtype.str, "files": []}
        for name, s in shapes.items()
    }
    for shard, begin in enumerate(range(0, rows, per)):
        end = min(begin + per, rows)
        blocks = _blocks(source, begin, end, max(1, _BLOCK_BYTES // widest))
        for name, digest in _write_shard(draft, shard, end - begin, shapes, blocks):
            arrays[name]["files"].append([f"{name}-{shard:05d}.npy", digest])
    index = {
        "dp_ilg_shards": _FORMAT,
        "rows": rows,
        "rows_per_shard": per,
        "arrays": arrays,
        "facts": facts,
    }
    index["sha256"] = _seal(index)
    with open(draft / INDEX, "w", encoding="utf-8") as file:
        json.dump(index, file)
        file.flush()
        os.fsync(file.fileno())


def _read(source: Any, indices: np.ndarray) -> Any:
    """Some rows; of what goes wrong nothing is kept but its kind."""
    try:
        return take(source, indices)
    except Exception as error:  # noqa: BLE001 - whatever a loader may raise
        kind = type(error).__name__
    raise DataError(
        f"The rows to write could not be read ({kind}); check that the source gives "
        "every row, all of one shape."
    )


def _blocks(source: Any, begin: int, end: int, size: int) -> Iterator[dict[str, Any]]:
    for start in range(begin, end, size):
        yield flat(_read(source, np.arange(start, min(start + size, end))))


def _write_shard(draft, shard, count, shapes, blocks) -> Iterator[tuple[str, str]]:
    """Writes one file an array, block by block; yields names and digests."""
    paths = {name: draft / f"{name}-{shard:05d}.npy" for name in shapes}
    with contextlib.ExitStack() as stack:
        files = {n: stack.enter_context(open(p, "wb")) for n, p in paths.items()}
        for name, (shape, dtype) in shapes.items():
            facts = {"descr": dtype.str, "fortran_order": False}
            facts["shape"] = (count, *shape)
            np.lib.format.write_array_header_2_0(files[name], facts)
        for block in blocks:
            for name, array in block.items():
                check_block(name, array, shapes[name])
                files[name].write(np.ascontiguousarray(array).data)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    for name, path in paths.items():
        yield name, file_digest(path)


def _remove_drafts(folder: Path) -> None:
    """Removes what writers that were killed left beside the folder."""
    for path in folder.parent.glob(f".{folder.name}.*"):
        if path.is_dir() and _DRAFT.fullmatch(path.name):
            with contextlib.suppress(ValueError, OSError), locked(path):
                shutil.rmtree(path, ignore_errors=True)
