"""The pages of the documentation: all linked, all leading somewhere, all readable."""

import ast
import pathlib
import re

import pytest

from dp_ilg.registry.lookup import KINDS
from tests.docs.names import exists
from tests.docs.prose import length, sentences
from tests.test_architecture import FLOOR

ROOT = pathlib.Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = {str(p.relative_to(ROOT)): p.read_text() for p in [ROOT / "README.md", *PAGES]}
ROOMS = [p.parent.name for p in sorted((ROOT / "dp_ilg").glob("*/__init__.py"))]

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_REFERENCE = re.compile(r"\]\[([\w.]+)\]|^::: ([\w.]+)", re.MULTILINE)
_DOTTED = re.compile(r"\bdp_ilg(?:\.[A-Za-z_]\w*)+")
_FOLDERS = r"(?:dp_ilg|tests|benchmarks|configs|docs|\.ci)"
_PATH = re.compile(rf"(?<![\w/.~-]){_FOLDERS}/[\w./*{{}},-]*")
_FOREIGN = re.compile(r"(?:DESIGN|HOUSE|PEERS|PAPER)\.md|\.\./shared|\b[Ll]aws? \d")
_API = re.compile(r"^::: (dp_ilg[\w.]*)$", re.MULTILINE)


def nav() -> list[str]:
    text = (ROOT / "mkdocs.yml").read_text()
    return re.findall(r"(?:: |- )([\w/]+\.md)$", text[text.index("\nnav:") :], re.M)


def spread(path: str) -> list[str]:
    """A path with its {alternatives,in,braces} written out."""
    braces = re.search(r"\{([^{}]*)\}", path)
    if not braces:
        return [path]
    head, tail = path[: braces.start()], path[braces.end() :]
    return [p for part in braces[1].split(",") for p in spread(head + part + tail)]


def test_every_page_is_in_the_navigation_once_and_exists():
    assert sorted(nav()) == [str(p.relative_to(DOCS)) for p in PAGES]


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_to_files(name):
    for link in _LINK.findall(TEXTS[name]):
        target = link.partition("#")[0]
        if target and "://" not in target and not target.startswith("mailto:"):
            assert ((ROOT / name).parent / target).exists(), link


@pytest.mark.parametrize("name", TEXTS)
def test_names_of_the_package_exist(name):
    text = TEXTS[name]
    found = {a or b for a, b in _REFERENCE.findall(text)} | set(_DOTTED.findall(text))
    found -= {kind.group for kind in KINDS.values()}  # of entry points
    assert [n for n in sorted(found) if n.startswith("dp_ilg") and not exists(n)] == []


def test_a_name_that_does_not_exist_is_found():
    assert exists("dp_ilg.plan_privacy") and exists("dp_ilg.schedules.constant")
    assert exists("dp_ilg.PoissonSampler.for_plan") and exists("dp_ilg.base")
    wrong = ("dp_ilg.plan", "dp_ilg.schedules.steep", "dp_ilg.PrivacyPlan.price")
    assert not any(map(exists, wrong))


@pytest.mark.parametrize("name", TEXTS)
def test_paths_in_the_repository_exist(name):
    for found in _PATH.findall(TEXTS[name]):
        for path in spread(found.rstrip(".,")):
            hits = any(ROOT.glob(path.rstrip("/"))) if "*" in path else None
            assert (ROOT / path).exists() if hits is None else hits, found


def test_nothing_cites_what_is_not_in_the_repository():
    cited = {p: m[0] for p, text in TEXTS.items() if (m := _FOREIGN.search(text))}
    assert cited == {}
    assert _FOREIGN.search("see law 3") and not _FOREIGN.search("test_law_3")


@pytest.mark.parametrize("name", TEXTS)
def test_no_sentence_is_longer_than_forty_words(name):
    assert [s for s in sentences(TEXTS[name]) if length(s) > 40] == []


@pytest.mark.parametrize("name", TEXTS)
def test_no_line_becomes_a_heading_by_accident(name):
    code = re.sub(r"^```.*?^```", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^#+[^# \n].*", code, re.MULTILINE) == []


def test_sentences_of_the_readme_have_at_most_25_words_on_average():
    lengths = [length(s) for s in sentences(TEXTS["README.md"])]
    assert sum(lengths) <= 25 * len(lengths)


def test_sentences_are_told_apart():
    page = "# T\n\nOne `a.b C`. As in Li et al. 2024.\n\n```\nx. Y.\n```\n- Last."
    assert [length(s) for s in sentences(page)] == [2, 6, 1]


def modules(room: str) -> set[str]:
    """Of the room and of its inner rooms, but for the engine, which is internal."""
    files = (ROOT / "dp_ilg" / room).rglob("*.py")
    paths = [p.relative_to(ROOT).with_suffix("") for p in files]
    shown = [p for p in paths if not {"__init__", "bookkeeping"} & {*p.parts}]
    return {".".join(p.parts) for p in shown}


@pytest.mark.parametrize("room", [r for r in ROOMS if r != "experiments"])
def test_every_module_of_a_room_is_on_its_api_page(room):
    page = (DOCS / "api" / f"{room}.md").read_text()
    assert set(_API.findall(page)) == modules(room)


def test_every_public_name_is_in_the_table_of_the_api():
    page = (DOCS / "api" / "index.md").read_text()
    text = (ROOT / "dp_ilg" / "__init__.py").read_text()
    public = ast.literal_eval(text[text.index("__all__ = ") + 10 :])
    assert [name for name in public if f"[`{name}`]" not in page] == []


def test_docstring_sections_become_those_of_the_site():
    pytest.importorskip("griffe")
    import doctest
    import importlib.util

    path = DOCS / "_docstrings.py"
    spec = importlib.util.spec_from_file_location("docs_docstrings", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_the_map_of_rooms_is_the_table_that_the_tests_hold():
    page = (DOCS / "contributing.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (`[^|]+) \|", page, re.MULTILINE)
    found = {}
    for floor, rooms in rows:
        for room in re.findall(r"`([\w/.]+)`", rooms):
            name = room.rstrip("/").removesuffix(".py").replace("/", ".")
            found["dp_ilg" if name == "__init__" else name] = int(floor)
    assert found.pop("clipping.bookkeeping") == FLOOR["clipping"]
    assert found == FLOOR
