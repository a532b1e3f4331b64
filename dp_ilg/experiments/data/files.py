"""Readers of .npz and IDX files that trust nothing the files say of themselves.

A header that promises more than the file can hold is refused before any memory is
asked for, pickled objects are never loaded, and whatever is wrong with a file ends in
one `DataError` that names it.
"""

import gzip
import hashlib
import math
import os
import struct
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

# What the parsers below raise on bytes that are not what they should be.
_DAMAGE = (
    ValueError,  # also UnicodeDecodeError
    OSError,  # also gzip.BadGzipFile
    EOFError,
    RuntimeError,  # also NotImplementedError and RecursionError
    OverflowError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    tokenize.TokenError,  # from .npy headers, as the next three
    SyntaxError,
    TypeError,
    KeyError,
)
_DEFLATE_RATIO = 1032  # no deflate stream expands more than this
_HEADER_READERS = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}
_UINT8_CODE = 0x08  # the IDX code for unsigned bytes


class DataError(ValueError):
    """Data that cannot be used; the message is one sentence with file and remedy.

    Example:
        >>> issubclass(DataError, ValueError)
        True
    """


def find_file(folders: Iterable[Path], names: Iterable[str]) -> Path | None:
    """Returns the first file that exists, folder by folder.

    Args:
        folders: where to look, in order.
        names: the names it may have, in order.

    Returns:
        Its path, or None.

    Example:
        >>> find_file([Path("/nonexistent")], ["mnist.npz"]) is None
        True
    """
    names = list(names)
    paths = (folder / name for folder in folders for name in names)
    return next((path for path in paths if path.is_file()), None)


def read_npz(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads some arrays of an .npz file.

    `numpy.load` allocates what a header promises before it looks for the data; here
    the promise is first held against the size of the file.

    Args:
        path: the file.
        names: which arrays; others in the file are not read.

    Returns:
        The arrays by name.

    Raises:
        DataError: for a file that is absent, damaged or no .npz, lacks an array, or
            holds pickled objects.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.npz")
        ...     np.savez(path, x_train=np.arange(3))
        ...     read_npz(path, ["x_train"])["x_train"].tolist()
        [0, 1, 2]
    """
    names = list(names)

    def read() -> dict[str, np.ndarray]:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's advice on Python 2's headers
            return {name: _read_member(path, archive, name) for name in names}

    return _guarded(path, read, "is no readable .npz file", "write it with numpy.savez")


def hashed_place(word: str, places: int) -> int:
    """One of a fixed number of places for a word, whichever other words there are.

    Args:
        word: any text.
        places: how many there are, a public constant.

    Returns:
        1 to `places`; different words may share one. BLAKE2b without a key.

    Privacy: a list of the words that occur would be a release; this needs none.

    Example:
        >>> hashed_place("N14228", 4096) == hashed_place("N14228", 4096)
        True
        >>> {hashed_place(str(i), 2) for i in range(20)} == {1, 2}
        True

    Reference: Weinberger et al. 2009, "Feature hashing for large scale multitask
        learning".
    """
    digest = hashlib.blake2b(word.encode(), digest_size=8, person=b"dp_ilg.place")
    return 1 + int.from_bytes(digest.digest(), "little") % places


def read_words(path: Path) -> tuple[str, ...]:
    """Reads the vocabulary ``vocab`` of an .npz file of texts, if it has one.

    Args:
        path: the file.

    Returns:
        The words by their ids; empty if there are none in the file.

    Raises:
        DataError: as `read_npz`, or for words that are no strings.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.npz")
        ...     np.savez(path, vocab=np.array(["<pad>", "good"]))
        ...     read_words(path)
        ('<pad>', 'good')
    """

    def names() -> list[str]:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()

    advice = ("is no readable .npz file", "write it with numpy.savez")
    if "vocab.npy" not in _guarded(path, names, *advice):
        return ()
    words = read_npz(path, ["vocab"])["vocab"]
    if words.ndim != 1 or words.dtype.kind != "U":
        raise DataError(
            f"vocab in {path} is {words.dtype} of shape {words.shape}, but must be a "
            "list of words; write it from strings."
        )
    return tuple(words.tolist())


def read_idx(path: Path, num_axes: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Args:
        path: the file.
        num_axes: 3 for images, 1 for labels.

    Returns:
        uint8 array with that many axes.

    Raises:
        DataError: for a file that is absent, of another kind, truncated, or longer
            than its header says.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "labels")
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 2, 5, 7]))
        ...     read_idx(path, 1).tolist()
        [5, 7]
    """

    def read() -> np.ndarray:
        opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            return _parse_idx(path, file, num_axes)

    return _guarded(path, read, "is no readable IDX file", "download it again")


def read_idx_folder(
    folders: Iterable[Path],
) -> tuple[dict[str, np.ndarray], Path] | None:
    """Reads images and labels from the first folder that has MNIST's four files.

    Known names are ``train-images-idx3-ubyte`` and the like, with a dot for the second
    dash, without ``-ubyte``, or gzipped; ``t10k`` marks the test part.

    Args:
        folders: where to look, in order.

    Returns:
        `x_train`, `y_train`, `x_test`, `y_test` and the folder; None if there is no
        file of training images anywhere.

    Raises:
        DataError: if the other three are not all there, or one is damaged.

    Example:
        >>> read_idx_folder([Path("/nonexistent")]) is None
        True
    """
    found = find_file(folders, _idx_names("train", "images", 3))
    if found is None:
        return None
    arrays = {}
    for part, prefix in (("train", "train"), ("test", "t10k")):
        for letter, what, num_axes in (("x", "images", 3), ("y", "labels", 1)):
            names = _idx_names(prefix, what, num_axes)
            path = find_file([found.parent], names)
            if path is None:
                raise DataError(
                    f"The folder {found.parent} lacks {names[0]}; put all four IDX "
                    "files there."
                )
            arrays[f"{letter}_{part}"] = read_idx(path, num_axes)
    return arrays, found.parent


def _idx_names(prefix: str, what: str, num_axes: int) -> list[str]:
    return [
        f"{prefix}-{what}{mark}idx{num_axes}{suffix}{packed}"
        for mark in "-."
        for suffix in ("-ubyte", "")
        for packed in ("", ".gz")
    ]


def _guarded(path: Path, read: Callable[[], Any], fault: str, remedy: str) -> Any:
    """Returns what `read` returns, with every failure as one `DataError`."""
    try:
        return read()
    except DataError:
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise DataError(
            f"The file {path} cannot be opened ({error.strerror}); check the path."
        ) from error
    except _DAMAGE as error:
        kind = type(error).__name__
        raise DataError(f"The file {path} {fault} ({kind}); {remedy}.") from error


def _read_member(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    member = f"{name}.npy"
    if member not in archive.namelist():
        raise DataError(
            f"The file {path} has no array {name!r}; add it, or remove the file."
        )
    info = archive.getinfo(member)
    with archive.open(member) as file:
        shape, dtype = _header(path, name, file)
        _check_promise(path, name, info, file.tell() + _num_bytes(shape, dtype))
    with archive.open(member) as file:
        array = npy.read_array(file, allow_pickle=False)
    return array


def _header(path: Path, name: str, file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = npy.read_magic(file)
    if version not in _HEADER_READERS:
        raise DataError(
            f"The array {name!r} in {path} has the .npy format {version}; "
            "save plain arrays with numpy.savez."
        )
    shape, _, dtype = _HEADER_READERS[version](file)
    if dtype.hasobject:
        raise DataError(
            f"The array {name!r} in {path} holds pickled Python objects, which are "
            "never loaded; save plain numbers or strings."
        )
    if dtype.kind not in "biufSU" or not dtype.itemsize or min(shape, default=0) < 0:
        raise DataError(
            f"The array {name!r} in {path} has a type or size that is neither numbers "
            "nor strings; save it again with numpy.savez."
        )
    return shape, dtype


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(int(size) for size in shape) * dtype.itemsize


def _check_promise(path: Path, name: str, info: zipfile.ZipInfo, promised: int) -> None:
    """Refuses an array whose declared size the file cannot hold."""
    ratio = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: _DEFLATE_RATIO}
    if info.compress_type not in ratio:
        raise DataError(
            f"The array {name!r} in {path} is packed in a way numpy never writes; "
            "write the file with numpy.savez_compressed."
        )
    most = (path.stat().st_size + 1) * ratio[info.compress_type]
    if promised != info.file_size or promised > most:
        raise DataError(
            f"The array {name!r} in {path} should have {promised} bytes, but the file "
            f"holds {min(info.file_size, most)}; copy or download it again."
        )


def _parse_idx(path: Path, file: Any, num_axes: int) -> np.ndarray:
    magic = file.read(4)
    if magic != bytes([0, 0, _UINT8_CODE, num_axes]):
        raise DataError(
            f"The file {path} starts with {magic.hex() or 'nothing'}, but an IDX file "
            f"of {num_axes} axes of bytes starts with 000008{num_axes:02x}; pass the "
            "right file."
        )
    shape = struct.unpack(f">{num_axes}I", file.read(4 * num_axes))
    promised = math.prod(shape)
    is_packed = path.suffix == ".gz"
    most = os.path.getsize(path) * (_DEFLATE_RATIO if is_packed else 1)
    content = file.read(promised + 1) if promised <= most else b""
    if len(content) != promised:
        amount = "more" if len(content) > promised else "fewer"
        raise DataError(
            f"The file {path} promises {promised} bytes of data and has {amount}; "
            "download it again."
        )
    return np.frombuffer(content, np.uint8).reshape(shape)
