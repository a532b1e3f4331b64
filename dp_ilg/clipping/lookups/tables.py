"""Tables whose rows are looked up: where they are, and how many rows may take part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dp_ilg import validation
from dp_ilg.base import Params
from dp_ilg.geometry.layers import paths


class Table(NamedTuple):
    """One table of a parameter tree; all of it is public.

    Attributes:
        path: its place in the tree, as in `dp_ilg.layers`.
        leaf: its number among the leaves.
        rows: how many rows it has.
        most: how many of them take part in a step at most.
        start: the number of its first row where all tables are counted as one.
    """

    path: str
    leaf: int
    rows: int
    most: int
    start: int


Tables = tuple[Table, ...]


def check_asked(tables: Any) -> tuple[tuple[str, int], ...]:
    """Pairs of a path and a number of rows, checked.

    Args:
        tables: mapping from the path of a table to the most rows of a step.

    Returns:
        The pairs, in the order of the paths.

    Raises:
        TypeError: for anything but a mapping of names to whole numbers.
        ValueError: for an empty one, or a number below 1.

    Example:
        >>> check_asked({"table": 64})
        (('table', 64),)
    """
    if not isinstance(tables, Mapping) or not all(isinstance(k, str) for k in tables):
        raise TypeError(
            f"tables is {validation.shown(tables)}, but must be a mapping such as "
            "{'embedding': 4096}: the path of each table, and its most rows of a step."
        )
    if not tables:
        raise ValueError("tables is empty; name at least one table to keep rows of.")
    for path, most in tables.items():
        validation.whole(f"the most rows of {path!r}", most)
    return tuple(sorted((path, int(most)) for path, most in tables.items()))


def find_tables(params: Params, asked: tuple[tuple[str, int], ...]) -> Tables:
    """Finds each table in a parameter tree.

    Args:
        params: any tree; only shapes are read.
        asked: from `check_asked`; a path may leave out its first segments.

    Returns:
        One `Table` a path, in the order asked.

    Raises:
        ValueError: for a path of no leaf or several, or a leaf without rows.

    Example:
        >>> import numpy as np
        >>> params = {"a": {"table": np.zeros((9, 2))}, "b": np.zeros(2)}
        >>> find_tables(params, (("table", 4),))
        (Table(path='a/table', leaf=0, rows=9, most=4, start=0),)
    """
    leaves = [("/".join(path), leaf) for path, leaf in paths(params)]
    found: list[Table] = []
    for path, most in asked:
        fits = [
            k for k, (name, _) in enumerate(leaves) if f"/{name}".endswith(f"/{path}")
        ]
        if len(fits) != 1 or fits[0] in [table.leaf for table in found]:
            names = ", ".join(name for name, _ in leaves)
            raise ValueError(
                f"tables names {path!r}, which is the path of {len(fits)} leaves that "
                f"are not named yet; name each table once, by one of {names}."
            )
        name, leaf = leaves[fits[0]]
        if len(leaf.shape) < 2 or not leaf.shape[0]:
            raise ValueError(
                f"{name} has shape {tuple(leaf.shape)}, but a table needs an axis of "
                "rows and another; leave it out of tables."
            )
        start = sum(table.rows for table in found)
        rows = int(leaf.shape[0])
        found.append(Table(name, fits[0], rows, min(most, rows), start))
    return tuple(found)


def count_of(tables: Tables) -> int:
    """How many rows all tables have.

    Example:
        >>> count_of((Table("a", 0, 9, 4, 0), Table("b", 1, 5, 5, 9)))
        14
    """
    return sum(table.rows for table in tables)
