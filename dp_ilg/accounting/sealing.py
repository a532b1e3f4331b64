"""JSON: fields of a plan, lines that say whether they are whole, durable folders."""

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Sequence
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
    for name in ("stages", "prior_releases"):
        if isinstance(fields.get(name), list):
            fields[name] = tuple(
                tuple(pair) if isinstance(pair, list) else pair for pair in fields[name]
            )
    return fields
