"""The sensitivity certificate: from shapes alone, as the step runs, or refused."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import dp_ilg
from dp_ilg.experiments.config.schema import Config
from dp_ilg.experiments.reports.record import read_run
from dp_ilg.experiments.runs.job import build_job
from dp_ilg.training.certificate import sensitivity_certificate

SHAPES = jax.eval_shape(lambda: {"w": jnp.zeros((64, 64)), "v": jnp.zeros((64, 9))})


def plan(**changes):
    facts: dict[str, Any] = dict(num_examples=1000, batch_size=100, num_steps=10)
    return dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-9, **(facts | changes))


def certificate(the_plan, terms=1):
    loss = lambda p, x: jnp.sum(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"]))  # noqa: E731
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=the_plan.l2_clip_norm)
    batch = jax.ShapeDtypeStruct((100, terms, 64), jnp.float32)
    return sensitivity_certificate(grad_fn, SHAPES, batch, the_plan)


def test_it_reads_shapes_and_says_how_each_leaf_is_added():
    one, many = certificate(plan()), certificate(plan(), terms=20)
    assert {leaf.sum for leaf in one.leaves} != {leaf.sum for leaf in many.leaves}
    assert one.largest_lot > many.largest_lot > 10_000
    assert 0 < one.margin < 1e-5 and one.parameters == 64 * 73
    assert json.loads(json.dumps(one.as_dict()))["leaves"][0]["leaf"] == "v"


def test_a_batch_beyond_the_bound_on_sums_is_refused():
    large = plan(num_examples=10**7, batch_size=100_000)
    assert certificate(large).largest_lot > 100_000
    with pytest.raises(ValueError, match="draws 100,000 examples on average"):
        certificate(large, terms=20)


def test_a_model_beyond_what_the_plan_pays_for_is_refused():
    with pytest.raises(ValueError, match="pays for 4,000"):
        certificate(plan(num_parameters=4000))


def test_a_claim_that_is_too_small_needs_more_than_its_delta():
    found = certificate(plan()).accounting
    assert 0.9 < found["least_share_of_delta"] <= 1


def test_a_certificate_of_another_plan_is_no_certificate(tmp_path):
    job = build_job(Config())
    shapes = jax.eval_shape(job.model.init, jax.random.key(0))
    found = json.loads(json.dumps(job.certificate(shapes).as_dict()))
    (tmp_path / "config.toml").write_text('[data]\nname = "digits"\n')
    (tmp_path / "plan.json").write_text(job.plan.to_json())
    for name in ("ledger.jsonl", "metrics.jsonl"):
        (tmp_path / name).touch()
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(found))
    assert read_run(tmp_path).certificate == found
    path.write_text(json.dumps(found | {"plan_digest": "0" * 16}))
    with pytest.raises(ValueError, match="certificate of another plan"):
        read_run(tmp_path)
