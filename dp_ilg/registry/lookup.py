"""Names of parts: rows of a table of ours, entry points, or places in a module.

A name is looked for in the package's own table first, then among entry points of the
kind's group, then imported if it says ``package.module:name`` or ``./file.py:name``.
So an installed package cannot put itself in place of a row of ours.
"""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from dp_ilg.registry.source import Loaded, is_path, load

Rows = TypeVar("Rows", bound=Mapping[str, Any])
_GUIDE = "see docs/guides/extend.md"


class Kind(NamedTuple):
    """One kind of part.

    Attributes:
        group: its entry points' group.
        words: what such a part is, in a sentence that begins "a rule is".
        fits: whether something may be one, by its shape alone.

    Example:
        >>> KINDS["rule"].group
        'dp_ilg.rules'
    """

    group: str
    words: str
    fits: Callable[[Any], bool]


def takes(count: int, *keywords: str) -> Callable[[Any], bool]:
    """A check that something is called with so many arguments.

    Args:
        count: how many stand without a name.
        *keywords: names of those that have one.

    Returns:
        A function of anything; classes and what cannot be called do not fit.

    Example:
        >>> takes(2)(lambda importance, sizes: sizes), takes(2)(lambda step: step)
        (True, False)
    """

    def fits(value: Any) -> bool:
        if isinstance(value, type) or not callable(value):
            return False
        try:
            signature = inspect.signature(value)
        except (TypeError, ValueError):  # written in C: nobody knows
            return True
        try:
            signature.bind(*[None] * count, **dict.fromkeys(keywords))
        except TypeError:
            return False
        return True

    return fits


def _is_schedule(value: Any) -> bool:
    plain = isinstance(value, type) or isinstance(value, str | bytes)
    listed = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    shaped = callable(getattr(value, "multipliers", None))
    return not plain and (callable(value) or listed or shaped)


KINDS: dict[str, Kind] = {
    "rule": Kind("dp_ilg.rules", "a function (importance, sizes) -> weights", takes(2)),
    "score": Kind("dp_ilg.scores", "a function (statistics) -> scores", takes(1)),
    "schedule": Kind(
        "dp_ilg.schedules",
        "a function of the step, a sequence, or a function of its parameters that "
        "returns one",
        _is_schedule,
    ),
    "method": Kind(
        "dp_ilg.methods",
        "a function (learning_rate, plan, *, key) -> chain",
        takes(2, "key"),
    ),
    "model": Kind(
        "dp_ilg.models",
        "a Flax module, a pair (init, apply), or a function of the data's facts that "
        "returns one",
        lambda value: callable(value) or isinstance(value, tuple),
    ),
    "dataset": Kind(
        "dp_ilg.datasets",
        "a function without arguments that returns arrays x_train, y_train, x_test and "
        "y_test",
        takes(0),
    ),
    "generator": Kind(
        "dp_ilg.generators",
        "a function (key, shape, dtype, public) -> array of made-up inputs",
        takes(4),
    ),
    "features": Kind(
        "dp_ilg.features", "a function of one batch of inputs -> features", takes(1)
    ),
}
_OWN: dict[str, frozenset[str]] = {}


def table(kind: str, rows: Rows) -> Rows:
    """A table of ours; what is added to it later is known to this process only.

    Args:
        kind: a key of `KINDS`.
        rows: names to parts.

    Returns:
        The same rows.

    Example:
        >>> table("score", {"l2": len})["l2"] is len
        True
    """
    _OWN[kind] = _OWN.get(kind, frozenset()) | frozenset(rows)
    return rows


def resolve(kind: str, name: str, rows: Mapping[str, Any], place: str = "") -> Any:
    """The part that a name stands for.

    Args:
        kind: a key of `KINDS`.
        name: a row, the name of an entry point, ``package.module:name`` or
            ``./file.py:name``.
        rows: our own table.
        place: what the caller calls the name, for errors; by default the kind.

    Returns:
        The row, or what was loaded.

    Raises:
        ValueError: in one sentence, for an unknown name, an import that fails, and
            something that is no such part by its shape.

    Privacy:
        Code from outside runs with every right of this process. What it does to a
        guarantee is said in the guide to extending.

    Example:
        >>> resolve("rule", "steep", {"paper": 1, "uniform": 2}, "importance")
        Traceback (most recent call last):
        ValueError: importance is 'steep', which is unknown; known are paper, \
uniform, entry points of dp_ilg.rules (none is installed), package.module:name and \
./file.py:name.
    """
    place = place or kind
    if isinstance(name, str) and name in rows:
        return rows[name]
    found = find(kind, name, place)
    if found is None:
        raise ValueError(unknown(kind, name, rows, place))
    if not KINDS[kind].fits(found.value):
        raise ValueError(
            f"{place} is {name!r}, which is {described(found.value)}, but a {kind} is "
            f"{KINDS[kind].words}; {_GUIDE}."
        )
    return found.value


def find(kind: str, name: str, place: str = "") -> Loaded | None:
    """What a name from outside stands for, and which code it is.

    Args:
        kind: a key of `KINDS`.
        name: the name of an entry point, ``package.module:name`` or
            ``./file.py:name``.
        place: what the caller calls the name.

    Returns:
        What was loaded; None if there is no such entry point, and for anything that is
        no string.

    Raises:
        ValueError: as `load`, or if two packages have an entry point of that name.

    Example:
        >>> find("rule", "paper") is None
        True
    """
    if is_path(name):
        return load(place or kind, name)
    points = [p for p in _entry_points(kind) if p.name == name]
    if len({point.value for point in points}) > 1:
        makers = " and ".join(sorted(point.value for point in points))
        raise ValueError(
            f"{place or kind} is {name!r}, but {makers} both offer that; give "
            "package.module:name of one of them."
        )
    if not points:
        return None
    value = points[0].value.replace(" ", "").partition("[")[0]
    return load(place or kind, value)


def known(kind: str, rows: Mapping[str, Any]) -> list[str]:
    """Every name there is for a kind of part.

    Args:
        kind: a key of `KINDS`.
        rows: our own table.

    Returns:
        Names of rows and of entry points.

    Example:
        >>> known("rule", {"paper": 1})
        ['paper']
    """
    return [*rows, *sorted({point.name for point in _entry_points(kind)} - {*rows})]


def is_of_this_process(kind: str, name: str, rows: Mapping[str, Any]) -> bool:
    """Whether a row was added to a table of ours while this process runs.

    Args:
        kind: a key of `KINDS`.
        name: any name.
        rows: our own table.

    Returns:
        True for rows that another process would not find.

    Example:
        >>> rows = table("score", {"l2": len})
        >>> rows["mine"] = sum
        >>> is_of_this_process("score", "mine", rows)
        True
    """
    return name in rows and name not in _OWN.get(kind, frozenset())


def unknown(kind: str, name: Any, rows: Mapping[str, Any], place: str) -> str:
    """The sentence for a name that nothing has.

    Args:
        kind: a key of `KINDS`.
        name: what was given.
        rows: our own table.
        place: what the caller calls it.

    Returns:
        A sentence with the nearest name, or all there are and how to give one.

    Example:
        >>> unknown("rule", "papre", {"paper": 1}, "importance")
        "importance is 'papre', which is unknown; did you mean paper? (one of your \
own: ./file.py:name or package.module:name)"
    """
    names, group = known(kind, rows), KINDS[kind].group
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return (
            f"{place} is {name!r}, which is unknown; did you mean {close[0]}? (one of "
            "your own: ./file.py:name or package.module:name)"
        )
    none = "" if len(names) > len(rows) else " (none is installed)"
    return (
        f"{place} is {name!r}, which is unknown; known are {', '.join(sorted(names))}, "
        f"entry points of {group}{none}, package.module:name and ./file.py:name."
    )


def described(value: Any) -> str:
    """What something is, for a sentence that says it is the wrong thing.

    Args:
        value: anything.

    Returns:
        Its kind and its name or arguments.

    Example:
        >>> described(dict), described(3), described(lambda a, b: a)
        ('the class dict', 'an int', 'a function (a, b)')
    """
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isfunction(value):
        return f"a function {inspect.signature(value)}"
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def _entry_points(kind: str) -> Any:
    from importlib.metadata import entry_points  # slow to import

    return entry_points(group=KINDS[kind].group)
