"""docs/command_line.md names the commands and flags that there are, and no others."""

import contextlib
import io
import re

import pytest

from common import ROOT
from dp_ilg.experiments.cli.main import main
from tables import commands
from tables.lines import measured

_FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*")
PAGE = (ROOT / "docs" / "command_line.md").read_text("utf-8")


def helped(*args):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([*args, "--help"]) == 0
    return said.getvalue()


def offered(command):
    """The flags that stand at the beginning of a line of help."""
    lines = [line.strip("│ ") for line in helped(command).splitlines()]
    found = {f for line in lines if line[:2] == "--" for f in _FLAG.findall(line)}
    return found - {"--help"}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """One column, so that a line begins with a flag."""
    monkeypatch.setenv("COLUMNS", "80")


def test_the_page_names_every_command():
    listed = re.findall(r"• (\w+)", helped())
    there = re.findall(r"^\| \[`(\w+)`\]", PAGE, re.MULTILINE)
    assert sorted(listed) == sorted(there)
    assert sorted(there) == sorted(["train", *commands.COMMANDS])


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_the_flags_of_a_command_are_all_there(name):
    assert offered(name) == set(commands.flags_of(commands.COMMANDS[name]))


def test_the_flags_of_train_are_all_there():
    written = {*commands.train_flags(), *commands.short_flags()}
    assert offered("train") == written


def test_every_flag_in_the_text_exists():
    known = {*commands.train_flags(), *commands.short_flags(), "--help", "--version"}
    for command in commands.COMMANDS.values():
        known |= set(commands.flags_of(command))
    text = re.sub(r"<!--.*?-->|pip install[^`]*", "", PAGE)
    assert set(_FLAG.findall(text)) <= known


def test_a_field_without_meaning_is_refused(monkeypatch):
    monkeypatch.delitem(commands.MEANINGS, "run.seed")
    with pytest.raises(ValueError, match="does not say what run.seed means"):
        commands.section("run")(measured)
