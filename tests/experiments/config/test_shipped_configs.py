"""Every shipped configuration takes two steps on small made-up data of its kind."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp_ilg.experiments.config.schema import read_config
from dp_ilg.experiments.data.images import patches
from dp_ilg.experiments.data.tabular.adult import CATEGORIES, NUMBERS
from dp_ilg.experiments.data.tabular.flights import AIRPORTS
from dp_ilg.experiments.runs import runner
from dp_ilg.experiments.runs.job import build_job
from dp_ilg.experiments.runs.runner import run_training, with_seed
from tests.experiments.data.test_flights import write_table
from tests.experiments.data.test_ratings import (
    made_up_table,
    write_insteval,
    write_movielens,
)

CONFIGS = Path(__file__).parents[3] / "configs"
SIZE = 40


def images(rng, size):
    return rng.integers(0, 256, (size, 28, 28)).astype(np.uint8)


def colours(rng, size):
    return rng.integers(0, 256, (size, 32, 32, 3)).astype(np.uint8)


def texts(rng, size):
    ids = rng.integers(1, 10_000, (size, 256)).astype(np.uint16)
    ids[:, 200:] = 0
    return ids


def write_arrays(path, draw, classes):
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for part in ("train", "test"):
        arrays[f"x_{part}"] = draw(rng, SIZE)
        arrays[f"y_{part}"] = rng.integers(0, classes, SIZE).astype(np.uint8)
    np.savez(path, **arrays)


def write_people(path):
    rng = np.random.default_rng(0)
    columns: dict[str, Any] = {
        name: rng.choice(words, 2 * SIZE) for name, words in CATEGORIES.items()
    }
    columns |= {name: rng.integers(0, 50, 2 * SIZE) for name in NUMBERS}
    columns["class"] = rng.choice(["<=50K", ">50K"], 2 * SIZE)
    np.savez(path, **columns)


def write_mnist(folder):
    write_arrays(folder / "mnist.npz", images, 10)


def write_fashion(folder):
    write_arrays(folder / "fashion_mnist.npz", images, 10)


def write_cifar10(folder):
    write_arrays(folder / "cifar10.npz", colours, 10)


def write_imdb(folder):
    write_arrays(folder / "imdb.npz", texts, 2)


def write_imdb_and_words(folder):
    write_imdb(folder)
    arrays = dict(np.load(folder / "imdb.npz"))
    words = ["<pad>", "<start>", "<oov>", *(f"w{rank}" for rank in range(9_997))]
    np.savez(folder / "imdb.npz", **arrays, vocab=np.array(words))


def write_flights(folder):
    rng = np.random.default_rng(0)
    flights = [
        (2013, 1 + i % 12, 1 + i, f"{carrier}", i, f"N{i}", origin, "BOS", 515, 2400)
        for i, (carrier, origin) in enumerate(
            zip(
                rng.choice(["UA", "B6"], SIZE // 2),
                rng.choice(AIRPORTS, SIZE // 2),
                strict=True,
            )
        )
    ]
    write_table(folder, flights)


WRITERS = {
    "digits": lambda folder: None,
    "mnist_cnn": write_mnist,
    "mnist_mlp": write_mnist,
    "mnist_scattering": write_mnist,
    "fashion_cnn": write_fashion,
    "fashion_scattering": write_fashion,
    "cifar10_cnn": write_cifar10,
    "cifar10_conv": write_cifar10,
    "cifar10_scattering": write_cifar10,
    "cifar10_patch_roots": write_cifar10,
    "cifar10_patches": write_cifar10,
    "cifar10_views": write_cifar10,
    "imdb_embedding": write_imdb,
    "imdb_linear": write_imdb_and_words,
    "imdb_transformer": write_imdb,
    "adult_mlp": lambda folder: write_people(folder / "adult.npz"),
    "flights_mlp": write_flights,
    "text_lm": lambda folder: None,
    "flights_additive": write_flights,
    "movielens_additive": write_movielens,
    "insteval_additive": lambda folder: write_insteval(folder, made_up_table()),
}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DP_ILG_CACHE", str(tmp_path / "cache"))
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    monkeypatch.setattr(patches, "photographs", lambda: (photo,))
    small = patches.PatchFeatures(filters=8, samples=500, crops=30, width=20)
    for name, row in tuple(patches.PATCH_FEATURES.items()):
        few = dataclasses.replace(small, power=row.power)
        monkeypatch.setitem(patches.PATCH_FEATURES, name, few)


def small(name):
    config = read_config(CONFIGS / f"{name}.toml")
    privacy = dataclasses.replace(
        config.privacy, batch_size=16, num_steps=2, accountant="rdp"
    )
    return with_seed(dataclasses.replace(config, privacy=privacy), 0)


def test_every_shipped_config_is_covered():
    assert {path.stem for path in CONFIGS.glob("*.toml")} == set(WRITERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_a_shipped_config_trains(name, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "write_report", lambda path: path)
    WRITERS[name](tmp_path)
    summary = run_training(small(name), tmp_path / "run", data_dir=tmp_path)
    assert summary["steps"] == 2
    assert 0 <= summary.get("test_accuracy", 0) <= 1
    assert ("test_mse" in summary) == name.startswith(("movielens", "insteval"))


@pytest.mark.parametrize("name", WRITERS)
def test_a_shipped_config_has_a_uniform_twin(name, tmp_path):
    WRITERS[name](tmp_path)
    config = small(name)
    optimizer = dataclasses.replace(config.optimizer, importance="min_noise_energy")
    config = dataclasses.replace(config, optimizer=optimizer)
    assert build_job(config, tmp_path).plan.score_budget > 0  # traces a whole step
    optimizer = dataclasses.replace(config.optimizer, importance="uniform")
    job = build_job(dataclasses.replace(config, optimizer=optimizer), tmp_path)
    assert job.plan.score_budget == 0


def test_the_embedding_is_cut_into_bands(tmp_path):
    import jax

    WRITERS["imdb_embedding"](tmp_path)
    job = build_job(small("imdb_embedding"), tmp_path)
    params = job.model.init(jax.random.key(0))
    tx = job.make_optimizer(jax.random.key(1))
    names = tx.geometry(tx.init(params)).groups.names
    bands = [name for name in names if name.startswith("embedding/embedding[")]
    assert len(bands) == 8
    assert bands[-1].endswith(":10000]")
