"""TensorBoard event files: what is in them, and that no point is there twice."""

import importlib.util
import json
import struct
import warnings

import pytest

from dp_ilg.experiments.reports.event_files import event_file, scalars

LAYERS = {"names": ["a", "b"], "importance": [0.7, 0.3], "noise_stddev": [1.0, 2.0]}


def record(step, **more):
    return {"step": step, "seconds": 1.0 * step, "test_accuracy": 0.1 * step, **more}


def test_only_released_and_public_values_are_shown():
    released = {"value": 0.5, "smoothed": 0.4, "stderr": 0.1, "smoothed_stderr": 0.01}
    found = scalars(
        record(
            3,
            epsilon=float("inf"),
            layers=LAYERS,
            released={"train_loss": released},
            unprotected_train_loss=0.1,
            private_train_loss=0.1,
            something_new=1.0,
        )
    )
    assert set(found) == {
        "test_accuracy",
        *(f"{kind}/{name}" for kind in ("importance", "noise_stddev") for name in "ab"),
        *(f"released/train_loss/{k}" for k in ("value", "smoothed", "smoothed_stderr")),
    }


def test_without_the_package_it_is_off_with_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match=r"pip install 'dp_ilg\[tensorboard\]'"):
        with event_file(tmp_path, 0.0) as show:
            show(record(1))
    assert not list(tmp_path.iterdir())


def points(path):
    """(step, tag) of every point in a file, by tensorboardX's own classes."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event  # type: ignore

    content, place, found = path.read_bytes(), 0, []
    while place < len(content):
        (size,) = struct.unpack("<Q", content[place : place + 8])
        event = Event.FromString(content[place + 12 : place + 12 + size])
        found += [(event.step, value.tag) for value in event.summary.value]
        place += 16 + size
    return found


def test_a_run_that_was_killed_and_resumed_has_no_point_twice(tmp_path):
    pytest.importorskip("tensorboardX")
    lines = tmp_path / "metrics.jsonl"
    lines.touch()
    with event_file(tmp_path, 0.0) as show:
        for step in (1, 2, 3):
            show(record(step))
        (first,) = tmp_path.glob("events.*")
        assert [step for step, _ in points(first)] == [1, 2, 3]  # while it runs
    # killed: evaluation 3 was not on file yet, and the run goes on from 2
    lines.write_text("".join(json.dumps(record(step)) + "\n" for step in (1, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with event_file(tmp_path, 2.0) as show:
            show(record(3))
            show(record(4))
    (second,) = tmp_path.glob("events.*")
    assert second != first
    assert [step for step, _ in points(second)] == [1, 2, 3, 4]
