"""Several views of each image in a run: by hand, resumed, audited, and refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_ilg.experiments.audits.subject import audited_trainer
from dp_ilg.experiments.config.data import AugmentConfig, DataConfig
from dp_ilg.experiments.config.schema import (
    Config,
    ModelConfig,
    OptimizerConfig,
    PrivacyConfig,
    RunConfig,
    config_from_mapping,
    config_to_toml,
    read_config,
)
from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.runs import runner
from dp_ilg.experiments.runs.job import build_job, load_data
from dp_ilg.experiments.runs.keys import run_keys
from dp_ilg.experiments.runs.runner import Interrupted, run_training
from dp_ilg.experiments.runs.trainer import Watch, start
from dp_ilg.experiments.runs.views import rows_of, with_views
from dp_ilg.experiments.sweeps.bench import Bench
from dp_ilg.experiments.sweeps.layer_study import measure
from dp_ilg.training.frameworks.images import AUGMENTATIONS
from dp_ilg.training.frameworks.keys import example_key
from tests.helpers.compiled import compiled_once  # noqa: F401 - a fixture

SEED, STEPS = 5, 4
VIEWS = AugmentConfig("crop_and_mirror", views=3, pad=1)


def tiny(augment=VIEWS):
    return Config(
        data=DataConfig("digits", augment=augment),
        model=ModelConfig(hidden=(4,)),
        privacy=PrivacyConfig(num_steps=STEPS, batch_size=16, accountant="rdp"),
        optimizer=OptimizerConfig(importance="uniform"),
        run=RunConfig(seed=SEED, checkpoint_every=2, eval_every=3),
    )


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(runner, "write_report", lambda path: path)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_one_mean_gradient_over_views_is_clipped_once(name):
    chosen = AugmentConfig(name, views=3, pad=1)
    job = build_job(tiny(chosen))
    key = run_keys(job, SEED).sampler
    step, rows = 4, np.array([7, 1400, 3, -1])
    (x, y), words = job.source(key).rows_at(step, rows)
    params = job.model.init(jax.random.key(0))
    geometry = job.make_optimizer(jax.random.key(0)).geometry
    geometry = geometry(job.make_optimizer(jax.random.key(0)).init(params))
    clip = jax.jit(job.grad_fn)
    batch = (x, y), words
    found = clip(params, batch, geometry=geometry, is_padding_example=rows < 0)
    of_views = jax.random.wrap_key_data(jnp.asarray(words[0, :2]), impl="threefry2x32")
    total = jax.tree.map(np.zeros_like, params)
    grad, augment = jax.jit(jax.grad(job.model.loss_fn)), AUGMENTATIONS[name](1)
    for i, row in enumerate(rows[:3]):
        key = example_key(of_views, step, int(row))
        views = [jax.random.split(jax.random.fold_in(key, k))[0] for k in range(3)]
        grads = [grad(params, augment((x[i], y[i]), k)) for k in views]
        mean = jax.tree.map(lambda *g: sum(g) / 3, *grads)
        norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(mean)))
        scale = min(1.0, 1.0 / norm)
        total = jax.tree.map(lambda t, g: t + scale * np.asarray(g), total, mean)  # noqa: B023
        np.testing.assert_array_equal(x[i], job.data.x_train[row])
    for a, b in zip(*map(jax.tree.leaves, (found.gradients, total)), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_views_follow_key_step_and_row_and_nothing_else():
    rows = np.zeros((9, 8, 8, 1), np.float32), np.zeros(9, np.int32)
    words = lambda seed, step, at: rows_of(  # noqa: E731
        VIEWS, rows, jax.random.key(seed)
    ).rows_at(step, np.array(at))[1]
    here = words(0, 3, [5, 6])
    np.testing.assert_array_equal(here, words(0, 3, [5, 6]))
    np.testing.assert_array_equal(here[1], words(0, 3, [6])[0])
    others = [words(1, 3, [5]), words(0, 4, [5]), words(0, 3, [7])]
    assert all((here[0] != other[0]).any() for other in others)
    secret = np.asarray(jax.random.key_data(jax.random.key(0)))
    assert not np.isin(here[0, :2], secret).any()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "write_report", lambda path: path)
        return run_training(tiny(), tmp_path_factory.mktemp("views") / "whole")


def test_a_run_that_stopped_sees_the_same_views(whole_run, tmp_path):
    from contextlib import contextmanager

    @contextmanager
    def until(job, first):
        def stepped(now):
            if now == 3:
                raise KeyboardInterrupt  # as a kill would: steps after 2 are repeated

        yield Watch(stepped=stepped)

    folder = tmp_path / "run"
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        run_training(tiny(), folder, progress=until)
    again = run_training(tiny(), folder, resume=True)
    assert again["params_sha256"] == whole_run["params_sha256"]


def test_a_run_says_how_images_were_seen_at_the_epsilon_of_its_plan(whole_run):
    assert whole_run["epsilon"] <= 8.0 and whole_run["steps"] == STEPS
    words = "A step sees 3 random view(s) of each image (crop_and_mirror, by up to 1"
    assert words in whole_run["data_note"]
    json.dumps(whole_run)


def test_an_audited_trainer_has_views_and_its_claim_holds():
    trainer = audited_trainer(tiny(), max_steps=2)
    example = jax.tree.map(lambda a: a[0], trainer.examples)
    plain = build_job(tiny(AugmentConfig())).model.loss_fn
    assert trainer.loss_fn(trainer.params, example) != plain(trainer.params, example)
    geometry = trainer.optimizer(jax.random.key(0))
    geometry = geometry.geometry(geometry.init(trainer.params))
    batch = jax.tree.map(lambda a: a[:5], trainer.examples)
    grads = [
        jax.jit(side(trainer.loss_fn))(trainer.params, batch, geometry=geometry)
        for side in (trainer.clip, trainer.oracle)
    ]
    for a, b in zip(*(jax.tree.leaves(g.gradients) for g in grads), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_a_sweep_and_a_study_of_layers_see_views(compiled_once):  # noqa: F811
    config = tiny()
    found = Bench(None).run(config, "views")
    assert found["steps"] == STEPS and 0 <= found["accuracy"] <= 1
    job = build_job(config)
    record = measure(job, start(job, run_keys(job, 0)), rows=32)
    assert [layer["name"] for layer in record["layers"]] == ["hidden_0", "output"]


def test_released_metrics_are_means_over_views():
    on = config_from_mapping(
        {
            "data": {"name": "digits", "augment": {"name": "crop", "pad": 1}},
            "model": {"name": "mlp", "hidden": [4]},
            "privacy": dict(epsilon=8.0, delta=1e-5, batch_size=16, num_steps=2),
            "optimizer": {"learning_rate": 0.1, "importance": "uniform"},
            "metrics": {"release": True},
        }
    )
    assert on.data.augment.num_views == 4
    assert build_job(on).grad_fn.has_aux  # traces a whole step


def test_without_views_a_configuration_is_written_as_before(tmp_path):
    assert "augment" not in config_to_toml(Config())
    text = config_to_toml(tiny())
    assert 'augment = {name = "crop_and_mirror", views = 3, pad = 1}' in text
    path = tmp_path / "views.toml"
    path.write_text(config_to_toml(tiny(), seed=True))
    assert read_config(path) == tiny()


@pytest.mark.parametrize(
    "x", [np.zeros((20, 64), np.float32), np.zeros((20, 8, 8, 1), np.int32)]
)
def test_data_that_are_no_images_have_no_views(x):
    y = np.zeros(20, np.int32)
    with pytest.raises(ValueError, match="mine has inputs of another kind"):
        with_views(Dataset("mine", x, y, x, y, 2, note=""), VIEWS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(features="scattering"), "scattering', which are none; leave"),
        (dict(augment=AugmentConfig("crop_and_miror")), "did you mean crop_and_mirror"),
        (dict(augment=AugmentConfig("crop", pad=8)), "pad is 8, but .* 8 x 8 pixels"),
        (dict(augment=AugmentConfig("crop")), None),
    ],
)
def test_what_has_no_views_is_one_sentence(changes, words, monkeypatch, tmp_path):
    monkeypatch.setenv("DP_ILG_CACHE", str(tmp_path))
    data = dataclasses.replace(tiny().data, **changes)
    config = dataclasses.replace(tiny(), data=data)
    if words is None:
        assert "view(s)" in load_data(config).note
        return
    with pytest.raises(ValueError, match=words) as error:
        load_data(config)
    assert str(error.value).count(". ") == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(name="crop", views=0), "views is 0, but must be a whole number of at"),
        (dict(name="crop", pad=-1), "pad is -1, but must be a whole number of at"),
        (dict(views=2), "views is 2, but data.augment.name is left out"),
    ],
)
def test_numbers_that_cannot_be_are_one_sentence(fields, words):
    with pytest.raises(ValueError, match=words):
        AugmentConfig(**fields)
