"""The commands of `dp-ilg` and their flags, read from the functions that run them."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

from dp_ilg.experiments.cli import commands, compare, init, report, shards, studies
from dp_ilg.experiments.cli.flags import TRAIN
from dp_ilg.experiments.config.schema import Config
from dp_ilg.experiments.runs.hosts import Devices
from tables.fields import MEANINGS
from tables.lines import Lines, Table, markdown

Command = Callable[..., Any]
COMMANDS: dict[str, Command] = {
    "init": init.init,
    "calibrate": commands.calibrate,
    "epsilon": commands.epsilon,
    "report": report.report,
    "export": commands.export,
    "reproduce": studies.reproduce,
    "audit": studies.audit,
    "compare": compare.compare,
    "shards": shards.shards,
}
SECTIONS = tuple(field.name for field in dataclasses.fields(Config))
_HEAD = ("argument or flag", "meaning", "default")


def flag(name: str) -> str:
    """`data_dir` is given as `--data-dir`."""
    return "--" + name.replace("_", "-")


def flags_of(command: Command) -> list[str]:
    """Every flag of a command but --help; dataclasses give one a field."""
    return [text for text, _, _ in _rows(command) if text.startswith("--")]


def flags(name: str) -> Table:
    """The table of one command."""

    def table(lines: Lines) -> str:
        rows = [[f"`{f}`", meaning, d] for f, meaning, d in _rows(COMMANDS[name])]
        return markdown(_HEAD, rows)

    return table


def _rows(command: Command) -> Iterator[tuple[str, str, str]]:
    meanings = arguments(command)
    for name, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(parameter.default):
            for path, value in fields(parameter.default):  # whose own name is no flag
                yield flag(path), _meaning(f"privacy.{path}"), _default(value)
        elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            yield flag(name), meanings[name], _default(parameter.default)
        else:
            yield name.upper(), meanings[name], _default(parameter.default)


def arguments(function: Command) -> dict[str, str]:
    """What a Google docstring says of every argument, on one line."""
    doc = inspect.getdoc(function) or ""
    block = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", doc, re.DOTALL | re.MULTILINE)
    text = block[1] if block else ""
    found = re.findall(
        r"^    (\w+): (.*?)(?=^    \w|\Z)", text, re.DOTALL | re.MULTILINE
    )
    return {name: " ".join(words.split()).rstrip(".") for name, words in found}


def fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of a configuration's fields and their defaults."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def train(lines: Lines) -> str:
    """What `train` takes beside the fields of a configuration."""
    rows = [[f"`{name}`", words, "-"] for name, words in TRAIN.items()]
    doc = inspect.getdoc(Devices) or ""
    block = doc.split("Attributes:\n")[1].split("\n\n")[0]
    found = re.findall(
        r"^    (\w+): (.*?)(?=^    \w|\Z)", block, re.DOTALL | re.MULTILINE
    )
    words = {name: " ".join(text.split()).rstrip(".") for name, text in found}
    for name, value in fields(Devices()):
        rows.append([f"`{flag('devices.' + name)}`", words[name], _default(value)])
    return markdown(_HEAD, rows)


def train_flags() -> list[str]:
    """Every flag of `train`, without the short forms of fields."""
    own = [name for name in TRAIN if name.startswith("--")]
    return own + [flag(path) for path, _ in _train_fields()]


def _train_fields() -> Iterator[tuple[str, Any]]:
    yield from fields(Devices(), "devices.")
    yield from fields(Config())


def section(name: str) -> Table:
    """The fields of one section of a configuration."""

    def table(lines: Lines) -> str:
        rows = [
            [f"`{path}`", _meaning(path), _default(value)]
            for path, value in fields(Config())
            if path.split(".")[0] == name
        ]
        return markdown(["field", "meaning", "default"], rows)

    return table


def short_flags() -> dict[str, str]:
    """Short flags of `train` and the fields they stand for."""
    found = {}
    for name in SECTIONS:
        config = type(getattr(Config(), name))
        hints = typing.get_type_hints(config, include_extras=True)
        for field, hint in hints.items():
            for note in typing.get_args(hint)[1:]:
                for alias in getattr(note, "aliases", None) or ():
                    found[alias] = f"{name}.{field}"
    return found


def shorts(lines: Lines) -> str:
    """The short flags of `train`."""
    rows = [[f"`{alias}`", f"`{path}`"] for alias, path in short_flags().items()]
    return markdown(["short flag", "field"], rows)


def _meaning(path: str) -> str:
    if path not in MEANINGS:
        raise ValueError(f"config/meanings.py does not say what {path} means.")
    return MEANINGS[path]


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    if value is None or value in ((), ""):
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
