"""The command line: tables and JSON for results, one sentence for mistakes."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dp_ilg.experiments.cli import main as cli
from dp_ilg.experiments.config.schema import config_to_toml, read_config
from dp_ilg.experiments.runs import progress, runner
from tests.experiments.reports.test_event_files import points
from tests.helpers.compiled import compiled_once  # noqa: F401 - a fixture

CONFIGS = Path(__file__).parents[3] / "configs"
TINY = [
    *("--num-steps", "3", "--batch-size", "32", "--privacy.accountant", "rdp"),
    *("--model.hidden", "4", "--run.eval-every", "2"),
]
PLAN = [
    *("--delta", "1e-5", "--num-examples", "1000", "--batch-size", "100"),
    *("--num-steps", "10", "--accountant", "rdp"),
]


@pytest.fixture
def trained(monkeypatch):
    """Runs `dp-ilg train` without training; gives what it would have trained."""
    seen = []

    def fake(config, run_dir, **options):
        seen.append((config, run_dir, options))
        return {"test_accuracy": 0.5, "epsilon": 1.0}

    monkeypatch.setattr(runner, "run_training", fake)
    return seen


def test_training_prints_one_json_object_and_leaves_a_report(tmp_path, capsys):
    command = ["train", "--run-dir", str(tmp_path / "run"), "--seed", "1", *TINY]
    assert cli.main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert out.count("\n") == 1
    assert summary["steps"] == 3 and summary["epsilon"] <= 8
    assert Path(summary["report"]).read_text().startswith("<!")
    saved = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert saved["params_sha256"] == summary["params_sha256"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        *("config.toml", "plan.json", "ledger.jsonl", "metrics.jsonl"),
        *("summary.json", "report.html", "checkpoints", "certificate.json"),
        "model_card.md",
    }
    assert "3/3" in err and "test accuracy" in err
    # once more: refused; with --resume: the same result, from the folder's own values
    assert cli.main(command) == 2
    assert "exists; choose another one, or pass --resume" in capsys.readouterr().err
    again = ["train", "--run-dir", str(tmp_path / "run"), "--resume", "--json"]
    assert cli.main(again) == 0
    assert json.loads(capsys.readouterr().out) == summary


def test_without_a_config_the_digits_are_trained_with_fresh_keys(trained, capsys):
    assert cli.main(["train"]) == 0
    config, folder, options = trained[0]
    assert config == read_config(CONFIGS / "digits.toml")
    assert config.run.seed is None
    assert folder.parts[0] == "runs" and folder.name.startswith("digits-")
    assert not options["resume"]
    assert "50.00%" in capsys.readouterr().out


def test_flags_are_laid_over_the_file(trained):
    file = str(CONFIGS / "imdb_embedding.toml")
    flags = ["--epsilon", "1.5", "--delta", "1e-6", "--batch-size", "64"]
    flags += ["--num-steps", "7", "--learning-rate", "0.5", "--importance", "paper"]
    flags += ["--seed", "3", "--optimizer.blocks", "[]", "--model.framework", "nnx"]
    flags += ["--privacy.schedule.name", "linear", "--privacy.schedule.end", "0.5"]
    flags += ["--data-dir", "data", "--run-dir", "here"]
    assert cli.main(["train", file, *flags]) == 0
    config, folder, options = trained[0]
    assert config.data.name == "imdb" and config.privacy.clip_mode == "normalize"
    privacy = config.privacy
    assert (privacy.epsilon, privacy.delta) == (1.5, 1e-6)
    assert (privacy.batch_size, privacy.num_steps) == (64, 7)
    assert (privacy.schedule.name, privacy.schedule.end) == ("linear", 0.5)
    assert config.optimizer.learning_rate == 0.5
    assert config.optimizer.importance == "paper"
    assert config.optimizer.blocks == ()
    assert (config.run.seed, config.model.framework) == (3, "nnx")
    assert folder == Path("here") and options["data_dir"] == Path("data")


def test_blocks_can_be_given_as_json(trained):
    blocks = '[{"path": "hidden_0/kernel", "edges": [4, 9]}]'
    assert cli.main(["train", "--optimizer.blocks", blocks]) == 0
    assert trained[0][0].optimizer.blocks[0].edges == (4, 9)


def test_flags_before_the_file_and_underscores_work_too(trained):
    file = str(CONFIGS / "mnist_cnn.toml")
    assert cli.main(["train", "--batch_size", "64", file]) == 0
    assert trained[0][0].data.name == "mnist"
    assert trained[0][0].privacy.batch_size == 64


def test_a_resumed_run_has_the_values_of_its_folder(trained, tmp_path):
    config = read_config(CONFIGS / "adult_mlp.toml")
    (tmp_path / "config.toml").write_text(config_to_toml(config))
    assert cli.main(["train", "--run-dir", str(tmp_path), "--resume"]) == 0
    assert trained[0][0] == config
    # a folder that does not exist is started with the defaults
    assert cli.main(["train", "--run-dir", str(tmp_path / "new"), "--resume"]) == 0
    assert trained[1][0].data.name == "digits"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "Expected one of {init, train, calibrate, epsilon, report, export"),
        (["trian"], "no command 'trian'; did you mean train?"),
        (["train", "--epsilom", "3"], "--epsilom, 3; did you mean --epsilon?"),
        (["train", "--epsilon"], "--epsilon"),
        (["train", "--epsilon", "abc"], "epsilon is 'abc', but must be a number; see"),
        (
            ["train", "--batch-size", "2.5"],
            "dp-ilg: --batch-size/--privacy.batch-size is '2.5', but must be a whole "
            "number; see --help.",
        ),
        (["train", "--seed", "1e3"], "seed is '1e3', but must be a whole number"),
        (["train", "--model.hidden", "8", "4.5"], "hidden is '8', '4.5', but must be"),
        (
            ["train", "--privacy.schedule.values", "1", "a"],
            "schedule.values is '1', 'a', but must be numbers of its kind; see --help.",
        ),
        (["epsilon", "--noise-multiplier", "1", *PLAN, "--num-steps", "1.5"], "'1.5'"),
        (["train", "--epsilon", "-1"], "privacy.epsilon is -1.0, but must be"),
        (["train", "--epsilon", "nan"], "privacy.epsilon is nan"),
        (["train", "--delta", "2"], "privacy.delta is 2.0"),
        (["train", "--batch-size", "0"], "privacy.batch_size is 0"),
        (["train", "--batch-size", "9999"], "only 1437 examples"),
        (["train", "--learning-rate", "inf"], "optimizer.learning_rate is inf"),
        (["train", "--privacy.clip-mode", "no"], "invalid choice 'no'"),
        (["train", "--importance", "papper"], "did you mean paper?"),
        (["train", "--data.name", "minst"], "did you mean mnist?"),
        (["train", "--model.name", "cnn"], "at least 20 x 20"),
        (["train", "--optimizer.blocks", "x"], "no JSON list"),
        (["train", "--optimizer.blocks", "[3]"], "must be a table"),
        (["train", "absent.toml"], "absent.toml cannot be read"),
        (["train", "--resume"], "--resume needs --run-dir"),
        (["train", "--run-dir", "/dev/null/x"], "/dev/null"),
        (["train", "--data.name", "mnist", "--data-dir", "no"], "no is no folder"),
        (["report", "absent"], "absent is not a folder"),
        (["reproduce"], "needs table2"),
        (["epsilon"], "needs --noise-multiplier, --delta"),
        (
            ["reproduce", "tabel2"],
            "no table 'tabel2' to reproduce; did you mean table2",
        ),
        (["reproduce", "table2", "--seeds", "0"], "seeds is 0, but must be"),
        (["reproduce", "table2", "--max-minutes", "-1"], "max_minutes is -1.0"),
        (["epsilon", "--noise-multiplier", "1"], "needs --delta"),
        (["epsilon", "--noise-multiplier", "-1", *PLAN], "noise_multiplier is -1.0"),
        (["calibrate", "--epsilon", "0", *PLAN], "epsilon"),
        (
            ["calibrate", "--epsilon", "1", "--noise-multiplier", "1", *PLAN],
            "0 of --noise-multiplier, --num-steps and --batch-size are left out",
        ),
        (
            ["epsilon", "--noise-multiplier", "1", *PLAN, "--schedule.name", "linear"],
            "linear lacks end",
        ),
        (
            ["calibrate", "--epsilon", "1", *PLAN[:4], "--schedule.name", "nope"],
            "schedule is 'nope', which is unknown; known are array, constant",
        ),
        *(
            (["epsilon", "--noise-multiplier", "1", *PLAN, flag, str(10**23)], words)
            for flag, words in {
                "--max-batch-size": "max_batch_size is 100000000000000000000000, but",
                "--num-examples": "num_examples is 100000000000000000000000, but must",
                "--num-steps": "num_steps is 100000000000000000000000, but must be at",
            }.items()
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    command, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dp-ilg: ") and err.count("\n") == 1
    assert words in err
    assert not list(tmp_path.iterdir())


def test_an_unknown_field_in_a_file_is_one_sentence(tmp_path, capsys):
    file = tmp_path / "my.toml"
    text = config_to_toml(read_config(CONFIGS / "digits.toml"))
    file.write_text(text.replace("[run]", "[run]\nspeed = 3"))
    assert cli.main(["train", str(file)]) == 2
    assert "unknown field run.speed; did you mean run.seed?" in capsys.readouterr().err


def test_help_shows_every_flag(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("train", "calibrate", "epsilon", "report"))
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    flags = "run-dir data-dir resume seed epsilon delta batch-size num-steps"
    for flag in [*flags.split(), "learning-rate", "importance", "json"]:
        assert f"--{flag}" in text, flag


def answer(command, capsys):
    assert cli.main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_calibrate_and_epsilon_agree(capsys):
    plan = answer(["calibrate", "--epsilon", "2", *PLAN], capsys)
    assert 1.99 < plan["epsilon"] <= 2
    noise = str(plan["noise_multiplier"])
    back = answer(["epsilon", "--noise-multiplier", noise, *PLAN], capsys)
    assert back["epsilon"] == pytest.approx(plan["epsilon"], rel=1e-9)


def test_calibrate_takes_as_many_stages_as_a_run(capsys):
    command = ["calibrate", "--epsilon", "2", *PLAN, "--accountant", "rdp"]
    command += ["--schedule.name", "linear", "--schedule.end", "0.5"]
    assert len(answer([*command, "--num-stages", "3"], capsys)["stages"]) == 3


@pytest.mark.parametrize("sought", ["num_steps", "batch_size"])
def test_calibrate_finds_steps_or_batch_size(sought, capsys):
    facts = {"num_steps": "40", "batch_size": "100"}
    del facts[sought]
    (name, value), flag = facts.popitem(), "--" + sought.replace("_", "-")
    command = ["calibrate", "--epsilon", "2", "--noise-multiplier", "1.5"]
    command += ["--delta", "1e-5", "--num-examples", "1000", "--accountant", "rdp"]
    plan = answer([*command, f"--{name.replace('_', '-')}", value], capsys)
    assert plan[sought] > 1 and plan["epsilon"] <= 2
    more = ["epsilon", "--noise-multiplier", "1.5", "--delta", "1e-5"]
    more += ["--num-examples", "1000", "--accountant", "rdp", flag]
    more += [str(plan[sought] + 1), f"--{name.replace('_', '-')}", value]
    assert answer(more, capsys)["epsilon"] > 2  # one more would be too many


def test_a_schedule_is_planned(capsys):
    command = ["calibrate", "--epsilon", "2", *PLAN]
    command += ["--schedule.name", "linear", "--schedule.end", "0.5"]
    plan = answer(command, capsys)
    assert plan["last_noise_multiplier"] < plan["noise_multiplier"]


def test_a_table_is_for_people(capsys):
    assert cli.main(["epsilon", "--noise-multiplier", "1", *PLAN]) == 0
    out = capsys.readouterr().out
    assert "Epsilon" in out and "Expected batch size" in out
    assert "Training satisfies" in out


def test_a_large_delta_is_a_warning_of_one_line(capsys):
    command = ["epsilon", "--noise-multiplier", "1", *PLAN, "--delta", "0.1"]
    assert cli.main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    assert err.startswith("dp-ilg: warning: delta is 0.1") and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--show-private-loss", "--run.show-private-loss"])
def test_the_flag_of_before_names_that_of_now(flag, capsys):
    assert cli.main(["train", flag]) == 2
    assert "now called run.unprotected_train_loss" in capsys.readouterr().err


def test_showing_the_training_loss_warns(trained, capsys):
    assert cli.main(["train", "--unprotected-train-loss"]) == 0
    assert "the guarantee is void" in capsys.readouterr().err
    assert cli.main(["train"]) == 0
    assert "void" not in capsys.readouterr().err


def test_ctrl_c_exits_130_and_can_be_resumed(tmp_path, capsys, monkeypatch):
    real = progress.Bar.stepped

    def stepped(self, step):
        real(self, step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(progress.Bar, "stepped", stepped)
    command = ["train", "--run-dir", str(tmp_path / "run"), "--seed", "1", *TINY]
    assert cli.main([*command, "--json", "--tensorboard"]) == 130
    out, err = capsys.readouterr()
    assert out == "" and "Stopped after step 2 of 3; go on with --resume" in err
    page = (tmp_path / "run" / "report.html").read_text()
    assert "The run took 2 of 3 planned steps" in page and "Unfinished run" in page
    monkeypatch.setattr(runner, "write_report", lambda path: path)
    assert cli.main(["train", "--resume", "--run-dir", str(tmp_path / "run")]) == 0
    assert "100" not in capsys.readouterr().err.splitlines()[0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3
    if importlib.util.find_spec("tensorboardX") is not None:  # each evaluation once
        (events,) = (tmp_path / "run").glob("events.out.tfevents.*")
        steps = [step for step, tag in points(events) if tag == "epsilon"]
        assert steps == [2, 3]


def test_report_writes_the_page_again(tmp_path, capsys, monkeypatch):
    from dp_ilg.experiments.reports import page

    monkeypatch.setattr(page, "write_report", lambda path: path / "report.html")
    found = answer(["report", str(tmp_path)], capsys)
    assert found["report"] == str(tmp_path / "report.html")


def test_speed_counts_the_expected_batch(monkeypatch):
    clock = iter([0.0, 1.0, 1.0, 3.0])
    monkeypatch.setattr(progress, "perf_counter", lambda: next(clock))
    shown = []

    class Fake(progress.Progress):
        def add_task(self, *args, **fields):
            return 0

        def update(self, task, **fields):
            shown.append(fields.get("speed"))

    bar = progress.Bar(Fake(), batch_size=100, num_steps=9, step=0)
    bar.stepped(1)
    bar.stepped(2)
    assert shown == ["", "50 examples/s"]


def test_the_console_script_is_declared():
    text = (CONFIGS.parent / "pyproject.toml").read_text()
    scripts = tomllib.loads(text)["project"]["scripts"]
    assert scripts == {"dp-ilg": "dp_ilg.experiments.cli.start:main"}


@pytest.mark.slow
def test_the_module_runs_as_a_process():
    command = [sys.executable, "-m", "dp_ilg.experiments.cli.main", "trian"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "dp-ilg: There is no command 'trian'; did you mean train?\n"


@pytest.mark.slow
def test_a_file_size_limit_is_one_sentence_and_leaves_nothing(tmp_path):
    limit = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (4096, 4096));"
    run = "from dp_ilg.experiments.cli.main import main; raise SystemExit(main(%r))"
    command = ["train", "--run-dir", str(tmp_path / "run"), "--seed", "1", *TINY]
    code = limit + run % command
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "File too large; free space" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_help_of_train_has_one_line_a_flag_with_its_meaning(capsys):
    assert cli.main(["train", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 140
    flags = [line.split()[0].rstrip(",") for line in lines if line[:4] == "  --"]
    assert len(flags) == len({*flags}) > 70
    for line in lines:
        if line[:4] == "  --":
            assert "  " in line[4:].strip(), f"no words: {line}"
    assert any("--epsilon" in line and "(default 8)" in line for line in lines)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--epsilon"], "--epsilon needs a value (the most privacy to spend"),
        (
            ["--num-steps", "--seed", "3"],
            "--num-steps needs a value (steps of",
        ),
        (["--run-dir"], "--run-dir needs a value; see --help."),
    ],
)
def test_a_flag_without_a_value_says_what_it_wants(args, words, capsys):
    assert cli.main(["train", *args]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
