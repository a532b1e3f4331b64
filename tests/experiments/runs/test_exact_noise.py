"""`dp-ilg train --noise exact`: drawn on the host, repeated when resumed, secret."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from dp_ilg.experiments.config.schema import Config, PrivacyConfig
from dp_ilg.experiments.runs.hosts import Devices
from dp_ilg.experiments.runs.job import build_job
from dp_ilg.experiments.runs.keys import noise_secret, run_keys
from dp_ilg.experiments.runs.runner import run_training, with_seed
from dp_ilg.experiments.runs.trainer import start, with_exact_noise
from dp_ilg.training.draws_ahead import DrawsAhead

EXACT = Config(privacy=PrivacyConfig(num_steps=2, noise="exact"))


def test_a_run_with_exact_noise_says_so_and_keeps_its_secret(tmp_path):
    """The plan charges nothing; no file outside the checkpoints has the secret."""
    folder = tmp_path / "run"
    summary = run_training(with_seed(EXACT, 5), folder)
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["exact_noise"] and summary["steps"] == 2
    job = build_job(EXACT)
    words = noise_secret(job, 5), bytes.fromhex(noise_secret(job, 5))
    public = [p.read_bytes() for p in folder.iterdir() if p.is_file()]
    assert len(public) > 3
    assert not [x for x in public if words[0].encode() in x or words[1] in x]
    again = run_training(with_seed(EXACT, None), folder, resume=True)
    assert again["params_sha256"] == summary["params_sha256"]


def test_draws_are_the_steps_own_whatever_was_asked_before():
    job = build_job(EXACT)
    secret = noise_secret(job, 7)
    position = start(job, run_keys(job, 7))
    tools: Any = with_exact_noise(None, job, position, secret)
    alone = tools.draws(1)
    with DrawsAhead(tools.draws, 2) as ahead:
        first, second = ahead.of(0), ahead.of(1)
    assert int(first.step) == 0 and int(second.step) == 1
    for one, other in zip(*map(jax.tree.leaves, (alone, second)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_cannot_draw_exactly_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="'exact', which needs one device"):
        run_training(EXACT, tmp_path / "run", devices=Devices(replicas=2))
    assert not (tmp_path / "run").exists()
    job = build_job(EXACT)
    with pytest.raises(ValueError, match="no secret for exact noise"):
        with_exact_noise(None, job, start(job, run_keys(job, 0)), None)
    usual = build_job(Config())
    assert with_exact_noise(None, usual, start(usual, run_keys(usual, 0)), None) is None


def test_a_draw_that_failed_fails_the_step_it_is_for():
    def draws(step):
        if step == 1:
            raise OSError("no bits")
        return step

    with DrawsAhead(draws, 3) as ahead:
        assert ahead.of(0) == 0
        with pytest.raises(OSError, match="no bits"):
            ahead.of(1)
