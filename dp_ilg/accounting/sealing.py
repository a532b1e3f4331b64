"""Lines of JSON that say whether they are whole."""

import json
import re
import zlib
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
