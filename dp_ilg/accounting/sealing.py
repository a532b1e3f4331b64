"""JSON: fields of a plan, sealed lines, in files and folders made durable."""

import dataclasses
import errno
import json
import os
import re
import stat
import string
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

try:
    import fcntl
except ImportError:  # no such locks on this system: then one process is assumed
    fcntl = None

ANY_DIGIT = "?"
_HELD: dict[tuple[int, int], int] = {}
"""Files that a process has locked, by device and inode: its number."""
_SHUT = "close the first ledger, or open it once, in a with statement"
_SEALED_LINE = re.compile(rb'(.*), "crc32": "([0-9a-f]{8})"\}', re.DOTALL)


def seal(record: dict[str, Any]) -> bytes:
    """Returns the record as a line that carries its own CRC-32.

    Example:
        >>> seal({"step": 0}).rstrip()
        b'{"step": 0, "crc32": "239ca07c"}'
    """
    body = json.dumps(record).encode()
    crc = zlib.crc32(body)
    return body[:-1] + f', "crc32": "{crc:08x}"}}\n'.encode()


def unseal(line: bytes) -> dict[str, Any] | None:
    """Returns the record of a line, or None if the line is not as it was written.

    Example:
        >>> unseal(seal({"step": 0}).rstrip()), unseal(b"{}")
        ({'step': 0}, None)
    """
    match = _SEALED_LINE.fullmatch(line)
    if not match or zlib.crc32(match[1] + b"}") != int(match[2], 16):
        return None
    try:
        return json.loads(match[1] + b"}")
    except ValueError:
        return None


def cut_from(form: str, text: str) -> bool:
    """Whether a line may have been cut down to a text while it was being written.

    Args:
        form: the whole line, unknown hexadecimal digits as `ANY_DIGIT`.
        text: what is there.

    Returns:
        False too if nothing is missing.

    Example:
        >>> cut_from("step ??.", "step a"), cut_from("step ??.", "step x")
        (True, False)
    """
    digits = string.hexdigits.lower()
    return len(text) < len(form) and all(
        have == want or (want == ANY_DIGIT and have in digits)
        for have, want in zip(text, form, strict=False)
    )


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where folders can be synced.

    Args:
        folder: that of a file which was made or renamed.

    Raises:
        OSError: if the disk refuses.

    Example:
        >>> sync_folder(Path("."))
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class SealedLog:
    """A file of sealed lines that only grows, locked against a second writer.

    Whatever interrupts a write, the file comes back to its last acknowledged line.

    Attributes:
        path: where the file is.
        count: lines acknowledged, on disk.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = SealedLog(Path(folder, "log.jsonl"))
        ...     whole, tail = log.read()
        ...     log.accept(whole, tail)
        ...     log.append(seal({"step": 0}))
        ...     log.count, log.close()
        (1, None)
    """

    def __init__(self, path: Path):
        """Opens the file, made if it is not there, and locks it.

        Raises:
            ValueError: if it is no regular file.
            OSError: if it cannot be opened, or another process holds it.
        """
        self.path = path
        self._tip = (0, 0)  # lines, bytes: one value, so that no interrupt parts them
        self._has_tail = self._locked = False
        self._file = self._open()
        try:
            self._lock()
        except BaseException:
            self.close()
            raise

    @property
    def count(self) -> int:
        """Lines acknowledged."""
        return self._tip[0]

    @property
    def closed(self) -> bool:
        """Whether nothing more can be written."""
        return self._file < 0

    def read(self) -> tuple[list[bytes], bytes]:
        """Returns the whole lines, without their ends, and what follows them.

        Raises:
            ValueError: if the file is no regular one.
            OSError: if it cannot be read.
        """
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            self.refuse("is not a regular file", "choose another path")
        try:
            with open(self._file, "rb", closefd=False) as file:
                *lines, tail = file.read().split(b"\n")
        except OSError as error:
            self._fail(error, "read", "check the disk")
        return lines, tail

    def accept(self, lines: list[bytes], tail: bytes) -> None:
        """Counts what `read` gave as acknowledged, but for the tail.

        Args:
            lines: whole lines.
            tail: what follows them, cut off by the next write.
        """
        self._tip = (len(lines), sum(map(len, lines)) + len(lines))
        self._has_tail = bool(tail)

    def append(self, line: bytes) -> None:
        """Writes one line and syncs it, or takes back what was written.

        Args:
            line: with its end.

        Raises:
            OSError: if the disk does not take it.
        """
        try:
            if self._has_tail:
                self._trim()
            self._has_tail = True  # until the line is safe, whatever interrupts
            left = line
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            self._try_to_trim()
            self._fail(error, "written", "free some space or mend the disk, then retry")
        count, size = self._tip
        self._tip = (count + 1, size + len(line))
        self._has_tail = False

    def sync(self) -> None:
        """Makes everything that was found, and the file's name, durable.

        Raises:
            OSError: if the disk refuses.
        """
        try:
            self._trim()
            sync_folder(self.path.parent)
        except OSError as error:
            self._fail(error, "synced to the disk", "check the disk")

    def refuse(self, fault: str, remedy: str) -> NoReturn:
        """Raises one sentence about the file.

        Args:
            fault: what is wrong, to follow on the path.
            remedy: what to do.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"The file {self.path} {fault}; {remedy}.")

    def close(self) -> None:
        """Closes the file and lets go of the lock; closing twice is harmless."""
        if self._file >= 0:
            if self._locked:
                _HELD.pop(self._identity(), None)
            os.close(self._file)
            self._file, self._locked = -1, False

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
        try:
            return os.open(self.path, flags | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            self._fail(error, "opened", "choose a folder that exists and is writable")

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            busy = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            if busy and _HELD.get(self._identity()) == os.getpid():
                why, remedy = "opened a second time, since this process holds it", _SHUT
            else:
                why = "opened, since another run holds it" if busy else "locked"
                remedy = "wait for that run, or use another run folder"
            self._fail(error, why, remedy)
        self._locked = True
        _HELD[self._identity()] = os.getpid()

    def _identity(self) -> tuple[int, int]:
        """The file behind the name, whatever it is called."""
        found = os.fstat(self._file)
        return found.st_dev, found.st_ino

    def _trim(self) -> None:
        """Cuts the file back to its last whole, acknowledged line."""
        os.ftruncate(self._file, self._tip[1])
        os.fsync(self._file)
        self._has_tail = False

    def _try_to_trim(self) -> None:
        try:
            self._trim()
        except OSError:
            pass  # the tail is remembered, and the next write trims it first

    def _fail(self, error: OSError, verb: str, remedy: str) -> NoReturn:
        reason = error.strerror or str(error)
        message = f"The ledger {self.path} could not be {verb} ({reason}); {remedy}."
        raise type(error)(error.errno, message) from error


def fields_of(cls: Any, text: str, later: Sequence[str]) -> dict[str, Any]:
    """The fields of a `dp_ilg.accounting.plan.PrivacyPlan` from its JSON.

    Args:
        cls: the dataclass.
        text: a JSON object.
        later: fields that may be absent.

    Returns:
        The fields, pairs as tuples.

    Raises:
        ValueError: if the text is not JSON, or a field is unknown or missing.

    Example:
        >>> from dp_ilg.accounting.plan import PrivacyPlan
        >>> fields_of(PrivacyPlan, "[]", ())
        Traceback (most recent call last):
        ValueError: The plan must be a JSON object with one entry a field.
    """
    try:
        fields = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"The plan is not valid JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ValueError("The plan must be a JSON object with one entry a field.")
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
        if name not in known:
            raise ValueError(
                f"The plan has an unknown field {name!r}; the fields are "
                f"{', '.join(known)}."
            )
    for name in known:
        if name not in fields and name not in later:
            raise ValueError(f"The plan lacks the field {name!r}; write it again.")
    if isinstance(fields.get("strategy"), list):
        fields["strategy"] = tuple(fields["strategy"])
    for name in ("stages", "prior_releases"):
        if isinstance(fields.get(name), list):
            fields[name] = tuple(
                tuple(pair) if isinstance(pair, list) else pair for pair in fields[name]
            )
    return fields
