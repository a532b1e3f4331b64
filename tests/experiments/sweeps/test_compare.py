"""`dp-ilg compare`: bad sweeps, choices, resumption, deaths and folders."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.experiments.cli import compare as compare_command
from dp_ilg.experiments.cli import main as cli
from dp_ilg.experiments.sweeps import compare, plots
from dp_ilg.experiments.sweeps.results import Results, read_results
from tests.helpers.fake_worker import PLAN

CONFIGS = Path(__file__).parents[3] / "configs"
WORKER = Path(__file__).parents[2] / "helpers" / "fake_worker.py"
SWEEP = f"""
epsilons = [2.0]
seeds = [0, 1, 2, 3, 4]
workers = 2
[tuning]
seeds = [1000]
learning_rates = [0.01, 0.03, 0.1]
values = [0.5, 1.0]
[[tasks]]
config = "{CONFIGS}/digits.toml"
[[methods]]
name = "dp_adam"
overrides.optimizer.method = "dp_adam"
[[methods]]
name = "sgd"
overrides.optimizer.method = "dp_sgd"
"""
TUNING, FINAL = 2 * 6, 2 * 5


@pytest.fixture
def sweep(tmp_path):
    """A sweep on file; call it with replacements to write another one."""

    def write(*changes, name="sweep.toml", text=SWEEP):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def fake(tmp_path, monkeypatch, request):
    """Puts the fake worker in place and tells what it was asked."""
    if "draws" not in request.fixturenames:
        for name in ("accuracy_figure", "sensitivity_figure"):
            monkeypatch.setattr(plots, name, lambda *args: Figure((1, 1)))

    def use(behaviour="good", seed=-1):
        script = [sys.executable, str(WORKER), str(tmp_path)]
        monkeypatch.setattr(compare, "WORKER", (*script, behaviour, str(seed)))

    def asked():
        path = tmp_path / "asked.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    use()
    use.asked = asked
    return use


@pytest.fixture
def draws():
    """Asked for by tests in which figures are drawn."""


@pytest.fixture
def run(tmp_path, capsys):
    """Does what the command does; gives its result, or the sentence it refuses with."""

    def go(path, out="out", **options):
        capsys.readouterr()
        go.ended = 0
        command = compare_command.compare(
            path, out=str(tmp_path / out), json=True, **options
        )
        try:
            command()
        except ValueError as error:
            assert "\n" not in str(error)
            return None, str(error)
        except SystemExit as end:
            go.ended = end.code
        text, err = capsys.readouterr()
        return json.loads(text), err

    return go


def runs(folder):
    return [r for r in read_results(folder) if r["kind"] == "run"]


def test_a_sweep_tunes_on_other_seeds_chooses_and_reports(
    sweep, fake, run, tmp_path, draws
):
    found, err = run(sweep())
    assert found["complete"]
    asked = fake.asked()
    held = [c for c in asked if "validation" in c["data"]]
    assert len(held) == TUNING and len(asked) == TUNING + FINAL
    assert {c["run"]["seed"] for c in held} == {1000}
    rest = [c for c in asked if "validation" not in c["data"]]
    assert {c["run"]["seed"] for c in rest} == set(range(5))
    assert {c["optimizer"]["learning_rate"] for c in rest} == {0.03}
    adam, sgd = found["cells"][:2]
    assert adam["choice"]["learning_rate"] == 0.03
    assert adam["choice"]["value"] == 0.5  # of equals the first
    assert adam["mean"] == pytest.approx(90.2) and adam["difference"] is None
    assert sgd["difference"] == pytest.approx(-5) and sgd["verdict"] == "below"
    assert [row["runs"] for row in found["tuning_cost"]] == [6, 6]
    cost = found["tuning_cost"][0]
    assert cost["sum_of_epsilons"] == pytest.approx(6 * 1.9)
    alone = PrivacyPlan.from_json(json.dumps(PLAN)).epsilon()
    assert alone < cost["search_epsilon"] < 6 * alone
    records = read_results(tmp_path / "out")
    choices = [r for r in records if r["kind"] == "choice"]
    assert len(choices) == 2 and choices[0]["tuning_runs"] == 6
    one = next(r for r in records if r["kind"] == "run")
    assert {"machine", "versions", "command", "digest", "phase", "config"} <= set(one)
    assert f"{TUNING + FINAL}/{TUNING + FINAL}" in err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.jsonl", "report.html", "report.md", "accuracy-1.svg"} <= names
    markdown = Path(found["markdown"]).read_text()
    assert "| sgd | 85.20 ± 0.16; -5.00 (-5.00 to -5.00) ▼ |" in markdown
    assert (
        "| dp_adam | 2 | privacy.l2_clip_norm = 0.5 | 0.01: 85.23, 0.03: **90.00**"
        in (markdown)
    )
    assert "= 1.0 | 0.01: 85.23, 0.03: 90.00, 0.1: 84.77 |" in markdown


def test_perplexity_stands_beside_accuracy(sweep, fake, run, tmp_path):
    fake("texts")
    found, _ = run(sweep())
    markdown = Path(found["markdown"]).read_text()
    assert "| dp_adam | 90.20 ± 0.16; perplexity 90.20 ± 0.16 |" in markdown
    gap = "-5.00 (-5.00 to -5.00)"
    assert f"85.20 ± 0.16; {gap} ▼; perplexity 85.20 ± 0.16; {gap} |" in markdown
    page = Path(found["report"]).read_text()
    assert f"<small>perplexity 85.20 ± 0.16; {gap}</small>" in page
    assert found["cells"][1]["perplexity"]["4"] == pytest.approx(85.4)


def test_only_what_a_sweep_made_is_replaced_or_removed(sweep, fake, run, tmp_path):
    (tmp_path / "out" / "compiled").mkdir(parents=True)
    (tmp_path / "out" / "compiled" / "mine").write_text("kept")
    assert run(sweep())[0]["complete"]
    assert (tmp_path / "out" / "compiled" / "mine").read_text() == "kept"
    training = tmp_path / "run"
    training.mkdir()
    for name in ("config.toml", "report.html"):
        (training / name).write_text("a run's")
    for only in (False, True):
        found, err = run(sweep(), out="run", report_only=only)
        assert found is None and "is the folder of a run" in err
    assert (training / "report.html").read_text() == "a run's"
    found, err = run(sweep(), out="sweep.toml")
    assert found is None and "sweep.toml is a file; give a folder" in err


def test_failed_runs_of_before_a_new_field_are_tried_again(sweep, fake, run, tmp_path):
    fake("failed", 4)
    found, _ = run(sweep())
    assert not found["complete"] and found["cells"][0]["status"] == "failed"
    file = tmp_path / "out" / "results.jsonl"
    old = [json.loads(line) for line in file.read_text().splitlines()]
    for record in old:
        if record.get("status") == "failed":
            del record["digest"], record["config"]["model"]["embed_init"]
    file.write_text("".join(json.dumps(record) + "\n" for record in old))
    fake("good")
    assert not run(sweep())[0]["complete"]
    assert run(sweep(), retry_failed=True)[0]["complete"]


def test_nothing_is_run_again_and_a_cut_line_is_mended(sweep, fake, run, tmp_path):
    path = sweep()
    run(path)
    before, file = len(fake.asked()), tmp_path / "out" / "results.jsonl"
    whole = file.read_bytes()
    run(path)
    assert len(fake.asked()) == before and file.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-3]) + lines[-3][:50])  # killed while writing
    found, _ = run(path)
    assert found["complete"]
    assert len(fake.asked()) == before + 3
    again = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(again) == len(lines)


def test_a_damaged_line_in_the_middle_is_refused_and_kept(sweep, fake, run, tmp_path):
    run(sweep())
    file = tmp_path / "out" / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], "{\n", *lines[1:]]))
    found, err = run(sweep())
    assert found is None and "Line 2 of" in err
    assert len(file.read_text().splitlines()) == len(lines) + 1


def test_a_line_without_what_a_report_reads_is_refused(sweep, fake, run, tmp_path):
    run(sweep())
    file = tmp_path / "out" / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    run_line = json.loads(lines[0])
    assert run_line["kind"] == "run"
    lacking = [
        {k: v for k, v in run_line.items() if k != name}
        for name in ("accuracy", "seconds", "train_seconds", "delta", "plan", "config")
    ]
    lacking += [run_line | {"status": "failed"}]  # and no error
    changes = {
        "accuracy": ("x", math.nan, 7.0, None),
        "config": (7, run_line["config"] | {"run": {"seed": 3}}),
        "task": (None,),
        "delta": ("x", None),
        "plan": ("x", "[]", 3),
        "seed": (1, 0.5),
        "status": ("doone",),
        "versions": (None, []),
        "perplexity": ("low", math.inf),
    }
    damaged = [run_line | {k: v} for k, found in changes.items() for v in found]
    for record in [*lacking, *damaged]:
        file.write_text("".join([json.dumps(record) + "\n", *lines[1:]]))
        found, err = run(sweep())
        assert found is None and "Line 1 of" in err and "Traceback" not in err, record


@pytest.mark.parametrize("seed", [3, 1000])
def test_a_killed_worker_loses_only_its_run_which_is_tried_again(
    sweep, fake, run, tmp_path, seed
):
    fake("die-once", seed)
    found, _ = run(sweep())
    assert found["complete"]
    assert (tmp_path / "misbehaved").read_text() == "once\n"
    assert len(fake.asked()) == TUNING + FINAL + 1
    assert {r["status"] for r in runs(tmp_path / "out")} == {"done"}


def test_a_run_that_kills_twice_is_failed_and_the_rest_goes_on(
    sweep, fake, run, tmp_path
):
    fake("die-always", 3)
    found, _ = run(sweep())
    assert not found["complete"]
    records = runs(tmp_path / "out")
    failed = [r for r in records if r["status"] == "failed"]
    assert len(failed) == 2 and len(records) == TUNING + FINAL
    assert failed[0]["error"].count(".") == 1
    assert "ended 2 times before it did: it was killed by SIGKILL" in failed[0]["error"]
    cell = found["cells"][0]
    assert cell["status"] == "failed" and len(cell["by_seed"]) == 4
    fake("good")
    assert not run(sweep())[0]["complete"]  # failed runs are there, too
    assert run(sweep(), retry_failed=True)[0]["complete"]
    assert len(runs(tmp_path / "out")) == TUNING + FINAL + 2


def test_processes_that_cannot_start_stop_the_sweep_and_blame_no_run(
    sweep, fake, run, tmp_path
):
    fake("exit", 1000)
    found, err = run(sweep())
    assert found is None and "exit code 3 at its first run; see the end of" in err
    assert runs(tmp_path / "out") == []
    fake("good")
    assert run(sweep())[0]["complete"]


def test_an_impossible_cell_is_on_file_and_the_rest_goes_on(sweep, fake, run, tmp_path):
    fake("impossible", 1000)
    found, _ = run(sweep(), out="all")
    assert {c["status"] for c in found["cells"]} == {"impossible"}
    assert found["cells"][0]["note"] == "It is impossible."
    assert run.ended == 1  # nothing came to an end: not a success
    fake("impossible", 4)
    found, err = run(sweep(), out="some")
    assert run.ended == 0
    assert len(found["cells"][0]["by_seed"]) == 4
    assert len(runs(tmp_path / "some")) == TUNING + FINAL


def test_missing_data_is_said_once_and_is_no_result(sweep, fake, run, tmp_path):
    fake("absent", 1000)
    found, err = run(sweep())
    assert err.count("digits is left out: It is absent.") == 1
    assert {c["status"] for c in found["cells"]} == {"absent"}
    assert all(r["seed"] != 1000 for r in runs(tmp_path / "out"))
    fake("good")
    assert run(sweep())[0]["complete"]


def test_two_sweeps_in_one_folder(sweep, fake, run, tmp_path):
    path = sweep()
    run(path)
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    other = sweep(("epsilons = [2.0]", "epsilons = [1.0]"), name="other.toml")
    found, err = run(other)
    assert found is None and "holds another sweep" in err and "--extend" in err
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before
    asked = len(fake.asked())
    more = sweep(("seeds = [0, 1,", "seeds = [9, 0, 1,"), name="more.toml")
    assert run(more, extend=True)[0]["complete"]
    assert len(fake.asked()) == asked + 2  # the new seed of each cell
    with Results(tmp_path / "out", Path(more).read_text()):
        found, err = run(more)
        assert found is None and "Another process is at work" in err
        assert run(more, report_only=True)[0]["complete"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_same_sweep_goes_on_after_its_process_was_ended(
    sweep, fake, run, tmp_path, number
):
    out = tmp_path / "out"
    script = [sys.executable, str(WORKER), str(tmp_path), "hang", "2"]
    code = (
        "import signal, sys; from dp_ilg.experiments.cli import main as cli; "
        "from dp_ilg.experiments.sweeps import compare; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "  # off behind '&'
        f"compare.WORKER = {tuple(script)!r}; "
        f"sys.exit(cli.main(['compare', {sweep()!r}, '--out', {str(out)!r}]))"
    )
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "misbehaved").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "at work" in run(sweep())[1]  # it lives, and holds the folder
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130 and "Interrupted; the same command" in err
        assert "Traceback" not in err
    done = len(runs(out))
    found, _ = run(sweep())
    assert found["complete"]
    assert 0 < done < TUNING + FINAL == len(runs(out))


def test_a_report_of_what_is_there_says_what_is_missing(sweep, fake, run, tmp_path):
    path = sweep()
    found, err = run(path, report_only=True)
    assert found is None and "out holds no sweep; give the --out of one." in err
    run(path)
    file = tmp_path / "out" / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]) + '{"kind": "ru')
    found, _ = run(path, report_only=True)
    assert not found["complete"] and len(found["missing"]) == 2
    there = sum(json.loads(line).get("method") == "dp_adam" for line in lines[:4])
    said = f"Tuning: {there} of 6 runs are there. Then 5 more."
    assert there >= 2 and said in found["missing"][0]
    assert "Not complete, 2 cells" in Path(found["markdown"]).read_text()
    assert file.read_text().endswith('{"kind": "ru')  # a report changes nothing


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("[tuning]", "[tunning]"), "section tunning; did you mean tuning?"),
        (("epsilons =", "epsilon ="), "field epsilon; did you mean epsilons?"),
        (("digits.toml", "digit.toml"), "digit.toml cannot be read"),
        (('"dp_sgd"', '"dp_sdg"'), "'dp_sdg', which is unknown; did you mean dp_sgd?"),
        (("optimizer.method", "optimizer.metod"), "did you mean optimizer.method?"),
        (("values = [0.5, 1.0]", "values = [0.5, 0]"), "l2_clip_norm is 0.0, but must"),
        (("values = [0.5, 1.0]", "values = [0.5, 0.5]"), "each once"),
        (("seeds = [1000]", "seeds = [4]"), "the seed 4 twice (seeds that tune"),
        (("seeds = [1000]", "seeds = []"), "has no tuning.seeds, but dp_adam has 6"),
        (("seeds = [1000]", "seeds = [-1]"), "tuning.seeds is -1"),
        (("seeds = [1000]", f"seeds = [{2**63}]"), "give seeds below 2**63"),
        (("epsilons = [2.0]", "epsilons = []"), "has no epsilons"),
        (("epsilons = [2.0]", "epsilons = [1, 1.0000001]"), "the epsilon 1 twice"),
        (("workers = 2", 'source = "x"'), "unknown field source; remove it"),
        (
            ("values = [0.5, 1.0]", 'parameter = "privacy"\nvalues = [{epsilon = 9}]'),
            "sets privacy.epsilon in overrides or as a parameter",
        ),
        (
            ("values = [0.5, 1.0]", 'parameter = "run"\nvalues = [{seed = 3}]'),
            "sets run.seed in overrides or as a parameter",
        ),
        (
            ('digits.toml"', 'digits.toml"\nlearning_rates = []'),
            "the learning rates of dp_adam are []; give at least one",
        ),
        (('digits.toml"', 'digits.toml"\nvalues = []'), "dp_adam are []; give at"),
        (
            ('digits.toml"', 'digits.toml"\noverrides.model.embed_init = 0.1'),
            "The model mlp has no size embed_init; it takes hidden, activation.",
        ),
        (('name = "sgd"', 'name = "sgd"\noverrides.privacy = 3'), "privacy"),
        (('name = "sgd"', 'name = "sgd"\noverrides.privacy = "epsilon"'), "privacy"),
        (("epsilons = [2.0]", "epsilons = [-1]"), "epsilons is -1.0, but must"),
        (("workers = 2", "workers = 0"), "workers is 0"),
        (
            ("workers = 2", 'reference = "adam"'),
            "no method of it; did you mean dp_adam",
        ),
        (('name = "sgd"', 'name = "dp_adam"'), "the method dp_adam twice"),
        (("[tuning]", '[tuning]\nparameter = "privacy.clip"'), "privacy.clip"),
        (
            ('name = "sgd"', 'name = "sgd"\nlearning_rates = [1.0]'),
            "the method sgd has 1 learning rates but dp_adam has 3",
        ),
        (
            ('name = "sgd"', 'name = "sgd"\nparameter = "optimizer.momentum"'),
            "names optimizer.momentum but no values",
        ),
        (
            ('name = "sgd"', 'name = "sgd"\noverrides.optimizer.gamma = 0.1'),
            "method sgd: optimizer.method is dp_sgd, which has no option gamma",
        ),
        (
            ('name = "sgd"', 'name = "sgd"\noverrides.privacy.epsilon = 0.1'),
            "but the sweep itself does so; use epsilons",
        ),
        (
            ('digits.toml"', 'digits.toml"\noverrides.data.name = "digit"'),
            "data.name is 'digit', which is unknown; did you mean digits?",
        ),
        (("[[tasks]]", "[[tasks"), "is not valid TOML"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_sentence(sweep, run, tmp_path, change, words):
    found, err = run(sweep(change))
    assert found is None and words in err, err
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_it_in_one_line(sweep, fake, tmp_path, capsys):
    command = ["compare", "--out", str(tmp_path / "out"), "--json"]
    assert cli.main([*command, sweep(("dp_sgd", "dp_sdg"))]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "did you mean dp_sgd?" in err
    assert cli.main([*command, sweep(), "--workers", "1"]) == 0
    out, _ = capsys.readouterr()
    assert out.count("\n") == 1 and json.loads(out)["complete"]


def test_a_missing_data_folder_and_no_workers(sweep, fake, run):
    assert "is no folder" in run(sweep(), data_dir="no/such")[1]
    assert "workers is 0" in run(sweep(), workers=0)[1]


def test_what_a_report_shows_is_escaped(sweep, fake, run, tmp_path, draws):
    name = "<script>alert(1)</script>|`x"
    change = ('name = "sgd"', f"name = '{name}'\nlearning_rate_factor = 1.5")
    found, _ = run(sweep(change, ("workers = 2", 'title = "<img src=x>"')))
    page = Path(found["report"]).read_text()
    assert "<script" not in page and "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;|`x" in page
    markdown = Path(found["markdown"]).read_text()
    assert "<script" not in markdown and "<img" not in markdown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\|\\`x" in markdown
    for figure in (tmp_path / "out").glob("*.svg"):
        assert "<script" not in figure.read_text()
