"""The example of frozen layers runs, and frozen layers stay what they were."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "utility" / "frozen_layers.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("frozen_layers", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_frozen_layers_do_not_move_and_the_head_does(example):
    _, private = example.halves(None, True)
    params = example.initial(jax.random.key(0))
    job = example.Job(4.0, 60, 2, 5e-3, 0)
    trained, plan = example.train_privately(
        params, private, job, example.CONVOLUTIONS, jax.random.key(1)
    )
    for name in example.CONVOLUTIONS:
        np.testing.assert_array_equal(trained[name]["kernel"], params[name]["kernel"])
    assert np.abs(trained["head"]["kernel"]).max() > 1e-3
    assert 3.9 < plan.epsilon() <= 4.0


@pytest.mark.slow
def test_the_example_runs_end_to_end(example, tmp_path, capsys):
    records = example.main(["--toy", "--out", str(tmp_path / "records.jsonl")])
    assert [r["row"] for r in records] == [
        "pre-trained, frozen",
        "random, frozen",
        "all layers private",
    ]
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 3
    assert "at epsilon" in capsys.readouterr().out
