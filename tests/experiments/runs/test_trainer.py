"""Training: order, exactness of a resumed run, what the folder holds and refuses."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.experiments.config.schema import (
    Config,
    LearningRateConfig,
    ModelConfig,
    OptimizerConfig,
    PrivacyConfig,
    RunConfig,
    ScheduleConfig,
    config_to_toml,
)
from dp_ilg.experiments.runs import folder as run_folder
from dp_ilg.experiments.runs import runner
from dp_ilg.experiments.runs.evaluation import params_sha256
from dp_ilg.experiments.runs.job import build_job
from dp_ilg.experiments.runs.keys import derived_keys, identity, run_keys
from dp_ilg.experiments.runs.recipe import learning_rate, source_of_importance
from dp_ilg.experiments.runs.runner import Interrupted, run_training, with_seed
from dp_ilg.experiments.runs.trainer import Watch, start, train
from dp_ilg.training import checkpoints
from tests.helpers.compiled import compiled_once  # noqa: F401 - a fixture

SEED = 918273645
STEPS = 20


def tiny(**changes):
    """Twenty small steps on the digits, with changed fields (section__field=value)."""
    sections = {
        "model": {"hidden": (8,)},
        "privacy": {"num_steps": STEPS, "batch_size": 64, "accountant": "rdp"},
        "optimizer": {"learning_rate": 0.05},
        "run": {"seed": SEED, "eval_every": 10, "checkpoint_every": 5},
    }
    for place, value in changes.items():
        section, name = place.split("__")
        sections[section][name] = value
    return Config(
        model=ModelConfig(**sections["model"]),
        privacy=PrivacyConfig(**sections["privacy"]),
        optimizer=OptimizerConfig(**sections["optimizer"]),
        run=RunConfig(**sections["run"]),
    )


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Drawing the page takes seconds; reports/test_page.py looks at it."""
    monkeypatch.setattr(runner, "write_report", lambda path: path)


@contextmanager
def calling(action, job, first):
    """A progress that calls `action(step)` after every step."""
    yield Watch(stepped=action)


def at(step, action):
    def stepped(now):
        if now == step:
            action()

    return lambda job, first: calling(stepped, job, first)


class Crash(Exception):
    pass


def crash():
    raise Crash


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled_once):  # noqa: F811
    """A run of all steps: its folder and summary."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "write_report", lambda path: path)
        return path, run_training(tiny(), path)


# a whole run


def test_a_linen_model_learns(whole):
    assert whole[1]["test_accuracy"] > 0.5  # chance is 0.1


def test_an_nnx_model_learns(tmp_path):
    summary = run_training(tiny(model__framework="nnx"), tmp_path / "run")
    assert summary["test_accuracy"] > 0.5


def test_the_summary_and_the_metrics_tell_what_was_released(whole):
    path, summary = whole
    assert json.loads((path / "summary.json").read_text()) == summary
    assert summary["steps"] == STEPS and summary["delta"] == 1e-5
    assert 7.9 < summary["epsilon"] <= 8.0
    assert summary["seed_fixed"] and "do not know the seed" in summary["seed_note"]
    lines = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert lines[0]["epsilon"] < lines[1]["epsilon"] == summary["epsilon"]
    for line in lines:
        layers = line["layers"]
        assert layers["names"] == ["hidden_0", "output"]
        assert {len(values) for values in layers.values()} == {2}
        assert "unprotected_train_loss" not in line
    assert lines[-1]["test_accuracy"] == summary["test_accuracy"]


def test_the_noise_in_the_metrics_is_that_on_the_mean(whole):
    path, _ = whole
    line = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
    plan = dp_ilg.PrivacyPlan.from_json((path / "plan.json").read_text())
    for weight, stddev in zip(
        line["layers"]["weights"], line["layers"]["noise_stddev"], strict=True
    ):
        sigma = plan.gradient_noise_multipliers[-1]
        expected = sigma * plan.l2_clip_norm * weight / plan.batch_size
        assert stddev == pytest.approx(expected, rel=1e-5)


def test_training_loss_is_shown_only_if_asked_for_and_labelled(tmp_path):
    config = tiny(run__unprotected_train_loss=True)
    summary = run_training(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["unprotected_train_loss"] > 0 for line in lines)
    assert "guarantee does not hold" in summary["warning"]


def test_uniform_importance_spends_nothing_on_scores():
    assert build_job(tiny(optimizer__importance="uniform")).plan.score_budget == 0
    assert build_job(tiny(optimizer__source="released")).plan.score_budget == 0
    assert build_job(tiny()).plan.score_budget == 0.01


def test_a_step_is_in_the_ledger_before_it_is_taken(tmp_path):
    job = build_job(tiny())
    taken = []

    class Full(dp_ilg.PrivacyLedger):
        def record(self, step, *, released_from):
            taken.append(f"recorded {step}")
            if step == 3:
                raise OSError(errno.ENOSPC, "No space left on device")

    watch = Watch(stepped=lambda step: taken.append(f"took {step - 1}"))
    ledger = Full(tmp_path / "ledger.jsonl", job.plan)
    with ledger, pytest.raises(OSError, match="No space left"):
        train(job, start(job, run_keys(job, 1)), ledger, watch)
    both = [f"{word} {t}" for t in range(3) for word in ("recorded", "took")]
    assert taken == [*both, "recorded 3"]


# a run that stops


@pytest.mark.parametrize("step", [1, 13])
def test_a_run_that_crashed_continues_to_the_same_bits(step, whole, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(Crash):
        run_training(tiny(), path, resume=True, progress=at(step, crash))
    saved = max(int(p.name) for p in (path / "checkpoints").iterdir())
    assert saved == step // 5 * 5  # some steps will be repeated
    with dp_ilg.PrivacyLedger(path / "ledger.jsonl", build_job(tiny()).plan) as ledger:
        assert ledger.steps == step
    summary = run_training(tiny(), path, resume=True)
    assert summary["params_sha256"] == whole[1]["params_sha256"]
    assert summary["epsilon"] == whole[1]["epsilon"]
    lines = (path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]


def test_without_its_seed_a_run_continues_from_the_keys_in_its_checkpoint(
    whole, tmp_path
):
    path = tmp_path / "run"
    with pytest.raises(Crash):
        run_training(tiny(), path, progress=at(7, crash))
    summary = run_training(with_seed(tiny(), None), path, resume=True)
    assert summary["params_sha256"] == whole[1]["params_sha256"]
    assert summary["seed_fixed"]


def test_fresh_keys_differ_from_run_to_run(tmp_path):
    config = with_seed(tiny(), None)
    digests = {
        run_training(config, tmp_path / name)["params_sha256"] for name in ("a", "b")
    }
    assert len(digests) == 2


def test_ctrl_c_ends_after_the_step_and_can_be_resumed(whole, tmp_path):
    path = tmp_path / "run"
    press = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="after step 12 of 20; go on with --resume"):
        run_training(tiny(), path, progress=at(12, press))
    assert signal.getsignal(signal.SIGINT) is handler
    assert (path / "checkpoints" / "00000012").is_dir()
    assert not (path / "summary.json").exists()
    summary = run_training(tiny(), path, resume=True)
    assert summary["params_sha256"] == whole[1]["params_sha256"]


def test_a_finished_run_resumed_gives_its_summary_again(whole, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(whole[0], path)
    before = (path / "ledger.jsonl").read_bytes()
    assert run_training(tiny(), path, resume=True) == whole[1]
    assert (path / "ledger.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_killed_process_continues_to_the_same_bits(whole, tmp_path):
    path, config = tmp_path / "run", tmp_path / "tiny.toml"
    config.write_text(config_to_toml(tiny()))
    command = [
        sys.executable,
        "-m",
        "dp_ilg.experiments.cli.main",
        "train",
        str(config),
    ]
    command += ["--run-dir", str(path), "--seed", str(SEED), "--resume", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        ledger = path / "ledger.jsonl"
        deadline = time.monotonic() + 120
        while not (ledger.exists() and ledger.read_text().count("\n") > 4):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        process.kill()
    assert not (path / "summary.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["params_sha256"] == whole[1]["params_sha256"]


# what is refused, and leaves nothing


def test_a_folder_that_exists_is_refused(whole, tmp_path):
    with pytest.raises(
        ValueError, match="exists; choose another one, or pass --resume"
    ):
        run_training(tiny(), whole[0])
    with pytest.raises(ValueError, match="exists"):
        run_training(tiny(), tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"privacy__epsilon": 1.0}, {"model__hidden": (9,)}, {"run__eval_every": 3}],
    ids=str,
)
def test_another_configuration_is_refused(change, whole):
    with pytest.raises(ValueError, match="begun with another configuration"):
        run_training(tiny(**change), whole[0], resume=True)


def damaged(whole, tmp_path, harm):
    path = tmp_path / "run"
    shutil.copytree(whole[0], path)
    (path / "summary.json").unlink()
    harm(path)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises((ValueError, OSError)) as caught:
        run_training(tiny(), path, resume=True)
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_of_another_plan_is_refused(whole, tmp_path):
    other, job = tmp_path / "other", build_job(tiny(privacy__epsilon=3.0))
    run_folder.RunFolder(other).begin(job, start(job, run_keys(job, SEED)), True)

    def swap(path):
        shutil.rmtree(path / "checkpoints")
        shutil.copytree(other / "checkpoints", path / "checkpoints")

    assert "made with another plan" in damaged(whole, tmp_path, swap)

    def swap_plan(path):
        shutil.copy(other / "plan.json", path / "plan.json")

    shutil.rmtree(tmp_path / "run")
    assert "made with another plan" in damaged(whole, tmp_path, swap_plan)


def test_a_damaged_checkpoint_is_refused(whole, tmp_path):
    def harm(path):
        for file in (path / "checkpoints" / "00000020").rglob("*"):
            if file.is_file():
                file.write_bytes(b"")

    assert "00000020 is damaged" in damaged(whole, tmp_path, harm)


def test_a_folder_without_checkpoints_is_refused(whole, tmp_path):
    harm = lambda path: shutil.rmtree(path / "checkpoints")  # noqa: E731
    assert "There is no checkpoint" in damaged(whole, tmp_path, harm)


def test_a_ledger_that_lost_steps_is_refused(whole, tmp_path):
    def harm(path):
        lines = (path / "ledger.jsonl").read_text().splitlines(keepends=True)
        (path / "ledger.jsonl").write_text("".join(lines[:5]))

    assert "released steps are missing" in damaged(whole, tmp_path, harm)


def test_a_plan_that_is_missing_is_refused(whole, tmp_path):
    harm = lambda path: (path / "plan.json").unlink()  # noqa: E731
    assert "plan.json cannot be read" in damaged(whole, tmp_path, harm)


def test_another_seed_is_refused(whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole[0], path)
    with pytest.raises(ValueError, match="--seed is not the one"):
        run_training(with_seed(tiny(), SEED + 1), path, resume=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"privacy__batch_size": 5000}, "only 1437 examples"),
        ({"run__engine": "warp"}, "engine is 'warp'"),
        ({"optimizer__importance": "uniforn"}, "did you mean uniform"),
        ({"optimizer__frozen": ("absent",)}, "No parameter matches 'absent'"),
        ({"optimizer__frozen": ("*",)}, "Every parameter is frozen"),
        ({"model__embed_dim": 3}, "no size embed_dim"),
        ({"privacy__schedule": ScheduleConfig("linear")}, "linear lacks end"),
        ({"privacy__schedule": ScheduleConfig("linaer")}, "did you mean linear"),
        ({"privacy__schedule": ScheduleConfig(end=0.5)}, "no parameter end"),
        (
            {"optimizer__learning_rate_schedule": LearningRateConfig("cosine", 20)},
            "must be below privacy.num_steps",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_start_that_fails_leaves_nothing(change, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        run_training(tiny(**change), tmp_path / "runs" / "one")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        run_training(tiny(), tmp_path / "one")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_can_be_freed_and_the_run_resumed(
    whole, tmp_path, monkeypatch
):
    saved = []
    real = checkpoints.save_checkpoint

    def full(folder, step, *args):
        saved.append(step)
        if step == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(folder, step, *args)

    monkeypatch.setattr(run_folder, "save_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        run_training(tiny(), tmp_path / "one")
    assert saved == [0, 5, 10]
    monkeypatch.setattr(run_folder, "save_checkpoint", real)
    summary = run_training(tiny(), tmp_path / "one", resume=True)
    assert summary["params_sha256"] == whole[1]["params_sha256"]


# secrets


def test_the_seed_is_nowhere_and_the_keys_are_for_the_owner(whole):
    path, _ = whole
    for file in path.rglob("*"):
        mode = stat.S_IMODE(file.stat().st_mode)
        if path / "checkpoints" in [file, *file.parents]:
            assert mode == (0o700 if file.is_dir() else 0o600), file
        elif file.is_file():
            assert str(SEED).encode() not in file.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_keys_differ_by_use_and_seed():
    words = [
        tuple(jax.random.key_data(key).tolist())
        for seed in (0, 1, 2**32, 2**64 - 1, 2**256 - 1)
        for key in derived_keys(seed, {})
    ]
    assert len(set(words)) == 15
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to 2"):
        derived_keys(2**256, {})


def test_checkpoints_keep_types_and_the_newest(tmp_path):
    tree = {
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "key": jax.random.key(5),
        "count": jnp.int32(7),
        "empty": jnp.zeros((0, 2)),
    }
    for step in (0, 1, 2):
        checkpoints.save_checkpoint(tmp_path, step, tree, {"plan": "p", "n": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000001", "00000002"]
    step, back, facts = checkpoints.load_checkpoint(tmp_path, tree, {"plan": "p"})
    assert (step, facts["n"]) == (2, 2)
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        assert one.dtype == other.dtype and (one == other).all()
    with pytest.raises(ValueError, match="are not the 2"):
        checkpoints.load_checkpoint(tmp_path, {"a": jnp.ones(2), "b": jnp.ones(1)}, {})


def test_a_digest_tells_apart_names_types_and_bits():
    trees = [
        {"w": jnp.zeros(2)},
        {"v": jnp.zeros(2)},
        {"w": jnp.zeros(2, jnp.float16)},
        {"w": jnp.zeros((2, 1))},
        {"w": jnp.array([0.0, -0.0])},
    ]
    assert len({params_sha256(tree) for tree in trees}) == len(trees)


def test_learning_rates():
    at_steps = lambda rate: [round(float(rate(t)), 3) for t in (0, 5, 10, 15, 20)]  # noqa: E731
    assert learning_rate(LearningRateConfig(), 2.0, 20) == 2.0
    warm = learning_rate(LearningRateConfig("constant", 10), 2.0, 20)
    assert at_steps(warm) == [0.0, 1.0, 2.0, 2.0, 2.0]
    cosine = learning_rate(LearningRateConfig("cosine", end=0.5), 2.0, 20)
    assert at_steps(cosine)[::2] == [2.0, 1.5, 1.0]
    linear = learning_rate(LearningRateConfig("linear"), 2.0, 20)
    assert at_steps(linear) == [2.0, 1.5, 1.0, 0.5, 0.0]


def test_with_seed_changes_nothing_else():
    assert dataclasses.replace(with_seed(tiny(), 5), run=tiny().run) == tiny()


def test_other_data_of_the_same_size_are_another_run():
    """The same noise on other data would release their difference."""
    job = build_job(tiny())
    changed = np.array(job.data.x_train)
    changed[7, 0] += 1
    other = dataclasses.replace(
        job, data=dataclasses.replace(job.data, x_train=changed)
    )
    assert identity(job) == identity(build_job(tiny()))
    assert identity(job) != identity(other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "scores"),
        ({"source": "public"}, "public"),
        ({"importance": "uniform"}, "none"),
        ({"importance": "uniform", "source": "probe"}, "probe"),
        ({"method": "dp_adam_ilg_uniform"}, "none"),
        ({"method": "dp_adam_ilg_paper", "importance": "uniform"}, "scores"),
        ({"method": "adaclip"}, "none"),
    ],
)
def test_a_summary_names_a_source_only_where_weights_have_one(options, words):
    assert source_of_importance(OptimizerConfig(**options)) == words
