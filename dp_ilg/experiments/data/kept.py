"""Rows of float16 that were computed once and are kept on disk, mapped, checksummed.

A file is named by a digest of what it was made from, written under another name first
and readable by its owner only.
"""

import contextlib
import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None

CACHE_VARIABLE = "DP_ILG_CACHE"
DTYPE = np.dtype(np.float16)  # normalised features: rounding moves them by 5e-4
_CHECKSUM_BYTES = 4
_DRAFT_SECONDS = 86_400  # nobody writes for a day


def cache_folder() -> Path:
    """Where features are kept.

    Returns:
        The folder that the environment variable DP_ILG_CACHE names, else ``dp_ilg`` in
        the user's cache folder.

    Privacy:
        What is kept there is as private as the data it was computed from.

    Example:
        >>> cache_folder().name != ""
        True
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dp_ilg"


class Kind(NamedTuple):
    """Which rows: their name, what decides them, how wide they are.

    Example:
        >>> Kind("scattering", "J2 L8", 3969).width
        3969
    """

    name: str
    tag: str
    width: int


def kept(
    inputs: np.ndarray,
    kind: Kind,
    chunks: Callable[[], Iterator[np.ndarray]],
    folder: Path,
    rows: int | None = None,
) -> np.ndarray:
    """Rows mapped from the cache; computed first if they are not there whole.

    Args:
        inputs: what they are computed from; its bytes are part of the file's name.
        kind: what is computed.
        chunks: computes them, some rows at a time.
        folder: of the cache. One that cannot be written to is done without.
        rows: how many; by default as many as inputs.

    Returns:
        float16 ``[rows, kind.width]``.

    Raises:
        OSError: if what was written cannot be read back.

    Privacy:
        The file is as private as the inputs, and has mode 0600.

    Example:
        >>> folder, kind = Path(tempfile.mkdtemp()), Kind("twice", "x 2", 1)
        >>> x = np.ones((3, 1), np.float32)
        >>> kept(x, kind, lambda: iter([2 * x]), folder).ravel().tolist()
        [2.0, 2.0, 2.0]
    """
    path = folder / f"{kind.name}-{_digest(inputs, kind.tag)}.npy"
    shape = (len(inputs) if rows is None else rows, kind.width)
    found = _read(path, shape)
    if found is not None:
        return found
    try:
        with _alone(folder):
            found = _read(path, shape)  # another run may have been there first
            if found is None:
                _write(path, shape, chunks())
    except OSError:  # no room, no right: then without
        return np.concatenate([np.empty((0, kind.width), DTYPE), *chunks()])
    found = found if found is not None else _read(path, shape)
    if found is None:
        raise OSError(f"The file {path} cannot be read back; check its disk.")
    return found


def _digest(inputs: np.ndarray, tag: str) -> str:
    digest = hashlib.sha256()
    digest.update(f"{tag} {inputs.dtype} {inputs.shape} ".encode())
    for part in inputs:
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()[:32]


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    """The file as a map, or None if it is not exactly what was written."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.memmap) or found.dtype != DTYPE:
            return None
        end = found.offset + found.nbytes
        with path.open("rb") as file:
            file.seek(end)
            checksum = file.read()
    except (OSError, ValueError, EOFError):
        return None
    fits = found.shape == shape and checksum == _checksum(found)
    return found if fits else None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other run computes features: two would do the same work."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a disk without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(path: Path, shape: tuple[int, int], chunks: Iterator[np.ndarray]) -> None:
    """Under another name first: a run that is killed leaves no half file behind."""
    _clear_drafts(path.parent)
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".draft")  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            header = {"descr": DTYPE.str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            checksum = 0
            for chunk in chunks:
                content = chunk.astype(DTYPE).tobytes()
                checksum = zlib.crc32(content, checksum)
                file.write(content)
            file.write(checksum.to_bytes(_CHECKSUM_BYTES, "little"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def _clear_drafts(folder: Path) -> None:
    """Removes what runs that were killed left behind."""
    for draft in folder.glob("*.draft"):
        with contextlib.suppress(OSError):  # another run was faster
            if time.time() - draft.stat().st_mtime > _DRAFT_SECONDS:
                draft.unlink()


def _checksum(found: np.ndarray) -> bytes:
    checksum = 0
    for part in np.array_split(found, max(1, found.nbytes >> 24)):
        checksum = zlib.crc32(np.ascontiguousarray(part).data, checksum)
    return checksum.to_bytes(_CHECKSUM_BYTES, "little")
