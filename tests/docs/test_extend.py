"""The guide to parts of one's own: its files, its commands, its entry point."""

import json
import pathlib
import re
import shlex
import sys
import tomllib

import pytest

from dp_ilg.experiments.cli.main import main
from dp_ilg.registry.lookup import KINDS, resolve
from dp_ilg.registry.source import forget
from tests.docs.test_guides import DOCS, blocks, files

PAGE = (DOCS / "guides" / "extend.md").read_text()
COMMANDS = re.findall(r"^dp-ilg train .*$", PAGE, re.M)
TOY = ["--num-steps", "2", "--privacy.accountant", "rdp", "--json"]
SMALL = [
    ("seeds = [0, 1, 2, 3, 4]", "seeds = [0, 1]\nworkers = 1"),
    ("learning_rates = [0.01, 0.03, 0.1]", "learning_rates = [0.1]"),
    ("values = [0.3, 1.0]", "values = [1.0]"),
    (
        'config = "digits"',
        'config = "digits"\noverrides.privacy = {num_steps = 2, accountant = "rdp"}',
    ),
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with the files of the page."""
    monkeypatch.chdir(tmp_path)
    for name, content in files(PAGE).items():
        pathlib.Path(name).write_text(content)
    (saves,) = [b.code for b in blocks(PAGE) if "np.savez" in b.code]
    exec(saves, {})  # noqa: S102
    forget()
    yield tmp_path
    forget()


def test_a_command_for_every_kind_but_the_score_s():
    flags = {word for command in COMMANDS for word in command.split() if "--" in word}
    assert flags >= {"--importance", "--privacy.schedule.name", "--optimizer.method"}
    assert flags >= {"--model.name", "--data.name", "--data.features"}
    assert len(COMMANDS) == 7 and all(k.group in PAGE for k in KINDS.values())


def test_no_part_takes_more_than_ten_lines():
    pieces = re.split(r"\n\n\n|\n\n(?=def )", files(PAGE)["mine.py"])
    parts = [piece for piece in pieces if "def " in piece]
    assert len(parts) == 6
    assert all(len(part.strip().splitlines()) <= 10 for part in parts)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.split()[-1])
def test_a_command_of_the_page_trains(command, capsys):
    assert main([*shlex.split(command)[1:], "--run-dir", "run", *TOY]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 2
    named = re.findall(r"\./mine\.py:\w+", command)
    assert [*found["outside"]] == [f"source of {name}" for name in named]


@pytest.mark.slow
def test_the_comparison_of_the_page_runs_in_small(capsys):
    text = pathlib.Path("sweep.toml").read_text()
    for old, new in SMALL:
        assert old in text
        text = text.replace(old, new)
    pathlib.Path("small.toml").write_text(text)
    assert main(["compare", "small.toml", "--out", "out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["complete"] and len(found["cells"]) == 2
    lines = pathlib.Path("out/results.jsonl").read_text().splitlines()
    sources = [json.loads(line).get("sources") for line in lines]
    assert sum(bool(found) for found in sources) == 2


def test_the_entry_point_of_the_page_is_found(here, monkeypatch):
    project = tomllib.loads(files(PAGE)["pyproject.toml"])["project"]
    (here / "site").mkdir()
    (here / "site" / "my_parts.py").write_text(files(PAGE)["mine.py"])
    info = here / "site" / f"{project['name']}-{project['version']}.dist-info"
    info.mkdir()
    about = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.0\n"
    (info / "METADATA").write_text(about)
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {at}" for name, at in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(here / "site"))
    assert resolve("rule", "very_steep", {})(16.0, 1.0) == 8.0
    monkeypatch.delitem(sys.modules, "my_parts")
