"""Mappings to frozen dataclasses, strictly, and back to TOML."""

import dataclasses
import json
import sys
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from tyro.constructors import PrimitiveConstructorSpec

from dp_ilg.validation import listed, nearest

T = TypeVar("T")


def required(default: Any) -> Any:
    """A dataclass field with a default in Python that a file must still state.

    Args:
        default: its value for code and for the bundled run.

    Returns:
        The field.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Data:
        ...     name: str = required("digits")
        >>> from_mapping(Data, {}, source="file")
        Traceback (most recent call last):
        ValueError: file lacks the field name (for example name = 'digits').
    """
    return dataclasses.field(default=default, metadata={"required": True})


def from_mapping(cls: type[T], mapping: Any, *, source: str, where: str = "") -> T:
    """Builds a frozen dataclass from a mapping, or says in one sentence why not.

    Args:
        cls: the dataclass; its annotations are the types.
        mapping: field names to values, as TOML or JSON give them.
        source: how errors name the whole, for example a path.
        where: the dotted place inside it, empty at the top.

    Returns:
        The instance; integers stand for floats, lists for tuples.

    Raises:
        ValueError: for unknown, missing or mistyped fields.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Run:
        ...     steps: int = 1
        >>> from_mapping(Run, {"steps": "many"}, source="file")
        Traceback (most recent call last):
        ValueError: file has steps = 'many', but it must be a whole number.
    """
    if not isinstance(mapping, dict):
        place = where or "its content"
        raise ValueError(f"{source} has {place} = {mapping!r}, but it must be a table.")
    prefix = f"{where}." if where else ""
    hints = get_type_hints(cls)
    for name, value in mapping.items():
        if value is False and prefix + name in RENAMED:
            continue  # an older run folder says that it asks for nothing
        if prefix + name in RENAMED:
            raise ValueError(f"{source} has {renamed(prefix + name)}")
        if name not in hints:
            kind = "section" if isinstance(value, dict) else "field"
            words = unknown(prefix + name, hints, prefix, kind=kind)
            raise ValueError(f"{source} has {words}")
    values = {
        name: _typed(hints[name], value, source, prefix + name)
        for name, value in mapping.items()
        if name in hints
    }
    # last, since a name with a typo in it is also one that is missing
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if field.metadata.get("required") and field.name not in mapping:
            raise ValueError(f"{source} lacks {_missing(field, prefix)}")
    return cls(**values)


RENAMED = {"run.show_private_loss": "run.unprotected_train_loss"}
"""Fields that had a name which did not say what they do, and what they are now."""


def renamed(name: str) -> str:
    """Words for a field that has another name by now.

    Args:
        name: a key of `RENAMED`.

    Returns:
        The end of a sentence.

    Example:
        >>> renamed("run.show_private_loss")[:52]
        'a field run.show_private_loss, which is now called r'
    """
    return (
        f"a field {name}, which is now called {RENAMED[name]}, since what it shows is "
        "not protected; use that name, or metrics.release for a protected one."
    )


def unknown(name: str, known: Any, prefix: str = "", *, kind: str = "field") -> str:
    """Words for an unknown name: with the nearest known one, or all of them.

    Args:
        name: what was given.
        known: the names there are.
        prefix: what goes before each known name.
        kind: what it names.

    Returns:
        The end of a sentence.

    Example:
        >>> unknown("epsilom", ["epsilon", "delta"])
        'an unknown field epsilom; did you mean epsilon?'
    """
    return f"an unknown {kind} {name}; {nearest(name, [prefix + k for k in known])}"


def given(section: Any, *besides: str) -> dict[str, Any]:
    """Fields of a dataclass that are not None.

    Args:
        section: the dataclass.
        *besides: names of fields to leave out.

    Returns:
        Names to values.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Run:
        ...     steps: int = 1
        ...     seed: int | None = None
        >>> given(Run())
        {'steps': 1}
    """
    names = [f.name for f in dataclasses.fields(section) if f.name not in besides]
    values = {name: getattr(section, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def assignments(section: Any) -> list[str]:
    """A dataclass as lines of TOML; left out is what is None, or a table of nothing.

    Args:
        section: the dataclass, of scalars, tuples and dataclasses.

    Returns:
        One ``name = value`` a field.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Run:
        ...     names: tuple[str, ...] = ("a", "b")
        >>> print(assignments(Run())[0])
        names = ["a", "b"]
    """
    found = {name: _toml(value) for name, value in given(section).items()}
    return [f"{name} = {text}" for name, text in found.items() if text != "{}"]


def _toml(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return "{" + ", ".join(assignments(value)) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):  # TOML's basic strings are JSON's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)


def _missing(field: Any, prefix: str) -> str:
    if dataclasses.is_dataclass(field.default):
        return f"the section [{prefix}{field.name}]."
    default = field.default
    return f"the field {prefix}{field.name} (for example {field.name} = {default!r})."


_SCALARS = {
    bool: ("true or false", lambda v: isinstance(v, bool)),
    int: (
        "a whole number",
        lambda v: isinstance(v, int) and not isinstance(v, bool),
    ),
    float: (
        "a number",
        lambda v: (
            isinstance(v, float)
            or (isinstance(v, int) and not isinstance(v, bool))
            and abs(v) <= sys.float_info.max
        ),
    ),
    str: ("a string", lambda v: isinstance(v, str)),
    dict: ("a table", lambda v: isinstance(v, dict)),
}


def _typed(hint: Any, value: Any, source: str, where: str) -> Any:
    """Returns `value` as `hint` says, or raises."""
    others = ""
    if hint is Any:
        return value
    if get_origin(hint) in (Union, types.UnionType):
        hints = [arg for arg in get_args(hint) if arg is not type(None)]
        hint = next((x for x in hints if _is_of(x, value)), hints[0])
        others = "".join(f" or {x!r}" for h in hints[1:] for x in get_args(h))
    if dataclasses.is_dataclass(hint):
        return from_mapping(hint, value, source=source, where=where)  # type: ignore
    if get_origin(hint) is tuple:
        return _items(get_args(hint)[0], value, source, where)
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        words = f"one of {listed(get_args(hint))}"
    else:
        words, accepts = _SCALARS[hint]
        if accepts(value):
            return hint(value)
    raise ValueError(
        f"{source} has {where} = {value!r}, but it must be {words}{others}."
    )


def _is_of(hint: Any, value: Any) -> bool:
    """Whether a value is one of the words of a literal type."""
    return get_origin(hint) is Literal and value in get_args(hint)


def _items(hint: Any, value: Any, source: str, where: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{source} has {where} = {value!r}, but it must be a list.")
    return tuple(
        _typed(hint, item, source, f"{where}[{i}]") for i, item in enumerate(value)
    )


def json_rows(row: type) -> PrimitiveConstructorSpec:
    """A command-line value that is a JSON list of tables, `[]` for none.

    Args:
        row: the dataclass of one table.

    Returns:
        What tyro needs to read and show such a flag.

    Example:
        >>> from dp_ilg.experiments.config.schema import BlockConfig
        >>> read = json_rows(BlockConfig).instance_from_str
        >>> read(['[{"path": "embedding", "num_blocks": 8}]'])[0].num_blocks
        8
    """

    def read(words: list[str]) -> tuple:
        try:
            rows = json.loads(words[0])
        except (ValueError, RecursionError):
            raise ValueError(
                f"{words[0]!r} is no JSON list of tables; [] stands for none"
            ) from None
        return _items(row, rows, "the flag", "blocks")

    def write(rows: tuple) -> list[str]:
        known = [dataclasses.asdict(row) for row in rows]
        given = [{k: v for k, v in r.items() if v is not None} for r in known]
        return [json.dumps(given)]

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=write,
    )
