"""`dp-ilg train --help`: every flag on one line, with what it means and its default."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from dp_ilg.experiments.config.meanings import MEANINGS, SECTIONS
from dp_ilg.experiments.config.schema import Config
from dp_ilg.experiments.runs.hosts import Devices

TRAIN = {  # what `train` takes beside devices and the fields of a configuration
    "CONFIG": "a TOML file; without one, the bundled digits",
    "--run-dir": "where the run is written; by default a new folder in runs/",
    "--data-dir": "a folder of data files (NAME.npz or IDX files)",
    "--resume": "go on with the run folder, or start it if it does not exist",
    "--json": "print one JSON object",
}
_KINDS = {int: "INT", float: "NUMBER", str: "TEXT", bool: ""}
_COLUMN = 38
_HEAD = """usage: dp-ilg train [CONFIG] [flags]

Trains a model with differential privacy and reports it. Every flag but the first few
is a field of CONFIG: --privacy.epsilon is epsilon in [privacy].
"""


def train_help() -> str:
    """The whole text.

    Returns:
        A line a flag, group by group.

    Example:
        >>> print(train_help().splitlines()[6])
          CONFIG                                a TOML file; without one, the bundled \
digits
    """
    lines = [_HEAD, "the command"]
    lines += [_line(name, words, "") for name, words in TRAIN.items()]
    lines.append(_line("--help, -h", "show this and exit", ""))
    groups = {field.name: field.default for field in dataclasses.fields(Config)}
    for group, section in (*groups.items(), ("devices", Devices())):
        about = SECTIONS.get(group)
        lines += ["", f"{group}: {about}" if about else group]
        lines += [_line(*row) for row in _rows(section, f"{group}.")]
    return "\n".join(lines) + "\n"


def meaning_of(flag: str) -> tuple[str, str]:
    """What a flag of `train` means and what may be given, for an error.

    Args:
        flag: such as ``--epsilon`` or ``--privacy.epsilon``.

    Returns:
        Words and a default; both empty for a flag that is none.

    Example:
        >>> meaning_of("--epsilon")
        ('the most privacy to spend; smaller protects more', '8')
    """
    sections = [(f.name, f.default) for f in dataclasses.fields(Config)]
    for group, section in (*sections, ("devices", Devices())):
        for flags, words, default in _rows(section, f"{group}."):
            if flag in flags.replace(",", "").split():
                return words, default
    return "", ""


def _rows(section: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Flags with their kind, words and default of a section."""
    hints = typing.get_type_hints(type(section), include_extras=True)
    for field in dataclasses.fields(section):
        path, value = prefix + field.name, getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _rows(value, f"{path}.")
        else:
            names = [*_aliases(hints[field.name]), f"--{path.replace('_', '-')}"]
            kind = _kind(hints[field.name])
            flags = ", ".join(names) + (f" {kind}" if kind else "")
            yield flags, MEANINGS.get(path, "").replace("`", ""), _default(value)


def _aliases(hint: Any) -> list[str]:
    notes = typing.get_args(hint)[1:] if hasattr(hint, "__metadata__") else ()
    notes = getattr(hint, "__metadata__", notes)
    return [alias for note in notes for alias in getattr(note, "aliases", None) or ()]


def _kind(hint: Any) -> str:
    """What stands behind a flag."""
    if hasattr(hint, "__metadata__"):
        if any(getattr(note, "metavar", "") == "JSON" for note in hint.__metadata__):
            return "JSON"
        hint = hint.__origin__
    inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return "WORD"
    if typing.get_origin(hint) is tuple:
        return f"{_kind(inner[0])} ..."
    if inner:
        return _kind(inner[0])
    return _KINDS.get(hint, "JSON")


def _default(value: Any) -> str:
    if value is None or value == () or value is False or value == "":
        return ""
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _line(flags: str, words: str, default: str) -> str:
    said = f"{words} (default {default})" if default else words
    return f"  {flags:<{_COLUMN - 2}}  {said}".rstrip()
