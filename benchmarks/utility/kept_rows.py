"""What choosing an embedding's rows by a noisy count does to accuracy, seed by seed.

    python benchmarks/utility/kept_rows.py --data-dir DATA
    python benchmarks/utility/kept_rows.py --toy

Three ways to train one table under one plan, with the same start and batches: noise on
all rows ("all"), the same with the rows in 8 bands ("bands"), and `dp_ilg.keep_rows`
("kept"). Two tasks: IMDB reviews of 128 words (10,000 rows of 16, B 1,024, 150 steps)
and made-up click logs (200,000 rows of 8, 8 Zipf ids an example, B 2,048, 100 steps),
where most rows are read by nobody. One JSON line a run goes to
benchmarks/results/kept_rows.jsonl; runs that are there are not repeated.
"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dp_ilg
from dp_ilg.experiments.papers.reproduce import machine

LINES = Path(__file__).parents[1] / "results" / "kept_rows.jsonl"
METHODS = ("all", "bands", "kept")


class Task(NamedTuple):
    """Ids and labels, and how a run reads them."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    rows: int
    width: int
    batch: int
    steps: int
    most: int
    threshold: float
    row_budget: float
    decay: float = 0.95


def imdb(data_dir: Path) -> Task:
    """Reviews: the first 128 ids of each, 0 for none."""
    found = np.load(data_dir / "imdb.npz", allow_pickle=False)
    pairs = [
        (found[f"x_{part}"][:, :128].astype(np.int32), found[f"y_{part}"].astype(int))
        for part in ("train", "test")
    ]
    return Task(pairs[0], pairs[1], 10_000, 16, 1024, 150, 4096, 1.5, 0.1)


def clicks(rows: int = 200_000, count: int = 60_000) -> Task:
    """Made up: ids by Zipf's law, each with a hidden value; labels follow their sum."""
    rng = np.random.default_rng(0)
    value = rng.normal(size=rows)
    ids = np.exp(rng.uniform(0, np.log(rows), (count, 8))).astype(np.int32) - 1
    score = value[ids].sum(1) / np.sqrt(8)
    labels = (rng.logistic(size=count) < 3 * score).astype(int)
    cut = count - count // 6
    pairs = (ids[:cut], labels[:cut]), (ids[cut:], labels[cut:])
    batch, steps = (2048, 100) if count > 5000 else (64, 3)
    return Task(
        pairs[0], pairs[1], rows, 8, batch, steps, min(4096, rows // 4), 3.0, 0.1
    )


def model(task: Task, seed: int) -> tuple[Any, Callable, Callable]:
    """A mean of looked-up rows, one hidden layer, two classes."""
    keys = jax.random.split(jax.random.key(1000 + seed), 2)
    params = {
        "table": 0.1 * jax.random.normal(keys[0], (task.rows, task.width)),
        "hidden": jax.random.normal(keys[1], (task.width, 16)) / task.width**0.5,
        "head": jnp.zeros((16, 2)),
    }

    def logits(params: Any, ids: Any) -> Any:
        real = (ids != 0)[:, None] if task.rows == 10_000 else jnp.ones((len(ids), 1))
        mean = jnp.sum(params["table"][ids] * real, 0) / jnp.maximum(real.sum(), 1)
        return jnp.tanh(8 * mean @ params["hidden"]) @ params["head"]

    def loss(params: Any, example: Any) -> Any:
        ids, label = example
        found = logits(params, ids)
        return optax.softmax_cross_entropy_with_integer_labels(found, label)

    return params, loss, logits


def steps_of(method: str, task: Task, epsilon: float, rate: float, seed: int) -> Any:
    """The plan, `init`, and `step` of a method as a function of the gradient."""
    plan = dp_ilg.plan_privacy(
        epsilon=epsilon,
        delta=1e-5,
        num_examples=len(task.train[0]),
        batch_size=task.batch,
        num_steps=task.steps,
        score_budget=0.005,
        row_budget=task.row_budget if method == "kept" else 0.0,
    )
    cuts = [dp_ilg.layers.blocks("table", num_blocks=8)] if method == "bands" else []
    key = jax.random.key(seed)
    tx = dp_ilg.dp_adam_ilg(
        rate,
        plan,
        key=key,
        layers=dp_ilg.layers.by_leaf(*cuts),
        clip_mode="normalize",
    )
    if method == "kept":
        made = dp_ilg.keep_rows(
            tx,
            {"table": task.most},
            key=key,
            threshold=task.threshold,
            ema_decay=task.decay,
        )
        return plan, made.init, made.step

    def step(grad_fn: Any) -> Callable:
        def whole(params: Any, state: Any, batch: Any, mask: Any) -> Any:
            how = dict(geometry=tx.geometry(state), is_padding_example=mask)
            found = grad_fn(params, batch, **how)
            updates, state = tx.update(found, state, params)
            return optax.apply_updates(params, updates), state

        return whole

    return plan, tx.init, step


def run(method: str, task: Task, epsilon: float, rate: float, seed: int) -> Any:
    """One run: its test accuracy and time."""
    params, loss, logits = model(task, seed)
    plan, init, step = steps_of(method, task, epsilon, rate, seed)
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=plan.l2_clip_norm)
    compiled = jax.jit(step(grad_fn), donate_argnums=(0, 1))
    state, size = init(params), task.batch + 6 * int(task.batch**0.5)
    rng = np.random.default_rng(seed)
    times = []
    for _ in range(task.steps):
        drawn = np.flatnonzero(rng.random(plan.num_examples) < plan.sampling_prob)
        assert len(drawn) <= size
        index = np.zeros(size, int)
        index[: len(drawn)] = drawn
        batch = tuple(x[index] for x in task.train)
        began = time.perf_counter()
        params, state = compiled(params, state, batch, np.arange(size) >= len(drawn))
        jax.block_until_ready(params)
        times.append(time.perf_counter() - began)
    guess = jax.jit(jax.vmap(logits, (None, 0)))
    pieces = np.array_split(task.test[0], 1 + len(task.test[0]) // 5000)
    found = np.concatenate([np.asarray(guess(params, x)).argmax(1) for x in pieces])
    return {
        "accuracy": float(np.mean(found == task.test[1])),
        "milliseconds_a_step": round(1e3 * float(np.median(times[2:])), 1),
        "noise_multiplier": float(plan.noise_multipliers[0]),
    }


def main() -> None:
    """Runs what is asked for, and prints one line a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["imdb", "clicks"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 3.0])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.03])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--toy", action="store_true", help="one small run")
    parser.add_argument("--out", type=Path, default=LINES)
    args = parser.parse_args()
    began = time.monotonic()
    if args.toy:
        print(json.dumps(run("kept", clicks(400, 2000), 3.0, 0.03, 0)))
        return
    args.out.touch()
    done = [json.loads(line) for line in args.out.read_text().splitlines()]
    tasks: dict[str, Any] = {
        "imdb": lambda: imdb(args.data_dir),
        "clicks": clicks,
    }
    names = ("task", "epsilon", "seed", "learning_rate", "method")
    grid = itertools.product(
        args.tasks, args.epsilons, args.seeds, args.rates, args.methods
    )
    for cell in grid:
        facts = dict(zip(names, cell, strict=True))
        if any(all(line[k] == v for k, v in facts.items()) for line in done):
            continue
        if time.monotonic() - began > 60 * args.minutes:
            print("stopped by --minutes; the same command goes on")
            return
        task = tasks[facts["task"]]()
        line = facts | run(cell[4], task, cell[1], cell[3], cell[2])
        line |= {"row_budget": task.row_budget, "threshold": task.threshold}
        line |= {"ema_decay": task.decay}
        print(json.dumps(line), flush=True)
        with args.out.open("a") as file:
            about = machine() | {"command": " ".join(sys.argv)}
            file.write(json.dumps(line | about) + "\n")


if __name__ == "__main__":
    main()
