"""The ledger: never past the plan, never fewer steps than were acknowledged."""

import errno
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dp_ilg.accounting.ledger import BudgetExhausted, PrivacyLedger
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.noise.repeats import release_digest
from dp_ilg.sampling.poisson import PoissonSampler

STEPS = 1000


def make_plan(**changes) -> PrivacyPlan:
    facts: dict[str, Any] = dict(
        num_examples=1000,
        batch_size=10,
        num_steps=STEPS,
        delta=1e-5,
        l2_clip_norm=1.0,
        score_budget=0.01,
        stages=((STEPS, 1.0),),
    )
    return PrivacyPlan(**(facts | changes))


PLAN = make_plan()
FROM = "parameters, program, data"
resumed = functools.partial(PrivacyLedger, resume=True)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def _write(path: Path, steps: int) -> bytes:
    """Writes a ledger of some steps and returns its bytes."""
    with resumed(path, PLAN) as ledger:
        for step in range(steps):
            ledger.record(step, released_from=FROM)
    return path.read_bytes()


def _is_one_sentence(error) -> bool:
    text = str(error.strerror if isinstance(error, OSError) else error)
    return text.endswith(".") and ". " not in text and "\n" not in text


# ------------------------------------------------------------ what it records


def test_steps_and_epsilon_survive_closing(path):
    _write(path, 3)
    with resumed(path, PLAN) as ledger:
        assert ledger.steps == 3
        assert ledger.epsilon() == PLAN.epsilon(3) > 0
        ledger.record(3)
        assert ledger.steps == 4
        assert ledger.epsilon() == PLAN.epsilon(4) > PLAN.epsilon(3)


def test_no_steps_cost_nothing(path):
    with resumed(path, PLAN) as ledger:
        assert ledger.steps == 0 and ledger.epsilon() == 0.0


def test_law_7_never_past_the_plan(path):
    plan = make_plan(num_steps=2, stages=((2, 1.0),))
    with resumed(path, plan) as ledger:
        ledger.record(0)
        ledger.record(1)
        content = path.read_bytes()
        for step in (2, 3, 10**9):
            with pytest.raises(BudgetExhausted, match="2 steps") as caught:
                ledger.record(step)
            assert _is_one_sentence(caught.value)
        assert ledger.steps == 2 and path.read_bytes() == content
    with resumed(path, plan) as ledger, pytest.raises(BudgetExhausted):
        ledger.record(2)


def test_a_step_past_the_plan_is_exhausted_even_after_a_gap(path):
    with resumed(path, PLAN) as ledger, pytest.raises(BudgetExhausted):
        ledger.record(STEPS)


def test_law_3_repeated_step_is_charged_once(path):
    _write(path, 3)
    content = path.read_bytes()
    with resumed(path, PLAN) as ledger:  # a resumed run repeats what it had begun
        for step in (0, 1, 2):
            ledger.record(step, released_from=FROM)
        assert ledger.steps == 3 and ledger.epsilon() == PLAN.epsilon(3)
        assert path.read_bytes() == content


def test_gap_is_refused(path):
    with resumed(path, PLAN) as ledger:
        ledger.record(0)
        with pytest.raises(ValueError, match="record step 1 first") as caught:
            ledger.record(2)
        assert _is_one_sentence(caught.value)
        assert ledger.steps == 1


ZEROS = [np.int64(0), np.uint16(0), np.array(0), jnp.int32(0), jnp.uint32(0)]


@pytest.mark.parametrize("zero", ZEROS, ids=lambda zero: f"{type(zero)} {zero.dtype}")
def test_steps_may_be_integers_of_numpy_and_jax(path, zero):
    """A counter in a training state is one."""
    with resumed(path, PLAN) as ledger:
        ledger.record(zero)
        ledger.record(zero + 1)
        with pytest.raises(BudgetExhausted, match=f"step is {STEPS}, but"):
            ledger.record(zero + STEPS)
    with resumed(path, PLAN) as ledger:
        assert ledger.steps == 2
        assert ledger.epsilon() == PLAN.epsilon(zero + 2) == PLAN.epsilon(2)
        sampler = PoissonSampler.for_plan(PLAN, key=0)
        assert np.array_equal(sampler.indices(zero + 1), sampler.indices(1))


NO_STEPS = [-1, 0.0, None, True, "0", np.float64(0), np.True_, np.array([0])]


@pytest.mark.parametrize(
    "step", [*NO_STEPS, jnp.float32(0), jnp.array(False), jnp.int32(-1), jnp.zeros(1)]
)
def test_step_must_be_a_whole_number(path, step):
    with resumed(path, PLAN) as ledger, pytest.raises((ValueError, TypeError)):
        ledger.record(step)
    assert path.read_bytes().count(b"\n") == 1


def test_a_traced_step_cannot_be_recorded(path):
    """Inside jit it would be recorded once, when the step is compiled."""
    with resumed(path, PLAN) as ledger:
        with pytest.raises(ValueError, match="must be a whole number") as caught:
            jax.jit(ledger.record)(0)
        assert _is_one_sentence(caught.value)


def test_closed_ledger_refuses(path):
    ledger = resumed(path, PLAN)
    ledger.close()
    ledger.close()
    with pytest.raises(ValueError, match="closed"):
        ledger.record(0)


def test_every_line_is_json_and_names_the_plan(path):
    lines = [json.loads(line) for line in _write(path, 2).splitlines()]
    assert PrivacyPlan.from_json(json.dumps(lines[0]["plan"])) == PLAN
    assert lines[0]["plan_digest"] == PLAN.digest()
    assert [line["step"] for line in lines[1:]] == [0, 1]


def test_file_mode_follows_the_umask(path):
    before = os.umask(0o027)
    try:
        _write(path, 1)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


# ------------------------------------------------- synced before it returns


def test_line_is_whole_and_synced_before_record_returns(path, monkeypatch):
    """At every fsync the file holds exactly what is being acknowledged."""
    synced = []
    real = os.fsync

    def fsync(fd):
        real(fd)
        synced.append(path.read_bytes() if os.path.isfile(path) else b"")

    monkeypatch.setattr(os, "fsync", fsync)
    with resumed(path, PLAN) as ledger:
        for step in range(3):
            count = len(synced)
            ledger.record(step)
            assert len(synced) > count
            assert synced[-1].endswith(b"\n") and synced[-1].count(b"\n") == step + 2


def test_new_file_syncs_its_folder(path, monkeypatch):
    kinds = []
    real = os.fsync

    def fsync(fd):
        kinds.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    resumed(path, PLAN).close()
    assert "file" in kinds and kinds[-1] == "folder"


# ------------------------------------------------------- damage and strangers


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 10_000), steps=st.integers(0, 4))
def test_truncation_drops_the_cut_line_only(tmp_path_factory, cut, steps):
    path = tmp_path_factory.mktemp("cut") / "ledger.jsonl"
    content = _write(path, steps)
    cut = min(cut, len(content))
    path.write_bytes(content[:cut])
    whole = content[: cut + 1].count(b"\n")  # a line without its end alone counts
    with resumed(path, PLAN) as ledger:
        assert ledger.steps == max(0, whole - 1)
        again = path.read_bytes()
        assert again == (content[: content[: cut + 1].rfind(b"\n") + 1] or again)
        ledger.record(ledger.steps)
        count = ledger.steps
    with resumed(path, PLAN) as ledger:
        assert ledger.steps == count


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_is_refused_and_the_file_left_alone(tmp_path_factory, data):
    """Any changed byte raises; the file stays as it is."""
    path = tmp_path_factory.mktemp("damage") / "ledger.jsonl"
    content = bytearray(_write(path, 3))
    place = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(1, 255).filter(lambda b: b != content[place]))
    content[place] = byte
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        resumed(path, PLAN)
    assert str(path) in str(caught.value) and _is_one_sentence(caught.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize("order", [[0, 2, 1, 3], [0, 1, 3], [0, 1, 2, 2, 3]])
def test_lines_out_of_order_missing_or_doubled_are_damage(path, order):
    lines = _write(path, 3).splitlines(keepends=True)
    path.write_bytes(b"".join(lines[i] for i in order))
    with pytest.raises(ValueError, match="damaged in line"):
        resumed(path, PLAN)


def test_another_plans_ledger_is_refused(path):
    content = _write(path, 2)
    other = make_plan(stages=((STEPS, 1.1),))
    with pytest.raises(ValueError, match=PLAN.digest()) as caught:
        resumed(path, other)
    assert other.digest() in str(caught.value) and _is_one_sentence(caught.value)
    assert path.read_bytes() == content


def test_a_later_format_is_refused(path, monkeypatch):
    monkeypatch.setattr("dp_ilg.accounting.ledger.FORMAT_VERSION", 3)
    _write(path, 1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unknown format"):
        resumed(path, PLAN)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(min_size=1) | st.text(min_size=1).map(str.encode))
def test_any_other_file_is_refused_and_left_alone(tmp_path_factory, content):
    assume(not b'{"dp_ilg_ledger"'.startswith(content))  # as a crash could leave it
    path = tmp_path_factory.mktemp("other") / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a privacy ledger"):
        resumed(path, PLAN)
    assert path.read_bytes() == content


# ------------------------------------------------- what a step was released from

ORIGINS = [release_digest({"w": np.arange(3.0) + t}, "rate 0.1") for t in range(4)]


def _write_bound(path: Path, steps: int, **key) -> bytes:
    with resumed(path, PLAN, **key) as ledger:
        for step in range(steps):
            ledger.record(step, released_from=ORIGINS[step])
    return path.read_bytes()


def test_an_identical_repeat_is_free(path):
    content = _write_bound(path, 3)
    assert _write_bound(path, 3) == content
    with resumed(path, PLAN) as ledger:
        ledger.record(1, released_from=ORIGINS[1])
        ledger.record(2, released_from=ORIGINS[2])
        ledger.record(3, released_from=ORIGINS[3])
        assert ledger.steps == 4 and ledger.epsilon() == PLAN.epsilon(4)


OTHERS = {
    "other parameters": release_digest({"w": np.arange(3.0) + 1e-6}, "rate 0.1"),
    "another learning rate": release_digest({"w": np.arange(3.0)}, "rate 0.2"),
    "another type": release_digest({"w": np.arange(3.0, dtype="f")}, "rate 0.1"),
    "another name": release_digest({"v": np.arange(3.0)}, "rate 0.1"),
    "another shape": release_digest({"w": np.arange(3.0)[None]}, "rate 0.1"),
    "no word of it": None,
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_repeat_that_would_differ_is_refused(path, other):
    """Same ledger, key and step, another release: their difference is the data's."""
    content = _write_bound(path, 2, key=jax.random.key(1))
    with resumed(path, PLAN, key=jax.random.key(1)) as ledger:
        with pytest.raises(ValueError, match="step is 0, which was") as caught:
            ledger.record(0, released_from=OTHERS[other])
        assert _is_one_sentence(caught.value)
        ledger.record(0, released_from=ORIGINS[0])
        assert ledger.steps == 2
    assert path.read_bytes() == content


def test_a_step_recorded_without_is_not_repeated_with(path):
    with PrivacyLedger(path, PLAN) as ledger:
        ledger.record(0)
    with resumed(path, PLAN) as ledger:
        with pytest.raises(ValueError, match="recorded without") as caught:
            ledger.record(0, released_from=ORIGINS[0])
        assert _is_one_sentence(caught.value)
        with pytest.raises(ValueError, match="repeated without it") as caught:
            ledger.record(0)
        assert _is_one_sentence(caught.value)
        ledger.record(1, released_from=ORIGINS[1])


def test_the_digest_on_file_follows_the_key(path, tmp_path):
    """Whoever guesses data and parameters cannot confirm the guess."""
    other = tmp_path / "other.jsonl"
    first, second = (
        _write_bound(p, 1, key=jax.random.key(k)) for p, k in ((path, 1), (other, 2))
    )
    one, two = (
        json.loads(content.splitlines()[1])["released_from"]
        for content in (first, second)
    )
    assert one != two and ORIGINS[0].encode() not in first


@settings(max_examples=100, deadline=None)
@given(cut=st.integers(0, 10_000), steps=st.integers(0, 4))
def test_truncation_of_bound_steps_drops_the_cut_line_only(
    tmp_path_factory, cut, steps
):
    path = tmp_path_factory.mktemp("cut") / "ledger.jsonl"
    content = _write_bound(path, steps)
    path.write_bytes(content[:cut])
    whole = content[: cut + 1].count(b"\n")
    with resumed(path, PLAN) as ledger:
        assert ledger.steps == max(0, whole - 1)
    if steps == 4 and whole > 1:
        assert _write_bound(path, 4) == content  # what is left still binds


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damage_of_bound_steps_is_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "ledger.jsonl"
    content = bytearray(_write_bound(path, 3))
    place = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(1, 255).filter(lambda b: b != content[place]))
    content[place] = byte
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        resumed(path, PLAN)
    assert _is_one_sentence(caught.value) and path.read_bytes() == content


def test_a_ledger_of_the_first_format_goes_on(path, monkeypatch):
    """Written before steps could be bound: read, and added to."""
    monkeypatch.setattr("dp_ilg.accounting.ledger.FORMAT_VERSION", 1)
    content = _write(path, 2)
    monkeypatch.undo()
    assert b'{"dp_ilg_ledger": 1, ' in content
    with resumed(path, PLAN) as ledger:
        assert ledger.steps == 2
        ledger.record(1, released_from=FROM)
        ledger.record(2, released_from=ORIGINS[2])
    with resumed(path, PLAN) as ledger:
        ledger.record(2, released_from=ORIGINS[2])
        assert ledger.steps == 3


@pytest.mark.parametrize("wrong", [b"bytes", 7, {"w": 1}])
def test_released_from_must_be_text(path, wrong):
    with resumed(path, PLAN) as ledger:
        with pytest.raises(TypeError, match="release_digest") as caught:
            ledger.record(0, released_from=wrong)
        assert _is_one_sentence(caught.value) and ledger.steps == 0


# ---------------------------------------------------------- disks and folders


def test_absent_folder_folder_and_device_are_refused(tmp_path):
    for path in (tmp_path / "none" / "ledger.jsonl", tmp_path):
        with pytest.raises(OSError, match="could not be opened") as caught:
            resumed(path, PLAN)
        assert _is_one_sentence(caught.value)
    with pytest.raises(ValueError, match="regular file"):
        resumed("/dev/full", PLAN)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
def test_unwritable_folder_is_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may write anywhere
    with pytest.raises(PermissionError, match="writable") as caught:
        resumed(tmp_path / "ledger.jsonl", PLAN)
    monkeypatch.undo()
    assert _is_one_sentence(caught.value)


def _full(call, fail_on, after=0):
    """Returns `call`, failing with "disk full" on its n-th use; may write a part."""
    uses = 0

    def failing(fd, *args):
        nonlocal uses
        uses += 1
        if uses == fail_on:
            if after:
                call(fd, args[0][:after])
            raise OSError(errno.ENOSPC, "No space left on device")
        return call(fd, *args)

    return failing


@pytest.mark.parametrize("name", ["write", "fsync"])
@pytest.mark.parametrize("after", [0, 9])
def test_full_disk_loses_nothing_and_a_retry_works(path, monkeypatch, name, after):
    content = _write(path, 2)
    ledger = resumed(path, PLAN)
    part = after if name == "write" else 0
    monkeypatch.setattr(os, name, _full(getattr(os, name), 1, part))
    with pytest.raises(OSError, match="could not be written") as caught:
        ledger.record(2)
    assert caught.value.errno == errno.ENOSPC and _is_one_sentence(caught.value)
    assert ledger.steps == 2 and path.read_bytes() == content
    ledger.record(2)
    ledger.close()
    with resumed(path, PLAN) as again:
        assert again.steps == 3


def test_full_disk_where_even_trimming_fails(path, monkeypatch):
    _write(path, 2)
    ledger = resumed(path, PLAN)
    monkeypatch.setattr(os, "write", _full(os.write, 1, 9))
    monkeypatch.setattr(os, "ftruncate", _full(os.ftruncate, 1))
    with pytest.raises(OSError, match="could not be written"):
        ledger.record(2)
    assert not path.read_bytes().endswith(b"\n")  # a part of the line is there
    ledger.record(2)
    ledger.record(3)
    ledger.close()
    with resumed(path, PLAN) as again:
        assert again.steps == 4


def test_interrupt_after_a_write_is_not_a_recorded_step(path, monkeypatch):
    ledger = resumed(path, PLAN)

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        ledger.record(0)
    monkeypatch.undo()
    assert ledger.steps == 0
    ledger.record(0)
    ledger.record(1)
    ledger.close()
    with resumed(path, PLAN) as again:
        assert again.steps == 2


def test_short_writes_are_finished(path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
    content = _write(path, 3)
    monkeypatch.undo()
    path.unlink()
    assert content == _write(path, 3)


def test_full_disk_at_creation_leaves_a_file_that_opens_later(path, monkeypatch):
    monkeypatch.setattr(os, "write", _full(os.write, 1, 20))
    with pytest.raises(OSError, match="could not be written"):
        resumed(path, PLAN)
    with resumed(path, PLAN) as ledger:
        assert ledger.steps == 0


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_is_not_begun_again_by_accident(path, steps):
    """A second run under the same key is the same run, or gives the data away."""
    content = _write(path, steps)
    for plan in (PLAN, PLAN):
        with pytest.raises(ValueError, match="pass resume=True to go on") as caught:
            PrivacyLedger(path, plan)
        assert f"holds a run of {steps} steps already" in str(caught.value)
        assert "another path and new keys" in str(caught.value)
        assert _is_one_sentence(caught.value)
    path.write_bytes(content[:-1])  # the last line lacks its end alone
    with pytest.raises(ValueError, match="pass resume=True"):
        PrivacyLedger(path, PLAN)
    assert path.read_bytes() == content[:-1]
    with PrivacyLedger(path, PLAN, resume=True) as ledger:
        assert ledger.steps == steps
    with PrivacyLedger(path.with_name("new.jsonl"), PLAN, resume=True) as ledger:
        assert ledger.steps == 0
    PrivacyLedger(path.with_name("new.jsonl"), PLAN).close()  # no step in it yet


# -------------------------------------------------------------- two processes


_CHILD = textwrap.dedent("""
    import sys, types
    from dp_ilg.accounting.ledger import PrivacyLedger
    from dp_ilg.accounting.plan import PrivacyPlan
    plan = PrivacyPlan.from_json(sys.argv[2])
    with PrivacyLedger(sys.argv[1], plan, resume=True) as ledger:
        for step in range(ledger.steps, plan.num_steps):
            ledger.record(step)
            sys.stdout.write(f"{step}\\n")
            sys.stdout.flush()
            if len(sys.argv) > 3:
                sys.stdin.read()
""")


def _child(path, *more) -> subprocess.Popen:
    command = [sys.executable, "-c", _CHILD, str(path), PLAN.to_json(), *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


def test_second_ledger_on_one_file_is_refused(path):
    with resumed(path, PLAN) as ledger:
        with pytest.raises(
            BlockingIOError, match="since this process holds it"
        ) as caught:
            resumed(path, PLAN)
        assert _is_one_sentence(caught.value)
        ledger.record(0)
    resumed(path, PLAN).close()


def test_second_process_is_refused_until_the_first_ends(path):
    child = _child(path, "wait")
    assert child.stdout and child.stdout.readline() == b"0\n"
    with pytest.raises(BlockingIOError, match="another run"):
        resumed(path, PLAN)
    child.kill()
    child.communicate()
    with resumed(path, PLAN) as ledger:
        assert ledger.steps == 1


def _kill_and_reopen(path, delay) -> tuple[int, int]:
    """Kills a recording process; returns steps acknowledged and steps on file."""
    child = _child(path)
    assert child.stdout
    acknowledged = [child.stdout.readline()]
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    rest, errors = child.communicate()
    assert not errors, errors.decode()
    lines = (acknowledged[0] + rest).split(b"\n")[:-1]  # a cut last line is no word
    with resumed(path, PLAN) as ledger:
        return int(lines[-1]) + 1, ledger.steps


def _check_kills(path, delays):
    for delay in delays:
        acknowledged, recorded = _kill_and_reopen(path, delay)
        assert acknowledged <= recorded <= acknowledged + 1
        if recorded > STEPS // 2:
            path.unlink()


def test_killed_process_never_recorded_less_than_it_acknowledged(path):
    _check_kills(path, [0.0, 0.02])


@pytest.mark.slow
def test_killed_process_never_recorded_less_20_times(path):
    _check_kills(path, [0.006 * i for i in range(20)])


def test_a_second_run_does_not_pass_for_a_replay(tmp_path):
    """With the key given, another run is refused; in one run no step comes twice."""
    path = tmp_path / "ledger.jsonl"
    with resumed(path, PLAN, key=jax.random.key(1)) as ledger:
        ledger.record(0, released_from=FROM)
        ledger.record(1)
        with pytest.raises(ValueError, match="only a resumed run may repeat"):
            ledger.record(1)
    with resumed(path, PLAN, key=jax.random.key(1)) as ledger:
        ledger.record(0, released_from=FROM)
        with pytest.raises(ValueError, match="nobody can tell whether"):
            ledger.record(1)
        assert ledger.steps == 2
    with pytest.raises(ValueError, match="another key"):
        resumed(path, PLAN, key=jax.random.key(2))
    assert path.read_text().count("\n") == 3
