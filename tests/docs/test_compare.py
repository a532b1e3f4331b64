"""The table beside jax-privacy and Opacus: every name, argument and command exists."""

import importlib
import importlib.util
import inspect
import operator
import pathlib
import re
from typing import Any

import pytest

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "compare.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| feature")
]
CODE = re.compile(r"`([^`]+)`")


def resolved(dotted: str) -> Any:
    """The object of a dotted name."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        rest = ".".join(parts[count:])
        return operator.attrgetter(rest)(found) if rest else found
    raise ModuleNotFoundError(dotted)


def missing(text):
    """What of a name, an argument of a function or a command does not exist."""
    if text.startswith("dp-ilg "):
        commands = (DOCS / "command_line.md").read_text()
        return [] if f"[`{text.split()[1]}`]" in commands else [text]
    name, *arguments = re.findall(r"[\w.]+", text)
    try:
        found = resolved(name)
    except (AttributeError, ModuleNotFoundError):
        return [name]
    known = inspect.signature(found).parameters if arguments else {}
    return [x for x in arguments if x not in known]


def codes(cells):
    return {c for cell in cells for c in CODE.findall(cell)}


def test_every_row_has_four_cells_and_says_what_is_here():
    assert len(ROWS) > 30 and all(len(row) == 4 for row in ROWS)
    for row in ROWS:
        assert codes(row[3:]) or row[3] == "left out, see below", row[0]


def test_what_is_said_to_be_here_exists():
    ours = codes(row[3] for row in ROWS)
    assert sum((missing(text) for text in ours), []) == []


def test_what_is_said_of_jax_privacy_exists():
    pytest.importorskip("jax_privacy")
    theirs = {c for c in CODE.findall(PAGE) if c.startswith("jax_privacy.")}
    if importlib.util.find_spec("keras") is None:  # its module imports Keras
        theirs = {c for c in theirs if "keras_api" not in c}
    assert len(theirs) > 8
    assert sum((missing(text) for text in theirs), []) == []


@pytest.mark.parametrize(
    "text", ["dp_ilg.no_such", "dp_ilg.plan_privacy(colour=)", "dp-ilg paint"]
)
def test_what_does_not_exist_is_noticed(text):
    assert missing(text)
