"""Names of parts from outside: found, digested, and refused in one sentence."""

import sys
from typing import Any

import pytest

from dp_ilg.registry.lookup import KINDS, find, is_of_this_process, resolve, table
from dp_ilg.registry.source import forget, load

ROWS = {"paper": len, "uniform": max}
RULE = "def steep(importance, sizes):\n    return importance**2\n\n\nlimit = 3\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a file of rules, which is the current one."""
    (tmp_path / "mine.py").write_text(RULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a package with entry points: its folder and its metadata on the path."""

    def install(name, points, code=RULE):
        site = tmp_path / "site"
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text("")
        (site / name / "parts.py").write_text(code)
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\n")
        (info / "entry_points.txt").write_text(points)
        if str(site) not in sys.path:
            monkeypatch.syspath_prepend(str(site))
        return site / name

    yield install
    for module in [m for m in sys.modules if m.partition(".")[0].startswith("from_")]:
        del sys.modules[module]


def test_a_row_a_file_a_module_and_an_entry_point(here, installed):
    installed("from_one", "[dp_ilg.rules]\nvery_steep = from_one.parts:steep\n")
    assert resolve("rule", "paper", ROWS) is len
    assert resolve("rule", "./mine.py:steep", ROWS)(3, 1) == 9
    assert resolve("rule", "from_one.parts:steep", ROWS)(3, 1) == 9
    assert resolve("rule", "very_steep", ROWS)(3, 1) == 9


def test_an_entry_point_does_not_take_the_place_of_a_row(installed):
    installed("from_two", "[dp_ilg.rules]\npaper = from_two.parts:steep\n")
    assert resolve("rule", "paper", ROWS) is len


def test_two_packages_with_one_name_are_refused(installed):
    installed("from_a", "[dp_ilg.rules]\nsame = from_a.parts:steep\n")
    installed("from_b", "[dp_ilg.rules]\nsame = from_b.parts:steep\n")
    with pytest.raises(ValueError, match="from_a.* and from_b.*both offer that"):
        resolve("rule", "same", ROWS)


def test_other_code_has_another_digest(here):
    first: Any = find("rule", "./mine.py:steep")
    again: Any = find("rule", str(here / "mine.py") + ":steep")
    assert again.digest == first.digest
    (here / "mine.py").write_text(RULE.replace("2", "3"))
    assert find("rule", "./mine.py:steep") == first  # read once, as a module is
    forget()
    second: Any = find("rule", "./mine.py:steep")
    assert second.digest != first.digest and second.value(2, 1) == 8


def test_a_digest_covers_the_whole_package(installed):
    folder = installed("from_three", "")
    first = load("rule", "from_three.parts:steep").digest
    (folder / "helper.py").write_text("power = 2\n")
    for module in ("from_three", "from_three.parts"):
        del sys.modules[module]
    forget()
    assert load("rule", "from_three.parts:steep").digest != first


@pytest.mark.parametrize(
    "name, words",
    [
        ("papre", "did you mean paper. .one of your own: ./file.py:name"),
        ("no", "known are paper, uniform, entry points of dp_ilg.rules"),
        ("./none.py:steep", "none.py cannot be read .No such file.*current folder"),
        ("./mine.py:steeep", "has no steeep; it has limit, steep"),
        ("./mine.py:", "must name something in a module"),
        ("./mine.py:limit", "is an int, but a rule is a function .importance, sizes"),
        ("no_such.module:f", "ModuleNotFoundError: No module named 'no_such'"),
        ("mine:steep", "in this folder, so give ./mine.py:steep"),
        ("./bad.py:f", "ZeroDivisionError.*line 2 of .*bad.py"),
        ("./broken.py:f", "SyntaxError"),
        ("./exits.py:f", "SystemExit"),
        ("./net.py:Net", "is the class Net, but a rule is"),
        ("./net.py:loss", r"is a function \(params\), but a rule is"),
    ],
)
def test_what_is_wrong_is_one_sentence(here, name, words):
    (here / "bad.py").write_text("x = 1\nx / 0\n")
    (here / "broken.py").write_text("def f(:\n")
    (here / "exits.py").write_text("raise SystemExit(3)\n")
    (here / "net.py").write_text("class Net: ...\ndef loss(params): ...\n")
    with pytest.raises(ValueError, match=words) as caught:
        resolve("rule", name, ROWS, "optimizer.importance")
    said = str(caught.value)
    assert said.startswith("optimizer.importance is") and "\n" not in said
    assert said.endswith((".", "name)")) and "Traceback" not in said


def test_every_kind_says_what_it_is_and_has_a_group_of_its_own():
    groups = {kind.group for kind in KINDS.values()}
    assert len(groups) == len(KINDS) == 8
    assert all(group.startswith("dp_ilg.") for group in groups)
    assert all(kind.words and not kind.fits(3) for kind in KINDS.values())


def test_a_row_that_was_added_here_is_known_to_be():
    rows: Any = table("score", {"l2": len})
    rows["mine"] = max
    assert is_of_this_process("score", "mine", rows)
    assert not is_of_this_process("score", "l2", rows)
    assert not is_of_this_process("score", "no", rows)
