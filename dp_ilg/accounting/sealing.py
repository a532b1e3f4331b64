"""Lines of JSON that say whether they are whole, in folders made durable."""

import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

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
