"""The page of the laws names the tests that hold them, and leaves none out."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "laws.md").read_text()
LAWS = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
HOME = "tests/test_laws.py"
_CITED = re.compile(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)`")


def functions_of(path: str) -> list[str]:
    tree = ast.parse((ROOT / path).read_text())
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]


def cited(law: str) -> list[tuple[str, str]]:
    return [(path or HOME, name) for path, name in _CITED.findall(law)]


def words(text: str) -> str:
    return re.sub(r"\W+", "_", text.lower())


def test_there_are_twelve_laws():
    assert len(LAWS) == 12


@pytest.mark.parametrize("number", range(1, 13))
def test_a_law_has_the_tests_it_names(number):
    law = LAWS[number - 1]
    title = law.splitlines()[0]
    names = cited(law)
    at_home = [name for path, name in names if path == HOME]
    assert at_home[0] == f"test_law_{number}_{words(title)}"
    assert all(name.startswith(f"test_law_{number}_") for name in at_home)
    for path, name in names:
        assert name in functions_of(path), f"{path} has no {name}"
    assert "What would break:" in law


def test_every_test_of_a_law_is_on_the_page():
    laws = [name for name in functions_of(HOME) if name.startswith("test_")]
    listed = [name for law in LAWS for path, name in cited(law) if path == HOME]
    assert laws == listed
