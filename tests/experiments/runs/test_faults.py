"""Faults: killed, interrupted, full, read-only, damaged, changed, held by two."""

import dataclasses
import errno
import functools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.experiments.cli import main as cli
from dp_ilg.experiments.data.locks import locked
from dp_ilg.experiments.runs import (
    evaluation,
    job,
    runner,
    trainer,
)
from dp_ilg.experiments.runs import folder as run_folder
from dp_ilg.experiments.runs.job import build_job
from dp_ilg.experiments.runs.keys import run_keys
from dp_ilg.experiments.runs.runner import Interrupted, run_training, with_seed
from dp_ilg.experiments.runs.trainer import start
from dp_ilg.training import checkpoints, environment, memory_limits
from dp_ilg.training.checkpoints import load_checkpoint, save_checkpoint
from tests.experiments.runs.test_trainer import (  # noqa: F401 - two fixtures among them
    SEED,
    Crash,
    at,
    crash,
    damaged,
    no_report,
    tiny,
    whole,
)
from tests.helpers.compiled import compiled_once  # noqa: F401 - a fixture

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def built_once():
    """Runs of one configuration share their job and what is compiled for it."""
    build, make = functools.cache(runner.build_job), trainer.make_tools
    made: dict = {}

    def make_tools(job):
        made[id(job)] = made.get(id(job)) or (job, make(job))
        return made[id(job)][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "build_job", build)
        patch.setattr(trainer, "make_tools", make_tools)
        yield


def crashed(path, step=7):
    """A run folder whose newest checkpoint is two steps behind its ledger."""
    with pytest.raises(Crash):
        run_training(tiny(), path, progress=at(step, crash))
    return path


def resumed(path):
    return run_training(tiny(), path, resume=True)["params_sha256"]


def press():
    os.kill(os.getpid(), signal.SIGINT)


# ------------------------------------------------------------------------ killed


def kill(times, out):
    script = ROOT / "benchmarks" / "trust" / "kill_resume.py"
    command = [sys.executable, str(script), "--kills", str(times), "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=3000
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == times
    assert any(r["ledger"] for r in records), "every kill came before the first step"


def test_killed_twice_a_run_ends_at_the_same_bits(tmp_path):
    """The script checks ledger, bits and repeats after each kill, and fails loudly."""
    kill(2, tmp_path / "kills.jsonl")


@pytest.mark.slow
def test_killed_forty_times(tmp_path):
    kill(40, tmp_path / "kills.jsonl")


def test_what_killed_starts_leave_is_removed_unless_somebody_is_at_it(tmp_path):
    dead, alive = tmp_path / ".run.0badcafe", tmp_path / ".run.0badf00d"
    other = tmp_path / ".run2.0badcafe"
    for path in (dead, alive, other):
        (path / "checkpoints").mkdir(parents=True)
    with locked(alive):
        built = build_job(tiny())
        folder = run_folder.RunFolder(tmp_path / "run")
        folder.begin(built, start(built, run_keys(built, SEED)), True)
    assert not dead.exists() and alive.exists() and other.exists()
    for name in (".metrics.jsonl.0badcafe", ".report-x1", "notes.txt"):
        (folder.path / name).touch()
    folder.tidy()
    assert sorted(p.name for p in folder.path.iterdir()) == [
        *("checkpoints", "config.toml", "ledger.jsonl", "metrics.jsonl"),
        *("notes.txt", "plan.json"),
    ]


# ------------------------------------------------------------------- interrupted


def test_a_second_ctrl_c_drops_the_step_and_loses_nothing(whole, tmp_path):  # noqa: F811
    def twice():
        press()
        press()

    with pytest.raises(KeyboardInterrupt):
        run_training(tiny(), tmp_path / "run", progress=at(7, twice))
    assert resumed(tmp_path / "run") == whole[1]["params_sha256"]


def test_ctrl_c_before_the_first_step_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        press()
        time.sleep(5)

    monkeypatch.setattr(run_folder, "save_checkpoint", interrupted)
    # A shell switches Ctrl-C off for what it runs behind '&'.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli.main(["train", "--run-dir", str(tmp_path / "run")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "Interrupted; go on with --resume" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_clock_set_back_changes_nothing(whole, tmp_path, monkeypatch):  # noqa: F811
    path = crashed(tmp_path / "run")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 20 * 365 * 86400)
    for file in path.rglob("*"):
        os.utime(file, (2e9, 2e9))  # what is there is from the future
    assert resumed(path) == whole[1]["params_sha256"]


# ------------------------------------------------------------- disks and folders


@pytest.fixture
def disk(tmp_path):
    """A disk of 2 MiB; the function changes how it is mounted."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not mount("size=2m"):
        pytest.skip("no disk can be mounted here")
    yield place, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", str(place)], check=True)


def fill(place):
    with open(place / "filler", "wb", buffering=0) as file:
        for size in (1 << 16, 1):  # to the last byte
            try:
                while file.write(bytes(size)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC


def test_a_disk_that_fills_up_ends_the_run_and_loses_nothing(
    whole,  # noqa: F811
    disk,
    capsys,
    monkeypatch,
):
    place, _ = disk
    full = at(8, functools.partial(fill, place))
    with pytest.raises(OSError) as caught:
        run_training(tiny(), place / "run", progress=full)
    assert caught.value.errno == errno.ENOSPC
    (place / "filler").unlink()
    assert resumed(place / "run") == whole[1]["params_sha256"]
    fill(place)
    assert cli.main(["train", "--run-dir", str(place / "another")]) == 2
    err = capsys.readouterr().err
    assert "No space left on device; free space" in err and err.count("\n") == 1
    assert {p.name for p in place.iterdir()} == {"run", "filler"}


def test_a_read_only_folder_is_one_sentence(whole, disk, capsys):  # noqa: F811
    place, remount = disk
    path = crashed(place / "run")
    assert remount("ro")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert cli.main(["train", "--resume", "--run-dir", str(path)]) == 2
    err = capsys.readouterr().err
    assert "Read-only file system" in err and err.count("\n") == 1
    assert cli.main(["train", "--run-dir", str(place / "another")]) == 2
    assert "Read-only file system; free space or change" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before
    assert remount("rw,size=2m")
    assert resumed(path) == whole[1]["params_sha256"]


def test_two_processes_in_one_folder_the_second_is_refused(whole, tmp_path, capsys):  # noqa: F811
    path, refused = tmp_path / "run", []

    def another():
        refused.append(cli.main(["train", "--resume", "--run-dir", str(path)]))
        refused.append(cli.main(["export", str(path), str(tmp_path / "out.npz")]))

    found = run_training(tiny(), path, progress=at(7, another))
    assert refused == [2, 2] and not (tmp_path / "out.npz").exists()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("in use by another process" in x for x in lines)
    assert found["params_sha256"] == whole[1]["params_sha256"]
    child = "import sys, dp_ilg.experiments.data.locks as l, pathlib\n"
    child += "with l.locked(pathlib.Path(sys.argv[1])): pass"
    with locked(path):
        command = [sys.executable, "-c", child, str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "in use by another process" in done.stderr


# ----------------------------------------------------------------------- damaged

ORBAX_IS_NOISY = pytest.mark.filterwarnings(  # in its threads, beside what it raises
    "ignore::pytest.PytestUnraisableExceptionWarning"
)
TREE = {"w": jnp.arange(300, dtype=jnp.float32) / 7, "key": jax.random.key(5)}


def saved(folder):
    save_checkpoint(folder, 3, TREE, {"plan": "p"})
    return [p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size]


def refused_or_equal(folder):
    """Whether loading was refused; else what came back is what was saved."""
    try:
        step, tree, facts = load_checkpoint(folder, TREE, {})
    except ValueError as error:
        assert "damaged" in str(error) and "\n" not in str(error)
        return True
    assert (step, facts) == (3, {"plan": "p"})
    for one, other in zip(jax.tree.leaves(TREE), jax.tree.leaves(tree), strict=True):
        assert (one == other).all()
    return False


@ORBAX_IS_NOISY
def test_a_flipped_bit_in_a_checkpoint_is_never_loaded(tmp_path):
    dice, refusals = np.random.default_rng(1), 0
    for path in saved(tmp_path):
        content = path.read_bytes()
        for place in dice.integers(0, len(content), 4):
            bit = 1 << int(dice.integers(8))
            changed = content[:place] + bytes([content[place] ^ bit])
            path.write_bytes(changed + content[place + 1 :])
            refusals += refused_or_equal(tmp_path)
        path.write_bytes(content)
    assert refusals > 10 and not refused_or_equal(tmp_path)


@ORBAX_IS_NOISY
def test_a_truncated_checkpoint_is_never_loaded(tmp_path):
    refusals = 0
    for path in saved(tmp_path):
        content = path.read_bytes()
        for size in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:size])
            refusals += refused_or_equal(tmp_path)
        path.write_bytes(content)
    assert refusals > 5 and not refused_or_equal(tmp_path)


def test_the_digest_covers_every_leaf_and_fact(tmp_path, monkeypatch):
    """What storage does not notice: a sound checkpoint of another content."""
    real = checkpoints._store

    def leaf(kept):
        kept["leaves"]["0"] = kept["leaves"]["0"] ^ np.uint32(1)  # the key

    def fact(kept):
        kept["facts"]["json"] = np.frombuffer(b'{"plan": "q"}', np.uint8)

    def step(kept):
        kept["facts"]["step"] = 2

    for change in (leaf, fact, step):
        altered = lambda path, kept, change=change: (change(kept), real(path, kept))  # noqa: E731
        monkeypatch.setattr(checkpoints, "_store", altered)
        save_checkpoint(tmp_path, 3, TREE, {"plan": "p"})
        with pytest.raises(ValueError, match="its digest is wrong"):
            load_checkpoint(tmp_path, TREE, {})
    monkeypatch.undo()
    save_checkpoint(tmp_path, 3, TREE, {"plan": "p"})
    assert not refused_or_equal(tmp_path)


@pytest.mark.parametrize("place", [40, -1, -40])
def test_a_flipped_bit_in_the_ledger_is_refused(place, whole, tmp_path):  # noqa: F811
    def harm(path):
        content = bytearray((path / "ledger.jsonl").read_bytes())
        content[place] ^= 4
        (path / "ledger.jsonl").write_bytes(content)

    assert "is damaged in line" in damaged(whole, tmp_path, harm)


def test_steps_cut_from_the_ledger_are_repeated_to_the_bit_or_refused(
    whole,  # noqa: F811
    tmp_path,
):
    """Those after the checkpoint only repeat a release; the others are missing."""
    path = crashed(tmp_path / "run")
    lines = (path / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (path / "ledger.jsonl").write_bytes(b"".join(lines[:5]))  # 4 steps of 5 saved
    with pytest.raises(ValueError, match="released steps are missing"):
        resumed(path)
    (path / "ledger.jsonl").write_bytes(b"".join(lines[:7]))
    assert resumed(path) == whole[1]["params_sha256"]


# ----------------------------------------------------------------------- changed


def test_a_checkpoint_with_other_keys_is_refused(whole, tmp_path):  # noqa: F811
    """Same plan, configuration and data: only the ledger can tell."""
    path, other = crashed(tmp_path / "run"), tmp_path / "other"
    built = build_job(tiny())
    keys = run_keys(built, SEED + 1)
    run_folder.RunFolder(other).begin(built, start(built, keys), True)
    (path / "checkpoints").rename(tmp_path / "away")
    (other / "checkpoints").rename(path / "checkpoints")
    with pytest.raises(ValueError, match="belongs to a run with another key"):
        run_training(with_seed(tiny(), None), path, resume=True)


def test_other_data_are_refused(tmp_path, monkeypatch):
    path, real = crashed(tmp_path / "run"), job.load_data

    def changed(*args):
        data = real(*args)
        x_train = np.array(data.x_train)
        x_train[3, 4, 4] += 0.5
        return dataclasses.replace(data, x_train=x_train)

    monkeypatch.setattr(job, "load_data", changed)
    monkeypatch.setattr(runner, "build_job", build_job)
    with pytest.raises(ValueError, match="made with another data; use"):
        resumed(path)


def test_a_configuration_changed_in_the_folder_is_refused(tmp_path, capsys):
    path = crashed(tmp_path / "run")
    text = (path / "config.toml").read_text()
    assert "checkpoint_every = 5" in text
    (path / "config.toml").write_text(
        text.replace("checkpoint_every = 5", "checkpoint_every = 6")
    )
    assert cli.main(["train", "--resume", "--run-dir", str(path)]) == 2
    assert "made with another configuration" in capsys.readouterr().err


def another_environment(monkeypatch, **changes):
    real = environment.environment
    monkeypatch.setattr(
        environment, "environment", lambda *given: real(*given) | changes
    )


def test_a_step_is_not_repeated_by_other_code(tmp_path, monkeypatch):
    path = crashed(tmp_path / "run")
    files = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    for name in ("jaxlib", "dp_ilg source", "devices", "processor", "settings"):
        with monkeypatch.context() as patch:
            another_environment(patch, **{name: "another"})
            with pytest.raises(ValueError, match=f"with another {name} ") as caught:
                resumed(path)
        assert "Step 5 may have been released" in str(caught.value)
        assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == files


def test_other_code_may_go_on_where_no_step_is_repeated(tmp_path, monkeypatch):
    """Harmless: every step is released once, and is charged once."""
    path, taken = tmp_path / "run", []
    real = dp_ilg.PrivacyLedger.record

    def record(self, step, *, released_from):
        real(self, step, released_from=released_from)
        taken.append(step)

    monkeypatch.setattr(dp_ilg.PrivacyLedger, "record", record)
    with pytest.raises(Interrupted):
        run_training(tiny(), path, progress=at(7, press))
    another_environment(monkeypatch, jaxlib="another")
    assert run_training(tiny(), path, resume=True)["steps"] == 20
    assert taken == list(range(20))


def test_the_environment_tells_code_devices_and_settings_apart(tmp_path, monkeypatch):
    before = environment.environment()
    assert before == environment.environment()
    devices = jax.devices()
    with monkeypatch.context() as patch:
        patch.setattr(jax, "devices", lambda: devices * 2)
        assert environment.environment()["devices"] != before["devices"]
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
        assert environment.environment()["settings"] != before["settings"]
    (tmp_path / "module.py").write_text("one = 1")
    digest = environment._source_digest.__wrapped__
    monkeypatch.setattr(environment, "_PACKAGE", tmp_path)
    one = digest()
    (tmp_path / "module.py").write_text("one = 2")
    assert digest() != one


# ----------------------------------------------------------------- out of memory


@pytest.mark.parametrize(
    ("error", "size", "words"),
    [
        (MemoryError(), ["--run.microbatch-size", "16"], "try --run.microbatch-size 8"),
        (MemoryError(), ["--run.microbatch-size", "1"], "even with a micro-batch of 1"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating"),
            [],
            "try --run.microbatch-size",
        ),
    ],
    ids=["python", "one", "xla"],
)
def test_out_of_memory_says_what_to_try(
    error, size, words, tmp_path, capsys, monkeypatch
):
    def step(*args):
        raise error

    real = trainer.make_tools
    monkeypatch.setattr(
        trainer, "make_tools", lambda job: real(job)._replace(step=step)
    )
    command = ["train", "--run-dir", str(tmp_path / "run"), "--privacy.accountant"]
    command += ["rdp", "--batch-size", "64", *size]
    assert cli.main(command) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("dp-ilg: Out of memory") and words in err
    assert "Traceback" not in err


def test_other_failures_of_xla_are_not_called_out_of_memory():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        with memory_limits.memory_advice(lambda: 4):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")


# ------------------------------------------------------------- secrets and export


def test_a_checkpoint_is_the_owners_from_its_first_moment(tmp_path, monkeypatch):
    modes, real = [], checkpoints._store

    def store(target, kept):
        real(target, kept)
        for path in (target, *target.rglob("*")):
            modes.append((path.is_dir(), stat.S_IMODE(path.stat().st_mode)))

    monkeypatch.setattr(checkpoints, "_store", store)
    before = os.umask(0)
    try:
        save_checkpoint(tmp_path / "all", 1, TREE, {})
        assert os.umask(0) == 0  # what it was
    finally:
        os.umask(before)
    assert {mode for is_dir, mode in modes if is_dir} == {0o700}
    assert {mode for is_dir, mode in modes if not is_dir} == {0o600}


def keys_of(seed):
    keys = run_keys(build_job(tiny()), seed)
    return [np.asarray(jax.random.key_data(key)).tobytes() for key in keys]


def test_export_holds_the_parameters_and_no_key(whole, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out.npz"
    assert cli.main(["export", str(whole[0]), str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["steps"], said["arrays"], said["parameters"]) == (20, 4, 610)
    assert said["epsilon"] == whole[1]["epsilon"]
    with np.load(out, allow_pickle=False) as file:
        arrays = dict(file)
    params: dict = {"hidden_0": {}, "output": {}}
    for name, array in arrays.items():
        layer, leaf = name.split("/")
        params[layer][leaf] = jnp.asarray(array)
    assert evaluation.params_sha256(params) == whole[1]["params_sha256"]
    secrets = [*keys_of(SEED), str(SEED).encode()]
    assert not any(key in out.read_bytes() for key in secrets)
    assert cli.main(["export", str(whole[0]), str(out)]) == 2
    assert "pass --overwrite to replace it" in capsys.readouterr().err
    assert cli.main(["export", str(whole[0]), str(out), "--overwrite"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out.npz"]


def test_the_keys_would_be_found_where_they_are(whole):  # noqa: F811
    """The search above is no empty one: the checkpoint does hold those bytes."""
    _, leaves, _ = checkpoints.read_checkpoint(whole[0] / "checkpoints")
    held = b"".join(leaf.tobytes() for leaf in leaves.values())
    assert keys_of(SEED)[1] in held


@pytest.mark.parametrize("out", ["out", "out.txt", "absent/out.npz"])
def test_export_to_a_place_that_does_not_fit(out, whole, tmp_path, capsys):  # noqa: F811
    assert cli.main(["export", str(whole[0]), str(tmp_path / out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("dp-ilg: ") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_export_of_an_unfinished_run_charges_every_step_on_file(tmp_path, capsys):
    path = crashed(tmp_path / "run")
    assert cli.main(["export", str(path), str(tmp_path / "a.npz"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] == 5
    assert said["epsilon"] == pytest.approx(build_job(tiny()).plan.epsilon(7))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="bounds a process's memory")
def test_memory_that_really_runs_out_is_one_sentence(tmp_path):
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (7 << 30,) * 2);"
        "from dp_ilg.experiments.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    flags = ["--run-dir", str(tmp_path / "run"), "--num-steps", "3"]
    flags += ["--batch-size", "1400", "--run.microbatch-size", "1400"]
    flags += ["--run.engine", "vmap", "--model.hidden", "300000"]
    done = subprocess.run(
        [sys.executable, "-c", program, "train", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Out of memory with a micro-batch of 1400; try" in done.stderr
    assert "--run.microbatch-size 700" in done.stderr
