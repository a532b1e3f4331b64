"""Stop and go on: the same bits, from Orbax and from Flax's bytes, or a refusal."""

import pathlib
import shutil
import stat
import subprocess
import sys
from typing import Any

import flax.serialization
import optax
import pytest

from tests.training.loop import scene

ROOT = pathlib.Path(__file__).parents[3]
FACTS = dict(loss=scene.noisy_loss)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped in step 2 after it was saved, and one that was not."""
    folder = tmp_path_factory.mktemp("run")
    whole = scene.trained(scene.training(**FACTS), ledger=folder / "whole.jsonl")
    train = scene.training(**FACTS)
    state = train.init(scene.start())
    for lot in train.batches(scene.data(), ledger=folder / "cut.jsonl"):
        state = train.step(state, lot)
        if lot.step == 1:
            train.save(folder / "saved", state)
            text = flax.serialization.to_bytes(state)
        if lot.step == 2:
            break  # a step further than what was saved
    return folder, text, scene.bits(whole.params)


def resumed(train, state, folder):
    for lot in train.batches(scene.data(), ledger=folder / "cut.jsonl", resume=True):
        state = train.step(state, lot)
    return state


@pytest.mark.parametrize("form", ["orbax", "flax"])
@pytest.mark.parametrize("seed", [0, None])
def test_a_run_that_was_stopped_ends_with_the_same_bits(stopped, form, seed):
    folder, text, whole = stopped
    train = scene.training(seed=seed, **FACTS)
    state: Any = train.init(scene.start())
    if form == "orbax":
        state = train.restore(folder / "saved")
    else:
        state = flax.serialization.from_bytes(state, text)
    assert int(state.step) == 2
    state = resumed(train, state, folder)
    assert scene.bits(state.params) == whole
    assert train.epsilon(state) == train.plan.epsilon()


def test_only_its_owner_can_read_what_was_saved(stopped):
    folder, _, _ = stopped
    saved = folder / "saved"
    paths = [saved, *saved.rglob("*")]
    assert len(paths) > 3
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


OTHERS = {
    "another plan": (dict(plan=scene.made_plan(5)), "another plan"),
    "another key": (dict(seed=1), "another key"),
    "another loss": (
        dict(loss=lambda p, e, key: 2 * scene.noisy_loss(p, e, key)),
        "loss, optimizer or code",
    ),
    "another optimizer": (dict(optimizer=optax.sgd(0.1)), "are not the"),
    "another rate": (dict(optimizer=optax.adam(0.2)), "loss, optimizer or code"),
    "another clip": (dict(clip_mode="normalize"), "loss, optimizer or code"),
    "another rule": (dict(importance="uniform"), "loss, optimizer or code"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_it_goes_on_with_nothing_else(stopped, name):
    folder, _, _ = stopped
    facts, words = OTHERS[name]
    train = scene.training(**(FACTS | dict(seed=None) | facts))
    with pytest.raises(ValueError, match=words) as caught:
        train.init(scene.start())
        state = train.restore(folder / "saved")
        resumed(train, state, folder)
    assert "\n" not in str(caught.value)


def test_other_data_and_another_ledger_are_refused(stopped, tmp_path):
    folder, text, _ = stopped
    train = scene.training(seed=None, **FACTS)
    train.init(scene.start())
    train.restore(folder / "saved")
    x, y = scene.data()
    with pytest.raises(ValueError, match="The data are not those"):
        train.batches((x + 1, y), ledger=folder / "cut.jsonl", resume=True)
    with pytest.raises(ValueError, match="but the run has taken 2"):
        train.batches(scene.data(), ledger=tmp_path / "new.jsonl", resume=True)
    with pytest.raises(ValueError, match="resume=True"):
        train.batches(scene.data(), ledger=folder / "cut.jsonl")


def test_a_run_that_begins_does_not_take_a_ledger_with_steps(stopped):
    folder, _, _ = stopped
    train = scene.training(**FACTS)
    train.init(scene.start())
    with pytest.raises(ValueError, match="resume=True"):
        train.batches(scene.data(), ledger=folder / "cut.jsonl")
    fresh = scene.training(seed=None, **FACTS)
    fresh.init(scene.start())
    with pytest.raises(ValueError, match="another key"):
        fresh.batches(scene.data(), ledger=folder / "cut.jsonl", resume=True)


def test_damaged_bytes_are_refused(stopped):
    _, text, _ = stopped
    state = scene.training(**FACTS).init(scene.start())
    where = text.index(b"float32") + len(b"float32") + 3  # in the first array
    broken = text[:where] + bytes([text[where] ^ 1]) + text[where + 1 :]
    with pytest.raises(ValueError):
        flax.serialization.from_bytes(state, broken)
    with pytest.raises(ValueError, match="not a saved PrivateState"):
        flax.serialization.from_state_dict(state, {"params": {}})


def test_only_the_state_a_run_stands_at_is_saved(stopped, tmp_path):
    train = scene.training(**FACTS)
    with pytest.raises(ValueError, match="comes after init"):
        train.restore(tmp_path)
    first = train.init(scene.start())
    lots = list(train.batches(scene.data(), ledger=None))
    train.step(first, lots[0])
    with pytest.raises(ValueError, match="was stepped already"):
        train.save(tmp_path / "saved", first)
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="no checkpoint"):
        train.restore(tmp_path / "saved")


KILLED = """
import os, pathlib, signal, sys
from tests.training.loop import scene
folder, until = pathlib.Path(sys.argv[1]), int(sys.argv[2])
train = scene.training(scene.noisy_loss, plan=scene.made_plan(6), seed=None)
state = train.init(scene.start())
if (folder / "saved").exists():
    state = train.restore(folder / "saved")
else:
    train.save(folder / "saved", state)
for lot in train.batches(scene.data(), ledger=folder / "ledger.jsonl", resume=True):
    state = train.step(state, lot)
    if lot.step % 2:
        train.save(folder / "saved", state)
    if lot.step == until:
        os.kill(os.getpid(), signal.SIGKILL)
print(scene.bits(state.params))
"""


@pytest.mark.slow
def test_a_killed_run_loses_nothing_and_repeats_itself(tmp_path):
    """Killed twice and resumed by new processes; its first part is kept, to compare."""

    def run(folder, until):
        command = [sys.executable, "-c", KILLED, str(folder), str(until)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert run(cut, 2).returncode == -9
    shutil.copytree(cut, whole)
    done = run(whole, 99)
    assert done.returncode == 0, done.stderr[-2000:]
    assert run(cut, 4).returncode == -9
    again = run(cut, 99)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout == done.stdout and len(done.stdout) > 20
    for folder in (cut, whole):
        assert len((folder / "ledger.jsonl").read_text().splitlines()) == 7
