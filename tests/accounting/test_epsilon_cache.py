"""Epsilons on disk: found again, never for another question, never on trust."""

import ast
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from dp_ilg.accounting import accountants, epsilon_cache
from dp_ilg.accounting.calibration import plan_privacy
from dp_ilg.accounting.epsilon_cache import cache_folder, remembered

SOURCES = Path(epsilon_cache.__file__).parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DP_ILG_CACHE", str(tmp_path))
    monkeypatch.setattr(epsilon_cache, "_WORTH_SECONDS", -1.0)
    return tmp_path / "epsilon"


def forbidden():
    raise AssertionError("computed again")


def entry(folder):
    (path,) = folder.iterdir()
    return path


def test_a_number_is_found_again_to_the_last_bit(folder):
    value = 0.1 + 0.2
    assert remembered(("a", 0.1), lambda: value) == value
    assert remembered(("a", 0.1), forbidden) == value
    assert remembered("infinite", lambda: float("inf")) == float("inf")
    assert remembered("infinite", forbidden) == float("inf")


def test_files_are_the_owners_and_nothing_else_is_left(folder):
    remembered("one", lambda: 1.0)
    assert stat.S_IMODE(entry(folder).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("other", [0.1 + 2**-56, 0.1 - 2**-56, 0.2])
def test_another_number_is_another_question(folder, other):
    assert other != 0.1
    remembered((0.1,), lambda: 1.0)
    assert remembered((other,), lambda: 2.0) == 2.0
    assert remembered((0.1,), forbidden) == 1.0


@pytest.mark.parametrize("kind", ["sources", "package"])
def test_other_code_asks_anew(folder, monkeypatch, kind):
    remembered("one", lambda: 1.0)
    epsilon_cache._version.cache_clear()
    if kind == "sources":
        monkeypatch.setattr(epsilon_cache, "_SOURCES", ("renyi",))
    else:
        monkeypatch.setattr(
            epsilon_cache.importlib.metadata, "version", lambda name: "99"
        )
    try:
        assert remembered("one", lambda: 2.0) == 2.0
    finally:
        monkeypatch.undo()
        epsilon_cache._version.cache_clear()


def test_every_module_that_computes_an_epsilon_names_the_code():
    """Else an old answer would stand where its code has changed."""
    found, left = set(), ["accountants"]
    while left:
        found.add(left.pop())
        trees = [ast.parse((SOURCES / f"{name}.py").read_text()) for name in found]
        names = {name for tree in trees for name in imported(tree)}
        left = sorted(names - found - {"epsilon_cache"})
    assert found == set(epsilon_cache._SOURCES) and len(found) > 3


def imported(tree):
    """Modules of the same room that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in (node.module, *names):
                path = name.removeprefix("dp_ilg.accounting.").replace(".", "/")
                if (SOURCES / f"{path}.py").exists():
                    yield path


def damage(path, how):
    content = json.loads(path.read_text())
    if how == "number":
        content["epsilon"] = (0.5).hex()
    elif how == "question":
        content["question"] += " "
    elif how == "digest":
        del content["sha256"]
    path.write_text(json.dumps(content) if how != "cut" else path.read_text()[:-9])
    if how == "shared":
        os.chmod(path, 0o622)
    if how == "bytes":
        path.write_bytes(b"\xff\x00\xfe")
    if how == "deep":
        path.write_text("[" * 100_000)


@pytest.mark.parametrize(
    "how", ["number", "question", "digest", "cut", "shared", "bytes", "deep"]
)
def test_a_damaged_entry_is_computed_again_and_mended(folder, how):
    remembered("one", lambda: 1.0)
    damage(entry(folder), how)
    assert remembered("one", lambda: 3.0) == 3.0
    assert remembered("one", forbidden) == 3.0


def test_an_entry_of_another_question_under_this_name_is_not_read(folder):
    remembered("one", lambda: 1.0)
    before = entry(folder)
    remembered("two", lambda: 2.0)
    (after,) = set(folder.iterdir()) - {before}
    after.write_text(before.read_text())
    assert remembered("two", lambda: 4.0) == 4.0


def test_a_link_to_another_file_is_followed_only_to_a_sound_entry(folder, tmp_path):
    remembered("one", lambda: 1.0)
    path = entry(folder)
    path.unlink()
    path.symlink_to(tmp_path / "nothing")
    assert remembered("one", lambda: 5.0) == 5.0
    assert not path.is_symlink()


def test_a_folder_that_cannot_be_made_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DP_ILG_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(epsilon_cache, "_WORTH_SECONDS", -1.0)
    assert remembered("one", lambda: 1.0) == 1.0


def test_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("DP_ILG_CACHE", "")
    assert cache_folder() is None
    monkeypatch.delenv("DP_ILG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dp_ilg" / "epsilon"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "dp_ilg" / "epsilon"


def test_quick_answers_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DP_ILG_CACHE", str(tmp_path))
    remembered("one", lambda: 1.0)
    assert not (tmp_path / "epsilon").exists()


def test_a_plans_epsilon_comes_from_the_disk_in_the_next_process(folder, monkeypatch):
    facts: dict[str, Any] = dict(
        delta=1e-5, num_examples=1000, batch_size=100, num_steps=9
    )
    plan = plan_privacy(noise_multiplier=1.0, **facts)
    accountants._epsilon.cache_clear()
    known = plan.epsilon()
    accountants._epsilon.cache_clear()
    monkeypatch.setitem(accountants.ACCOUNTANTS, "pld", lambda *a: forbidden())
    assert plan.epsilon() == known
    near = plan_privacy(noise_multiplier=1.0 + 2**-52, **facts)
    with pytest.raises(AssertionError, match="computed again"):
        near.epsilon()
