"""Finds the markers of tables in pages and puts the tables there.

In a page a table stands between two comments, with nothing but the table between them:

    <!-- table: imdb -->
    <!-- end -->
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from common import ROOT
from tables.lines import Lines, Table

_BLOCK = re.compile(r"(<!-- table: (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
_START = "<!-- table:"


def pages() -> list[Path]:
    """README.md and every page of the documentation."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def names(text: str) -> list[str]:
    """The tables that a page asks for, in their order."""
    return [match[2] for match in _BLOCK.finditer(text)]


def filled(text: str, tables: Mapping[str, Table], lines: Lines) -> str:
    """The page with its tables as the lines say.

    Raises:
        ValueError: for a name that is no table, and for a marker without an end.
    """

    def fill(match: re.Match[str]) -> str:
        name = match[2]
        if name not in tables:
            known = ", ".join(sorted(tables))
            raise ValueError(f"There is no table {name!r}; there are {known}.")
        return f"{match[1]}\n{tables[name](lines)}\n\n{match[4]}"

    begun = text.count(_START)
    if begun != len(names(text)):
        raise ValueError(f"{begun} tables begin, but {len(names(text))} have an end.")
    return _BLOCK.sub(fill, text)


def disagreeing(
    paths: Iterable[Path], tables: Mapping[str, Table], lines: Lines
) -> dict[Path, list[str]]:
    """The pages that say something else than the lines, and their tables at fault."""
    found = {}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        there = _BLOCK.findall(text)
        wanted = _BLOCK.findall(filled(text, tables, lines))
        wrong = [old[1] for old, new in zip(there, wanted, strict=True) if old != new]
        if wrong:
            found[path] = wrong
    return found


def rewrite(paths: Iterable[Path], tables: Mapping[str, Table], lines: Lines) -> None:
    """Puts the tables into the pages."""
    for path in paths:
        old = path.read_text(encoding="utf-8")
        new = filled(old, tables, lines)
        if new != old:
            path.write_text(new, encoding="utf-8")
