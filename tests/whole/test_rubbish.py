"""Rubbish to everything that reads: refused in one sentence, or understood.

`benchmarks/trust/fuzz_inputs.py` feeds 100,000 inputs; this is its small form, and what
it found.
"""

import importlib.metadata
import os
import pickle
import random
import re
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.experiments.cli import main as cli
from dp_ilg.experiments.config.schema import Config, config_to_toml, read_config
from dp_ilg.experiments.data.files import DataError, read_npz
from dp_ilg.experiments.reports.record import read_run
from tests.helpers import fuzz_arguments, fuzz_inputs
from tests.helpers.fuzz_inputs import TARGETS, fresh

FILES = [name for name in TARGETS if not name.startswith("train")]
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", TARGETS)
def test_good_inputs_are_accepted(name, tmp_path):
    """Otherwise the fuzz would only ever see the first check."""
    for content in TARGETS[name].seeds():
        assert TARGETS[name].check(content, fresh(tmp_path / "x")) == "accepted"


@pytest.mark.parametrize("name", FILES)
def test_changed_bytes_are_read_or_refused(name, tmp_path):
    seeds, dice, found = TARGETS[name].seeds(), random.Random(name), set()
    fresh(tmp_path / "x")
    for _ in range(200):
        content = fuzz_inputs.mutate(seeds, dice)
        found.add(TARGETS[name].check(content, tmp_path / "x"))
    assert found == {"accepted", "refused"}


@pytest.mark.parametrize("name", ["train CONFIG", "train FLAGS"])
def test_the_command_line_never_shows_a_traceback(name, tmp_path):
    seeds, dice = TARGETS[name].seeds(), random.Random(name)
    fresh(tmp_path / "x")
    for _ in range(12):
        TARGETS[name].check(fuzz_inputs.mutate(seeds, dice), tmp_path / "x")
    assert not (tmp_path / "x" / "r").exists()  # no partial run folder


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(FILES))
def test_any_bytes_at_all(data, name, tmp_path_factory):
    """Hypothesis mixes good pieces with bytes and shrinks what fails."""
    seed = data.draw(st.sampled_from(TARGETS[name].seeds()))
    cut = data.draw(st.integers(0, len(seed)))
    middle = data.draw(st.binary(max_size=20) | st.sampled_from(fuzz_inputs.TOKENS))
    content = seed[:cut] + middle + seed[data.draw(st.integers(0, len(seed))) :]
    folder = tmp_path_factory.mktemp("fuzz")
    assert TARGETS[name].check(content, folder) in ("accepted", "refused")


def test_the_good_calls_are_answered():
    for name, (fn, good) in fuzz_arguments.rows().items():
        assert fuzz_arguments.attempt(name, fn, good) == "accepted", name


def test_public_functions_answer_or_say_one_sentence():
    dice = random.Random(0)
    found = [fuzz_arguments.call(dice) for _ in range(1500)]
    assert {"accepted", "refused"} == set(found)


def test_the_harness_notices_what_it_is_there_for(tmp_path):
    def tracebacks(value):
        raise KeyError(value)

    def lines(value):
        raise ValueError("one\ntwo")

    for fn in (tracebacks, lines):
        with pytest.raises(AssertionError):
            fuzz_arguments.attempt("fn", fn, {"value": 1})
    with pytest.raises(KeyError):
        fuzz_inputs.reading(b"x", tmp_path / "x", tracebacks, ValueError)
    with pytest.raises(AssertionError):
        fuzz_inputs.reading(b"x", tmp_path / "x", lines, ValueError)


# ------------------------------------------------------------------ what it found


def test_deep_nesting_is_refused(tmp_path):
    path = tmp_path / "deep.toml"
    path.write_text("[data]\nname = " + "[" * 5000)
    with pytest.raises(ValueError, match="is not valid TOML"):
        read_config(path)
    with pytest.raises(ValueError, match="is not valid JSON"):
        PrivacyPlan.from_json('{"a":' * 5000)
    run = tmp_path / "run"
    run.mkdir()
    for name, make in fuzz_inputs.RUN_FILES.items():
        (run / name).write_text(make())
    (run / "metrics.jsonl").write_text('{"a":' * 5000 + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl is damaged"):
        read_run(run)
    assert cli.main(["train", "--optimizer.blocks", "[" * 5000]) == 2


def test_whole_numbers_beyond_floating_point_are_refused(tmp_path):
    path = tmp_path / "huge.toml"
    text = config_to_toml(Config())
    path.write_text(text.replace("epsilon = 8.0", f"epsilon = {10**400}"))
    with pytest.raises(ValueError, match="must be a number"):
        read_config(path)
    with pytest.raises(ValueError, match="num_steps is 1000"):
        PrivacyPlan(**fuzz_arguments.PLAN_FACTS | {"num_steps": 10**400})  # type: ignore


def test_a_type_that_is_python_and_no_type_is_refused(tmp_path):
    header = b"{'descr': '<,8', 'fortran_order': False, 'shape': (2,), }"
    head = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", head)
    with pytest.raises(DataError, match="SyntaxError"):
        read_npz(tmp_path / "a.npz", ["a"])


# ------------------------------------------------------------------------ pickles


class Touch:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_no_pickle_in_a_data_file_is_ever_loaded(tmp_path, capsys):
    sign = tmp_path / "unpickled"
    array = np.empty(1, object)
    array[0] = Touch(sign)
    np.savez(tmp_path / "mnist.npz", x_train=array, y_train=array)
    command = ["train", "--data.name", "mnist", "--data-dir", str(tmp_path)]
    assert cli.main([*command, "--run-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "pickled Python objects, which are never loaded" in err
    assert err.count("\n") == 1 and not sign.exists()
    (tmp_path / "mnist.npz").write_bytes(pickle.dumps(Touch(sign)))
    assert cli.main([*command, "--run-dir", str(tmp_path / "run")]) == 2
    assert not sign.exists()
    with np.load(_object_file(tmp_path, array), allow_pickle=True) as file:
        _ = file["x_train"]
    assert sign.exists()  # so the file was loaded, and would have done it


def _object_file(folder, array):
    path = folder / "objects.npz"
    np.savez(path, x_train=array)
    return path


# ------------------------------------------------------------------ what is shown

HOSTILE = "<script>alert(1)</script>\"&'"


def test_the_report_shows_names_and_runs_none(tmp_path):
    """Names of the run, the data, the model and its layers, in the page and figures."""
    pytest.importorskip("matplotlib")
    from dp_ilg.experiments.reports.page import write_overview, write_report

    run = tmp_path / "run<script>alert(2)<"
    run.mkdir()
    for name, make in fuzz_inputs.RUN_FILES.items():
        (run / name).write_text(make())
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(
        text.replace('"digits"', f"'''{HOSTILE}'''").replace('"mlp"', "'<img src=x>'")
    )
    layers = fuzz_inputs.metrics_line().replace('"a"', '"<script>b</script>"')
    (run / "metrics.jsonl").write_text(layers + "\n")
    page = write_report(run).read_text()
    assert "&lt;script&gt;alert(1)" in page and "&lt;script&gt;b" in page
    tags = {tag.lower() for tag in re.findall(r"<\s*([a-zA-Z!]+)", page)}
    assert not tags & {"script", "img", "iframe", "object", "foreignobject"}
    assert "default-src 'none'" in page
    figure = write_overview(run, tmp_path / "overview.svg").read_text()
    assert "<script" not in figure


# ------------------------------------------------------------------- dependencies


def test_every_dependency_has_a_lower_bound():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (r for group in groups for r in group):
        own = requirement.startswith("dp_ilg[")
        assert own or re.fullmatch(r"[A-Za-z0-9_.-]+>=\d[\w.]*", requirement)


def test_what_is_installed_is_listed_and_within_its_bounds():
    """What can be said without asking anybody for known vulnerabilities."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name, bound = requirement.split(">=")
        found = importlib.metadata.version(name)
        numbers = [[int(n) for n in re.findall(r"\d+", v)] for v in (found, bound)]
        assert numbers[0] >= numbers[1], (name, found)
