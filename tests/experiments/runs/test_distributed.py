"""Several real processes on one machine: one run, one ledger, one process's result."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dp_ilg.experiments.cli import main as cli
from dp_ilg.experiments.runs import runner, supervised
from dp_ilg.experiments.runs.hosts import Devices, Hosts, joined
from dp_ilg.sampling.poisson import PoissonSampler
from dp_ilg.training.checkpoints import read_checkpoint
from dp_ilg.training.mesh_rows import OwnRows

ROOT = Path(__file__).parents[3]
ROUNDING = 1e-5
PATIENCE = 900  # seconds; a process starts in 5 s where it has a core to itself
TINY = ["--seed", "3", "--privacy.accountant", "rdp", "--run.engine", "vmap"]
TINY += ["--model.hidden", "8", "--batch-size", "64", "--json"]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def begin(folder, count, *args, own=(), **options):
    """Starts the processes of one run, each in a session of its own."""
    command = [sys.executable, "-m", "dp_ilg.experiments.cli.main", "train", *TINY]
    command += ["--run-dir", str(folder), *args]
    if count > 1:
        command += ["--devices.coordinator", f"127.0.0.1:{free_port()}"]
        command += ["--devices.processes", str(count)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    found = []
    for number in range(count):
        which = ["--devices.process", str(number)] if count > 1 else []
        which += own[number] if number < len(own) else []
        found.append(
            subprocess.Popen(
                command + which,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=env,
                start_new_session=True,
                **options,
            )
        )
    return found


def end(processes, seconds=PATIENCE):
    """Exit codes and what was said, once all have ended; none is left behind."""
    told = []
    try:
        for process in processes:
            out, words = process.communicate(timeout=seconds)
            told.append((process.returncode, out, words))
    finally:
        for process in processes:
            process.kill()
    return told


def leaves(folder):
    step, found, _ = read_checkpoint(folder / "checkpoints")
    return step, {k: x for k, x in found.items() if x.dtype == np.float32}


def check_alike(one, other):
    """The same parameters, moments and scores, but for rounding."""
    (steps, mine), (others, theirs) = leaves(one), leaves(other)
    assert steps == others and mine.keys() == theirs.keys()
    for name, value in mine.items():
        np.testing.assert_allclose(value, theirs[name], atol=ROUNDING, err_msg=name)


def recorded(folder):
    path = folder / "ledger.jsonl"
    return path.read_text().count("\n") - 1 if path.exists() else 0


def wait_for(folder, steps, processes):
    until = time.monotonic() + PATIENCE
    while recorded(folder) < steps:
        assert time.monotonic() < until, "no steps are taken"
        assert all(p.poll() is None for p in processes), end(processes)
        time.sleep(0.05)


def check_one_sentence(words):
    lines = [x for x in words.splitlines() if x.startswith("dp-ilg: ")]
    assert len(lines) == 1 and "Traceback" not in words, words
    return lines[0]


def test_processes_together_have_the_rows_of_one():
    whole = PoissonSampler(1001, 0.1, key=5, chunk_size=160)
    for processes in (1, 2, 4):
        own = [OwnRows(whole, p, processes, devices=2) for p in range(processes)]
        for step in range(5):
            parts = [sampler.chunks(step) for sampler in own]
            assert len({len(chunks) for chunks in parts}) == 1
            assert len({c.indices.shape for chunks in parts for c in chunks}) == 1
            rows = [c.indices[~c.is_padding_example] for p in parts for c in p]
            np.testing.assert_array_equal(np.concatenate(rows), whole.indices(step))
            for sampler, chunks in zip(own, parts, strict=True):
                mine = np.concatenate([c.indices for c in chunks])
                first, last = sampler.owned
                assert ((mine == -1) | ((mine >= first) & (mine < last))).all()


def test_a_process_without_rows_takes_part_in_every_chunk():
    """All that were drawn lie with the first process, more than a chunk of them."""

    class First(PoissonSampler):
        def indices(self, step):
            return np.arange(5)

    whole = First(100, 0.02, key=0, chunk_size=3)
    first, second = (OwnRows(whole, p, 2, devices=1).chunks(0) for p in (0, 1))
    assert len(first) == len(second) == 2
    assert all(chunk.is_padding_example.all() for chunk in second)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(processes=2), "coordinator is left out"),
        (dict(processes=2, coordinator="here"), "must be HOST:PORT"),
        (dict(process=1), "must be below devices.processes"),
        (dict(shards=0), "devices.shards is 0"),
        (dict(timeout=0.0), "devices.timeout"),
    ],
)
def test_wrong_devices_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Devices(**wrong)


def test_devices_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="4096 devices, but there are"):
        Devices(replicas=4096).mesh()
    with pytest.raises(ValueError, match="does not divide the"):
        Devices(shards=4096).mesh()


def test_an_unreachable_coordinator_is_one_sentence():
    here = f"127.0.0.1:{free_port()}"
    devices = Devices(coordinator=here, processes=2, process=1, timeout=0.5)
    with pytest.raises(ValueError, match="could not be reached within 0.5 s"):
        with joined(devices):
            pass


def test_a_busy_port_is_one_sentence():
    with socket.create_server(("", 0)) as server:
        here = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match="cannot be used here"):
            with joined(Devices(coordinator=here, processes=2)):
                pass


ABORTED = """#!{python}
import os
if {met}:
    os.write(int(os.environ["DP_ILG_MET"]), b"1")
os.abort()
"""


@pytest.mark.parametrize(
    "met, words",
    [(False, "did not all meet; start each of them once"), (True, "one of them has")],
)
def test_a_process_that_met_nobody_is_told_so(met, words, tmp_path, monkeypatch, capfd):
    """JAX aborts a process either way; whether they had met, the worker has said."""
    script = tmp_path / "worker"
    script.write_text(ABORTED.format(python=sys.executable, met=met))
    script.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(SystemExit) as stop:
        supervised.supervised(["train"], 0)
    assert stop.value.code == 2
    assert words in check_one_sentence(capfd.readouterr().err)


@pytest.mark.slow
def test_a_process_0_whose_others_do_not_come_is_told_so(tmp_path):
    args = ["--num-steps", "3", "--devices.timeout", "5"]
    both = begin(tmp_path / "run", 2, *args, own=[[], ["--help"]])
    (code, _, words), (other, _, _) = end(both)
    assert (code, other) == (2, 0)
    assert "did not all meet" in check_one_sentence(words)


def test_one_process_needs_no_agreement():
    Hosts(0, 1).agree({"plan": "abc"})


def test_two_processes_give_the_one_process_run(tmp_path, monkeypatch, capsys):
    """Parameters cut over both of them; process 1 writes nothing at all."""
    args = ["--num-steps", "3", "--run.eval-every", "2"]
    both = begin(tmp_path / "two", 2, *args, "--devices.shards", "2")
    monkeypatch.setattr(runner, "write_report", lambda path: path)
    alone = cli.main(["train", *TINY, "--run-dir", str(tmp_path / "one"), *args])
    zero, one = end(both)
    assert (alone, zero[0], one[0]) == (0, 0, 0), (zero, one)
    assert one[1] == ""
    summary = json.loads(zero[1])
    assert summary["steps"] == 3 == recorded(tmp_path / "two")
    assert summary["epsilon"] == json.loads(capsys.readouterr().out)["epsilon"]
    check_alike(tmp_path / "one", tmp_path / "two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes(tmp_path):
    """Two processes, then four, then one: stopped by Ctrl-C in between."""
    args = ["--num-steps", "200", "--run.eval-every", "100"]
    (single,) = end(begin(tmp_path / "one", 1, *args))
    assert single[0] == 0, single
    taken = 0
    for count, shards in ((2, 1), (4, 2)):
        cut = ["--devices.shards", str(shards)]
        team = begin(tmp_path / "many", count, *args, "--resume", *cut)
        wait_for(tmp_path / "many", taken + 20, team)
        team[0].send_signal(signal.SIGINT)
        told = end(team)
        assert [code for code, _, _ in told] == [130] * count, told
        before, taken = taken, recorded(tmp_path / "many")
        assert before + 20 <= taken < 200
        assert read_checkpoint(tmp_path / "many" / "checkpoints")[0] == taken
    (last,) = end(begin(tmp_path / "many", 1, *args, "--resume"))
    assert last[0] == 0, last
    check_alike(tmp_path / "one", tmp_path / "many")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all_and_the_run_resumes_to_the_same_bits(
    tmp_path, victim
):
    args = ["--num-steps", "150", "--run.checkpoint-every", "40"]
    told = end(begin(tmp_path / "calm", 2, *args))
    assert [code for code, _, _ in told] == [0, 0], told
    team = begin(tmp_path / "hit", 2, *args)
    wait_for(tmp_path / "hit", 60, team)
    team[victim].kill()
    began = time.monotonic()
    told = end(team, seconds=60)
    assert time.monotonic() - began < 60
    assert told[1 - victim][0] == 2, told
    assert "cannot be reached any more" in check_one_sentence(told[1 - victim][2])
    steps = recorded(tmp_path / "hit")
    assert steps > read_checkpoint(tmp_path / "hit" / "checkpoints")[0] == 40
    (refused,) = end(begin(tmp_path / "hit", 1, *args, "--resume"))
    assert refused[0] == 2
    assert "may have been released" in check_one_sentence(refused[2])
    told = end(begin(tmp_path / "hit", 2, *args, "--resume"))
    assert [code for code, _, _ in told] == [0, 0], told
    shas = {
        json.loads((tmp_path / name / "summary.json").read_text())["params_sha256"]
        for name in ("calm", "hit")
    }
    assert len(shas) == 1
    assert recorded(tmp_path / "hit") == 150


@pytest.mark.slow
def test_a_silent_process_ends_all(tmp_path):
    """It does not die, it hangs: the others notice by its silence."""
    args = ["--num-steps", "100000", "--devices.timeout", "10"]
    team = begin(tmp_path / "run", 2, *args)
    wait_for(tmp_path / "run", 5, team)
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(team[1].pid)], capture_output=True, text=True
    )
    (worker,) = map(int, listed.stdout.split())
    os.kill(worker, signal.SIGSTOP)
    try:
        code, _, words = end(team[:1], seconds=90)[0]
    finally:
        os.kill(worker, signal.SIGKILL)
        end(team)
    assert code == 2
    check_one_sentence(words)


@pytest.mark.slow
def test_unlike_processes_are_refused_by_both(tmp_path):
    own = [[], ["--learning-rate", "0.5"]]
    told = end(begin(tmp_path / "run", 2, "--num-steps", "3", own=own))
    for code, _, words in told:
        assert code == 2
        found = check_one_sentence(words)
        assert "optimizer.learning_rate is 0.5, not 0.02" in found, found
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mistake_of_process_0_is_told_by_all(tmp_path):
    (tmp_path / "run").mkdir()
    told = end(begin(tmp_path / "run", 2, "--num-steps", "3"))
    for code, _, words in told:
        assert code == 2
        assert "exists; choose another one" in check_one_sentence(words)
