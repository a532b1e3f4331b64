"""Epsilons on disk: what took seconds to compute is looked up the next time.

An entry is found by the whole text of what was asked (every number of the event to the
last bit, the versions of dp_accounting, SciPy and NumPy, and the source code of the
accountants), and holds that text, so that it cannot answer another question. Plans are
public, and so is the cache; but who writes to it decides what is claimed, so entries
that others could have written are not read. Whatever is wrong with an entry, the number
is computed again.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import secrets
import stat
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

VARIABLE = "DP_ILG_CACHE"
_WORTH_SECONDS = 0.2  # what is faster is not kept
_SOURCES = (
    "accountants",
    "certified/accountant",
    "certified/contour",
    "certified/moments",
    "certified/runs",
    "kinds",
    "renyi",
    "truncation",
)
_PACKAGES = ("dp-accounting", "numpy", "scipy")


def cache_folder() -> Path | None:
    """Where epsilons are kept.

    Returns:
        The folder ``epsilon`` in the one that the environment variable DP_ILG_CACHE
        names, else in ``dp_ilg`` of the user's cache folder (XDG_CACHE_HOME or
        ``~/.cache``); None if DP_ILG_CACHE is set and empty, which turns it off.

    Example:
        >>> folder = cache_folder()
        >>> folder is None or folder.name == "epsilon"
        True
    """
    chosen = os.environ.get(VARIABLE)
    if chosen == "":
        return None
    if chosen:
        return Path(chosen) / "epsilon"
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # nobody's home
        return None
    return Path(base) / "dp_ilg" / "epsilon"


def remembered(question: object, compute: Callable[[], float]) -> float:
    """Looks a number up, or computes it and keeps it if that took long.

    Args:
        question: everything the number depends on; its ``repr`` must tell apart
            whatever gives another number, as that of numbers, strings and tuples does.
        compute: makes the number.

    Returns:
        The number.

    Privacy:
        A number is read only if the entry's text is this question, letter by letter,
        the digest over text and number fits, and the file is a regular one of this
        user that nobody else may write to. Files are made with mode 0600.

    Example:
        >>> remembered(("a plan", 0.1), lambda: 2.0)
        2.0
    """
    folder, text = cache_folder(), _text(question)
    if folder is None or text is None:
        return compute()
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    found = _read(path, text)
    if found is not None:
        return found
    began = time.perf_counter()
    value = compute()
    if time.perf_counter() - began > _WORTH_SECONDS:
        with contextlib.suppress(OSError):  # a full or read-only disk: not kept
            _write(path, _entry(text, value))
    return value


@cache
def _version() -> str | None:
    """Names the code that computes; None where it cannot be read."""
    digest = hashlib.sha256()
    try:
        for name in _SOURCES:
            digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    except OSError:
        return None
    versions = [importlib.metadata.version(name) for name in _PACKAGES]
    return " ".join([digest.hexdigest(), *versions])


def _text(question: object) -> str | None:
    version = _version()
    return None if version is None else f"{version} {question!r}"


def _entry(text: str, value: float) -> str:
    number = float(value).hex()
    digest = hashlib.sha256(f"{text} {number}".encode()).hexdigest()
    return json.dumps({"question": text, "epsilon": number, "sha256": digest})


def _read(path: Path, text: str) -> float | None:
    try:
        with open(path, encoding="utf-8") as file:
            facts = os.fstat(file.fileno())
            owned = not hasattr(os, "getuid") or facts.st_uid == os.getuid()
            shared = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if not (owned and stat.S_ISREG(facts.st_mode)) or shared:
                return None
            found = file.read()
        value = float.fromhex(json.loads(found)["epsilon"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    return value if found == _entry(text, value) else None


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
