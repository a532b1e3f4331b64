"""Synthetic images go through the features of a run before they reach its model."""

import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.experiments.config.schema import (
    Config,
    config_from_mapping,
    config_to_toml,
)
from dp_ilg.experiments.data.datasets import load_dataset
from dp_ilg.experiments.data.features import with_features
from dp_ilg.experiments.data.images.scattering import scattering_features
from dp_ilg.experiments.runs.job import build_job
from dp_ilg.optimizers.public.generators import Public, pink_images
from dp_ilg.optimizers.public.probe import probe_key


def standard(images):
    """By hand, in float64."""
    x = np.asarray(images, np.float64)
    mean, spread = (f(x, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.std))
    return ((x - mean) / (spread + 0.1)).astype(np.float32)


ROWS = {"scattering": scattering_features, "standardized": standard}


def config(features, **sections):
    whole = tomllib.loads(config_to_toml(Config()))
    whole["model"] = {"name": "linear"}
    whole["data"]["features"] = features
    whole["optimizer"]["source"] = "probe"
    whole["probe"] = {"depth": "diagonal", "num_examples": 4}
    for name, values in sections.items():
        whole[name].update(values)
    return config_from_mapping(whole)


def geometry(tx, params):
    return tx.geometry(tx.init(params))


@pytest.mark.parametrize(
    ("features", "batch"), [("scattering", "auto"), ("standardized", "pink_images")]
)
def test_a_run_probes_features_of_synthetic_images(features, batch):
    """Against a probe whose batch was computed by hand, image by image."""
    job = build_job(config(features, probe={"batch": batch}))
    params = job.model.init(jax.random.key(3))
    images, labels = jax.random.split(probe_key(0, 0), 2)
    pink = pink_images(images, (4, 8, 8, 1), jnp.float32, Public())
    rows = (
        jnp.asarray(ROWS[features](pink)),
        jax.random.randint(labels, (4,), 0, 10).astype(job.data.y_train.dtype),
    )
    tx = job.make_optimizer(jax.random.key(0))
    by_hand = dp_ilg.dp_adam_ilg(
        0.1,
        job.plan,
        key=jax.random.key(0),
        source=dp_ilg.Probe(
            job.model.loss_fn, batch=lambda key: rows, depth="diagonal", num_examples=4
        ),
    )
    found, wanted = geometry(tx, params), geometry(by_hand, params)
    for one, other in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert np.allclose(one, other, rtol=2e-3)
    spread = max(float(x.max() / x.min()) for x in jax.tree.leaves(found.coordinates))
    assert spread > 1.2


@pytest.mark.parametrize("features", ROWS)
def test_what_is_traced_is_what_was_computed(features):
    raw = load_dataset("digits")
    data = with_features(raw, features)
    assert data.made_of is not None
    found = jax.jit(data.made_of.compute)(raw.x_train[:5])
    assert np.allclose(found, data.x_train[:5], atol=2e-3)
    assert data.made_of.shape == raw.x_train.shape[1:] and raw.made_of is None


def test_images_are_refused_before_a_projection():
    projection = {"channels": 4, "positions": 2, "noise_multiplier": 40.0}
    sections = {"data": {"projection": projection}}
    with pytest.raises(ValueError, match="cannot project images"):
        build_job(config("scattering", probe={"batch": "pink_images"}, **sections))
    job = build_job(config("scattering", probe={"batch": "gaussian"}, **sections))
    assert job.raw is not None


def test_features_are_a_function_and_fit_the_loss():
    def loss_fn(params, x):
        return params["w"] @ x

    with pytest.raises(TypeError, match="features is int"):
        dp_ilg.Probe(loss_fn, features=3)
    example, params = jnp.zeros(3), {"w": jnp.ones(3)}
    halves = dp_ilg.Probe(loss_fn, example=example, features=lambda x: x[:, :2])
    with pytest.raises(ValueError, match="cannot be computed on what the probe makes"):
        halves.check(params)
    dp_ilg.Probe(loss_fn, example=jnp.zeros(6), features=lambda x: x[:, ::2]).check(
        params
    )
