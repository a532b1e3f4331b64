"""Frozen layers: convolutions from public images, a head trained with privacy.

    python benchmarks/utility/frozen_layers.py --data-dir ../shared/data
    python benchmarks/utility/frozen_layers.py --toy

Abadi et al. (2016) train CIFAR-10 on top of convolutions that were learnt on other
images (CIFAR-100). Here the "public" images are CIFAR-10's own classes 0 to 4 (plane,
car, bird, cat, deer), declared public for the example, and the private ones are classes
5 to 9 (dog, frog, horse, ship, truck). The guarantee covers the private images only.
Three networks of the same shape and the same epsilon are compared: convolutions
pre-trained and frozen, random and frozen, and everything trained with privacy.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dp_ilg
from dp_ilg.experiments.data.datasets import load_dataset
from dp_ilg.experiments.papers.reproduce import machine

CONVOLUTIONS = ("conv1", "conv2")
DELTA = 1e-5


class Part(NamedTuple):
    """Images and labels 0 to 4 of half of the classes."""

    x: Any
    y: Any
    x_test: Any
    y_test: Any


class Job(NamedTuple):
    """How long to train and how privately."""

    epsilon: float
    batch_size: int
    num_steps: int
    learning_rate: float
    public_steps: int


def initial(key: Any) -> dict[str, Any]:
    """Weights: two strided 5 x 5 convolutions, then a linear head of five classes."""
    k1, k2 = jax.random.split(key)
    return {
        "conv1": {"kernel": jax.random.normal(k1, (5, 5, 3, 32)) / np.sqrt(75)},
        "conv2": {"kernel": jax.random.normal(k2, (5, 5, 32, 64)) / np.sqrt(800)},
        "head": {"kernel": jnp.zeros((1024, 5)), "bias": jnp.zeros(5)},
    }


def logits(params: Any, x: Any) -> jax.Array:
    """Class scores of some images ``[batch, 32, 32, 3]`` in [0, 1]."""
    x = 4 * (x.astype(jnp.float32) - 0.5)
    for name in CONVOLUTIONS:
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(
                x,
                params[name]["kernel"],
                (2, 2),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )
        )
    x = x.reshape(len(x), 4, 2, 4, 2, 64).mean((2, 4)).reshape(len(x), -1)
    # Each image's features are scaled by their own size, which needs no other image.
    x = 4 * x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-3)
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def loss_fn(params: Any, example: Any) -> jax.Array:
    """Cross-entropy of one image."""
    x, y = example
    scores = logits(params, x[None])[0]
    return optax.softmax_cross_entropy_with_integer_labels(scores, y)


def accuracy(params: Any, x: Any, y: Any) -> float:
    """The share of images that are classified rightly."""
    predict = jax.jit(lambda batch: logits(params, batch).argmax(-1))
    guesses = [predict(x[i : i + 1000]) for i in range(0, len(x), 1000)]
    return float(np.mean(np.concatenate(guesses) == y))


def pretrain(params: Any, public: Part, num_steps: int) -> Any:
    """Ordinary training on the public images: no noise, no guarantee, none needed."""
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))

    def mean_loss(params: Any, x: Any, y: Any) -> jax.Array:
        scores = logits(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(scores, y).mean()

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        updates, state = tx.update(jax.grad(mean_loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    state, rows = tx.init(params), np.random.default_rng(0)
    for _ in range(num_steps):
        batch = rows.integers(0, len(public.x), 128)
        params, state = step(params, state, public.x[batch], public.y[batch])
    return params


def train_privately(
    params: Any, private: Part, job: Job, frozen: tuple[str, ...], key: Any
) -> tuple[Any, dp_ilg.PrivacyPlan]:
    """Trains what is not frozen; a frozen layer has no norm, no noise, no update."""
    plan = dp_ilg.plan_privacy(
        epsilon=job.epsilon,
        delta=DELTA,
        num_examples=len(private.x),
        batch_size=job.batch_size,
        num_steps=job.num_steps,
    )
    noise_key, batch_key = jax.random.split(key)
    layers = dp_ilg.layers.by_module(frozen=frozen)
    tx = dp_ilg.dp_adam_ilg(job.learning_rate, plan, key=noise_key, layers=layers)
    grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=plan.l2_clip_norm)
    sampler = dp_ilg.PoissonSampler.for_plan(plan, key=batch_key)

    @jax.jit
    def step(params: Any, state: Any, batch: Any, mask: Any) -> Any:
        geometry = tx.geometry(state)
        clipped = grad_fn(params, batch, geometry=geometry, is_padding_example=mask)
        updates, state = tx.update(clipped, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for t in range(plan.num_steps):
        chunks = sampler.chunks(t)  # more than one chunk is simply a larger batch
        rows = np.concatenate([chunk.indices for chunk in chunks])
        params, state = step(
            params, state, (private.x[rows], private.y[rows]), rows < 0
        )
    return params, plan


def halves(data_dir: Path | None, toy: bool) -> tuple[Part, Part]:
    """Classes 0 to 4, called public, and classes 5 to 9, private."""
    if toy:
        rng = np.random.default_rng(0)
        x = rng.uniform(size=(400, 32, 32, 3)).astype(np.float32)
        y = np.arange(400, dtype=np.int32) % 5
        x += y[:, None, None, None] / 5 * (np.arange(3) - 1)
        part = Part(x[:300], y[:300], x[300:], y[300:])
        return part, part
    data = load_dataset("cifar10", data_dir)
    x, y = np.asarray(data.x_train), data.y_train
    x_test, y_test = np.asarray(data.x_test), data.y_test
    parts = []
    for first in (0, 5):
        own, test = y // 5 == first // 5, y_test // 5 == first // 5
        parts.append(Part(x[own], y[own] - first, x_test[test], y_test[test] - first))
    return parts[0], parts[1]


def compare(job: Job, data_dir: Path | None, seed: int, toy: bool) -> list[dict]:
    """Runs the three networks and returns one record each."""
    public, private = halves(data_dir, toy)
    keys = jax.random.split(jax.random.key(seed))
    start = initial(keys[0])
    taught = pretrain(start, public, job.public_steps)
    rows = {
        "pre-trained, frozen": (taught, CONVOLUTIONS),
        "random, frozen": (start, CONVOLUTIONS),
        "all layers private": (start, ()),
    }
    records = []
    for row, (params, frozen) in rows.items():
        head = dict(params, head=start["head"])
        params, plan = train_privately(head, private, job, frozen, keys[1])
        records.append(
            {
                "row": row,
                "seed": seed,
                "test_accuracy": accuracy(params, private.x_test, private.y_test),
                "epsilon": plan.epsilon(),
                "delta": plan.delta,
                "job": job._asdict(),
                **machine(),
            }
        )
        shown = 100 * records[-1]["test_accuracy"]
        print(f"{row}: {shown:.1f} % at epsilon {plan.epsilon():.2f}", flush=True)
    return records


def main(argv: list[str] | None = None) -> list[dict]:
    """Reads the command line and prints one line a network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epsilon", type=float, default=4.0)
    parser.add_argument("--out", type=Path, help="append the records as JSON lines")
    parser.add_argument("--toy", action="store_true", help="coloured noise, few steps")
    args = parser.parse_args(argv)
    job = Job(args.epsilon, 500, 250, 5e-3, 1000)
    if args.toy:
        job = Job(args.epsilon, 60, 4, 5e-3, 3)
    records = compare(job, args.data_dir, args.seed, args.toy)
    if args.out:
        with args.out.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    return records


if __name__ == "__main__":
    main()
