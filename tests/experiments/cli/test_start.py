"""The version, and what the command says where its packages are not installed."""

import pathlib
import subprocess
import sys
import tomllib

import dp_ilg
from dp_ilg.experiments.cli import start

PROJECT = tomllib.loads(
    (pathlib.Path(__file__).parents[3] / "pyproject.toml").read_text()
)


def test_version_has_one_source_which_the_project_reads(capsys):
    assert start.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dp-ilg {dp_ilg.__version__}\n"
    assert "version" not in PROJECT["project"]
    found = PROJECT["tool"]["setuptools"]["dynamic"]["version"]
    assert found == {"attr": "dp_ilg.__version__"}


def test_version_waits_for_nothing_but_the_package():
    code = (
        "import sys; from dp_ilg.experiments.cli.start import main; "
        "main(['--version']); print([m for m in ('flax', 'tyro') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.splitlines() == [f"dp-ilg {dp_ilg.__version__}", "[]"]


def test_what_is_missing_is_named_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(start, "NEEDED", ("sys", "no_such_module"))
    assert start.main(["train"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no_such_module; install" in said


def test_what_is_needed_is_the_extra():
    names = {"scikit-learn": "sklearn", "orbax-checkpoint": "orbax"}
    extra = PROJECT["project"]["optional-dependencies"]["experiments"]
    listed = [requirement.partition(">=")[0] for requirement in extra]
    assert {names.get(name, name) for name in listed} == set(start.NEEDED)


def test_the_rest_is_the_command(capsys):
    assert start.main(["trian"]) == 2
    assert "did you mean" in capsys.readouterr().err
