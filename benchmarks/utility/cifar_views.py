"""CIFAR-10 from scratch: a convolutional network, several views of each example.

    python benchmarks/utility/cifar_views.py --data-dir ../shared/data --epsilon 3
    python benchmarks/utility/cifar_views.py --toy

Convolution, ReLU and GroupNorm in this order, K random crops and mirror images of one
example, whose mean gradient is clipped once, averaged iterates. The run is saved as it
goes: the same command goes on where it stopped. Prints one line of JSON.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import dp_ilg
from dp_ilg.experiments.data.datasets import load_dataset
from dp_ilg.experiments.papers.reproduce import machine
from dp_ilg.training.frameworks.images import crop_and_mirror

SAVE_EVERY = 10  # steps


class Scene(NamedTuple):
    """Images of 32 x 32 in colour, and how they are trained on."""

    train: tuple[Any, Any]
    test: tuple[Any, Any]
    batch_size: int
    num_steps: int
    channels: tuple[int, ...]


class Net(nn.Module):
    """3 x 3 convolutions: ReLU, then GroupNorm, then halved by a mean."""

    channels: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        """Maps one image to ten scores."""
        x = x[None]
        for width in self.channels:
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.GroupNorm(min(8, width))(x)
            x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(-1))


def scene(args: argparse.Namespace) -> Scene:
    """CIFAR-10, or forty made-up images for two steps."""
    if args.toy:
        rng = np.random.default_rng(0)
        x = rng.random((40, 32, 32, 3)).astype(np.float32)
        part = (x, rng.integers(0, 10, 40).astype(np.int32))
        return Scene(part, part, 8, 2, (4, 8))
    data = load_dataset("cifar10", args.data_dir)
    train, test = (data.x_train, data.y_train), (data.x_test, data.y_test)
    return Scene(train, test, args.batch_size, args.num_steps, (32, 64, 128))


def run(job: Scene, args: argparse.Namespace) -> dict[str, Any]:
    """Trains, or goes on training, and judges the average of the iterates."""
    plan = dp_ilg.plan_privacy(
        epsilon=args.epsilon,
        delta=1e-5,
        num_examples=len(job.train[1]),
        batch_size=job.batch_size,
        num_steps=job.num_steps,
        l2_clip_norm=1.0,
    )
    net = Net(job.channels)

    def loss_fn(params: Any, example: Any, key: Any) -> jax.Array:
        x, y = example
        logits: Any = net.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    train = dp_ilg.private_training(
        loss_fn,
        optax.sgd(args.learning_rate, momentum=0.9),
        plan,
        importance=args.importance,
        clip_mode="normalize",
        views=args.views,
        augment=crop_and_mirror(4),
        microbatch_size=None if args.toy else args.microbatch_size,
        seed=args.seed,
    )
    first: Any = jax.jit(net.init)(jax.random.key(args.seed), job.train[0][0])
    first = first["params"]
    state, saved, mean = train.init(first), args.out / "saved", first
    if saved.exists():
        state = train.restore(saved)
        mean = jax.tree.map(jnp.asarray, _read(args.out / "mean.npz", first))
    began, seen = time.perf_counter(), int(state.step)
    lots = train.batches(job.train, ledger=args.out / "ledger.jsonl", resume=True)
    for lot in lots:
        state = train.step(state, lot)
        share = max(1 - args.average, 1 / (lot.step + 1))
        mean = optax.incremental_update(state.params, mean, share)
        if (lot.step + 1) % SAVE_EVERY == 0:
            np.savez(args.out / "mean.npz", *map(np.asarray, jax.tree.leaves(mean)))
            train.save(saved, state)
    seconds = time.perf_counter() - began
    predict = jax.jit(jax.vmap(lambda p, x: net.apply({"params": p}, x), (None, 0)))
    guesses = [predict(mean, x).argmax(-1) for x in np.array_split(job.test[0], 20)]
    return dict(
        epsilon=train.epsilon(state),
        test_accuracy=float(np.mean(np.concatenate(guesses) == job.test[1])),
        seconds_a_step=seconds / max(int(state.step) - seen, 1),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(mean)),
    )


def _read(path: Path, like: Any) -> Any:
    with np.load(path) as file:
        return jax.tree.unflatten(jax.tree.structure(like), [*file.values()])


def main() -> None:
    """Prints one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar_views"))
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--num-steps", type=int, default=500)
    parser.add_argument("--microbatch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1.0)
    parser.add_argument("--importance", default="uniform")
    parser.add_argument("--average", type=float, default=0.98)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    told = {k: v for k, v in vars(args).items() if k not in ("data_dir", "out")}
    print(json.dumps({**told, **run(scene(args), args), "machine": machine()}))


if __name__ == "__main__":
    main()
