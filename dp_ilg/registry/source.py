"""Loads code by name and says which code it was.

A name is ``package.module:name`` or ``./file.py:name``. What was loaded comes with a
digest of its source, so that a run that is resumed can refuse other code.
"""

import functools
import hashlib
import importlib
import importlib.util
import platform
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

_FILES: dict[Path, ModuleType] = {}
_REMEDY = "mend it, or give package.module:name or ./file.py:name"
_NAMED_ELSEWHERE = {"dp_ilg", "jax", "jaxlib", "optax", "flax", "numpy"}
"""Makers of values whose versions a run's record has anyway."""


class Loaded(NamedTuple):
    """Something from outside, and which code it is.

    Attributes:
        value: what the name stands for.
        digest: 16 hexadecimal digits of the source it was loaded from.
        module: the module that holds it.

    Example:
        >>> load("rule", "math:sqrt").value(9.0)
        3.0
    """

    value: Any
    digest: str
    module: str


def is_path(name: str) -> bool:
    """Whether a name says where code is, rather than being a row of a table.

    Args:
        name: as in a configuration.

    Returns:
        True if there is a colon in it.

    Example:
        >>> is_path("mine.rules:steep"), is_path("./rules.py:steep"), is_path("paper")
        (True, True, False)
    """
    return isinstance(name, str) and ":" in name


def load(place: str, name: str) -> Loaded:
    """Imports what a name stands for.

    A file is read from the current folder, once in a process; a module is imported as
    Python does, which does not look there.

    Args:
        place: what the caller calls the name, for errors.
        name: ``package.module:name`` or ``./file.py:name``.

    Returns:
        The thing, and the digest of the file, or of every Python file of the package
        it comes from.

    Raises:
        ValueError: in one sentence, for a file or module that is absent or cannot be
            imported, or that has no such name.

    Privacy:
        The code runs, whatever it is: read it before you name it.

    Example:
        >>> load("importance", "no_such_module:rule")
        Traceback (most recent call last):
        ValueError: importance is 'no_such_module:rule', but no_such_module cannot be \
imported (ModuleNotFoundError: No module named 'no_such_module'); mend it, or give \
package.module:name or ./file.py:name.
    """
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ValueError(
            f"{place} is {name!r}, but must name something in a module; give "
            "package.module:name or ./file.py:name."
        )
    is_file = where.endswith(".py")
    module = _of_file(place, name, where) if is_file else _of_name(place, name, where)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            there = [n for n, v in vars(module).items() if _is_own(n, v, module)]
            raise ValueError(
                f"{place} is {name!r}, but {where} has no {attribute}; it has "
                f"{', '.join(sorted(there)) or 'nothing of its own'}."
            )
        value = getattr(value, part)
    digest = module.__digest__ if is_file else _digests(module, value)
    return Loaded(value, digest, module.__name__)


def _is_own(name: str, value: Any, module: ModuleType) -> bool:
    """Whether a module made a name itself, and for others."""
    here = getattr(value, "__module__", module.__name__) == module.__name__
    return here and not name.startswith("_") and not isinstance(value, ModuleType)


def _of_file(place: str, name: str, where: str) -> ModuleType:
    """The module of a file, which is read once in a process, as Python does."""
    path = Path(where).expanduser().resolve()
    if path in _FILES:
        return _FILES[path]
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{place} is {name!r}, but {path} cannot be read "
            f"({error.strerror}); a path is taken from the current folder."
        ) from None
    digest = hashlib.sha256(content).hexdigest()[:16]
    module = ModuleType(f"{path.stem}_{digest}")
    module.__file__ = str(path)
    module.__dict__["__digest__"] = digest
    sys.modules[module.__name__] = module  # dataclasses look there
    try:
        exec(compile(content, str(path), "exec"), vars(module))  # noqa: S102
    except (Exception, SystemExit) as error:  # whatever it is, one sentence
        del sys.modules[module.__name__]
        raise ValueError(_failed(place, name, where, error)) from None
    _FILES[path] = module
    return module


def _of_name(place: str, name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except (Exception, SystemExit) as error:  # whatever it is, one sentence
        raise ValueError(_failed(place, name, where, error)) from None


def _failed(place: str, name: str, where: str, error: BaseException) -> str:
    """What went wrong, and in which line of which file, where that is known."""
    kind, words = type(error).__name__, " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if f.filename != __file__ and "<frozen" not in str(f)]
    theirs = [f for f in theirs if "importlib" not in f.filename]
    line = f", line {theirs[-1].lineno} of {theirs[-1].filename}" if theirs else ""
    beside = Path(f"{where.replace('.', '/')}.py")
    remedy = _REMEDY
    if isinstance(error, ModuleNotFoundError) and beside.is_file():
        remedy = f"the file is in this folder, so give ./{beside}:{name.split(':')[-1]}"
    return (
        f"{place} is {name!r}, but {where} cannot be imported "
        f"({kind}: {words}{line}); {remedy}."
    )


def _digests(module: ModuleType, value: Any) -> str:
    """Of the package of a module, and of the one its value was written in."""
    tops = {module.__name__.partition(".")[0]}
    maker = getattr(value, "__module__", None)
    if isinstance(maker, str) and maker in sys.modules:
        tops |= {maker.partition(".")[0]} - _NAMED_ELSEWHERE
    found = [package_digest(top) for top in sorted(tops)]
    return hashlib.sha256(" ".join(found).encode()).hexdigest()[:16]


def forget() -> None:
    """Lets files and digests be read anew, as in another process.

    Example:
        >>> forget()
    """
    _FILES.clear()
    package_digest.cache_clear()


@functools.cache
def package_digest(name: str) -> str:
    """A digest of every Python file of a package, as they were when first asked for.

    Args:
        name: a package or module that has been imported, without dots.

    Returns:
        64 hexadecimal digits; for what is part of Python itself, of its version.

    Example:
        >>> package_digest("json") == package_digest("json")
        True
    """
    module = sys.modules[name]
    roots = [Path(root) for root in getattr(module, "__path__", ())]
    file = getattr(module, "__file__", None)
    digest = hashlib.sha256(f"{name} ".encode())
    if not roots and file is None:  # built into Python
        digest.update(platform.python_version().encode())
    for root in roots or ([Path(file)] if file else []):
        files = sorted(root.rglob("*.py")) if root.is_dir() else [root]
        for path in files:
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()
