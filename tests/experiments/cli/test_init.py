"""`dp-ilg init`: what it writes runs, and what is there is never replaced."""

import ast
import json
import os
import runpy
import tomllib
from pathlib import Path

import pytest

from dp_ilg.experiments.cli import main as cli
from dp_ilg.experiments.cli.init import write_starter
from dp_ilg.experiments.config.schema import Config, read_config

FASTER = [
    *("--num-steps", "2", "--batch-size", "32", "--privacy.accountant", "rdp"),
    *("--model.hidden", "4", "--run.eval-every", "2"),
]


def test_the_configuration_trains(tmp_path, capsys):
    assert cli.main(["init", str(tmp_path / "new" / "mine"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    config = read_config(Path(found["config"]))
    assert config.run.seed is None and config.report == Config().report
    run = ["--run-dir", str(tmp_path / "run"), "--json"]
    assert cli.main(["train", found["config"], *run, *FASTER]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


def test_every_line_of_the_configuration_says_what_it_is_for(tmp_path):
    config, _ = write_starter(tmp_path)
    text = config.read_text()
    assert set(tomllib.loads(text)) >= {"data", "model", "privacy", "optimizer", "run"}
    assert text.count("#") >= 15


def test_the_script_trains(tmp_path, monkeypatch, capsys):
    _, script = write_starter(tmp_path)
    tree = ast.parse(script.read_text())  # the same in two steps of fewer examples
    assert "num_steps=100" in ast.unparse(tree)
    script.write_text(script.read_text().replace("num_steps=100", "num_steps=3"))
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(script))
    assert names["state"].step == 3
    out = capsys.readouterr().out
    assert "Test accuracy: " in out and "Training satisfies" in out
    assert (tmp_path / "run" / "ledger.jsonl").read_text().count("\n") == 4


@pytest.mark.parametrize("name", ["config.toml", "train.py"])
def test_no_file_is_replaced_and_nothing_written(tmp_path, name, capsys):
    (tmp_path / name).write_text("mine")
    assert cli.main(["init", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "is not replaced" in err and err.count("\n") == 1
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"


def test_a_full_disk_leaves_neither_file(tmp_path, monkeypatch, capsys):
    import builtins

    real = builtins.open

    def full(path, *args, **kwargs):
        if str(path).endswith("train.py"):
            raise OSError(28, "No space left on device", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", full)
    assert cli.main(["init", str(tmp_path)]) == 2
    assert "No space left on device; free space" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
