"""The README's example runs, is short, and its commands are those of CI."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def test_the_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    code = blocks("python")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    said = re.fullmatch(r"epsilon 1\.00, accuracy (.*)%\n", capsys.readouterr().out)
    assert said and float(said[1]) > 90
    assert "1e-05)-differential privacy" in str(names["plan"].statement())
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 51


def test_exactly_two_set_up_commands_and_ci_runs_them():
    commands = blocks("bash")
    assert len(commands) == 2 and all(
        len(c.strip().splitlines()) == 1 for c in commands
    )
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet -e ".[dev]"' in ci and '-e ".[dev]"' in commands[1]
    assert 'pytest -n 2 -m "not slow"' in ci
    assert 'pytest -n 2 -m "not slow"' in commands[1]


def test_every_room_is_in_the_map():
    table = TEXT[TEXT.index("## The map") :]
    rooms = {p.parent.name for p in (ROOT / "dp_ilg").rglob("__init__.py")}
    for name in rooms - {"dp_ilg", "bookkeeping"}:
        assert f"`{name}/`" in table or f"`{name}`" in table, name


def test_it_is_short():
    assert TEXT.count("\n") <= 250 and len(TEXT.split()) <= 1500


def test_pictures_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", TEXT, re.S):
        assert (ROOT / path).stat().st_size > 1000
