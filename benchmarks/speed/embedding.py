"""What a private step of a large embedding costs, and how much of it is noise.

    python benchmarks/speed/embedding.py
    python benchmarks/speed/embedding.py --toy
    python benchmarks/speed/embedding.py --kept 8192
    python benchmarks/speed/embedding.py --kept 16384 --rows 1000000

A table of 50,000 x 128 and a linear head on the mean of a text's rows, 256 texts of 64
words. Timed are the clipped sum, the same and the noise, and the whole step with Adam;
parts are differences of medians. Every row gets noise in every step, whether a text
has its word or not: a row without noise would show that nobody had it. With `--kept` a
noisy count chooses the rows that take part (`dp_ilg.keep_rows`), at threshold 0, so
that as many as may take part do. One JSON line goes to
benchmarks/results/embedding.jsonl.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dp_ilg
from dp_ilg.experiments.papers.reproduce import machine

LINES = Path(__file__).parents[1] / "results" / "embedding.jsonl"


def problem(rows: int, width: int, batch: int, length: int) -> Any:
    """Parameters, loss and a batch; words follow Zipf's law."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "table": 0.1 * jax.random.normal(keys[0], (rows, width)),
        "head": jnp.zeros((width, 2)),
    }
    uniform = jax.random.uniform(keys[1], (batch, length))
    words = jnp.exp(uniform * jnp.log(rows)).astype(jnp.int32) - 1
    labels = jax.random.randint(keys[2], (batch,), 0, 2)

    def loss_fn(params: Any, example: Any) -> jax.Array:
        ids, label = example
        logits = params["table"][ids].mean(0) @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    return params, loss_fn, (words, labels)


def stages(loss_fn: Any) -> tuple[Any, dict[str, Callable]]:
    """The optimizer and the step, cut after its stages."""
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0,
        delta=1e-5,
        num_examples=2560,
        batch_size=256,
        num_steps=99,
    )
    tx = dp_ilg.dp_adam_ilg(1e-3, plan, key=jax.random.key(1))
    noise = dp_ilg.add_importance_noise(plan, key=jax.random.key(2))
    grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=plan.l2_clip_norm)

    def clip(params: Any, state: Any, batch: Any) -> Any:
        return grad_fn(params, batch, geometry=tx.geometry(state))

    def release(params: Any, state: Any, batch: Any) -> Any:
        return noise.update(clip(params, state, batch), noise.init(params))[0]

    def step(params: Any, state: Any, batch: Any) -> Any:
        updates, state = tx.update(clip(params, state, batch), state, params)
        return optax.apply_updates(params, updates), state

    return tx, {
        "clipped": jax.jit(clip),
        "released": jax.jit(release),
        "step": jax.jit(step, donate_argnums=(0, 1)),
    }


def kept_stages(loss_fn: Any, most: int) -> tuple[Any, dict[str, Callable]]:
    """The step on kept rows, cut after its stages."""
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0,
        delta=1e-5,
        num_examples=2560,
        batch_size=256,
        num_steps=99,
        row_budget=0.1,
    )
    key = jax.random.key(1)
    tx = dp_ilg.dp_adam_ilg(1e-3, plan, key=key)
    rows = dp_ilg.keep_rows(tx, {"table": most}, key=key, threshold=0.0)
    grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=plan.l2_clip_norm)

    def chosen(params: Any, state: Any, batch: Any) -> Any:
        return rows.kept(rows.counts(grad_fn, params, batch), state)

    def clip(params: Any, state: Any, batch: Any) -> Any:
        kept = chosen(params, state, batch)
        return rows.gradient(grad_fn, params, state, kept, batch)

    step = jax.jit(rows.step(grad_fn), donate_argnums=(0, 1))
    return rows, {"chosen": jax.jit(chosen), "clipped": jax.jit(clip), "step": step}


def in_turns(
    calls: dict[str, Callable], held: tuple[Any, Any], batch: Any, repeats: int
) -> dict[str, float]:
    """Median milliseconds of every stage; what is held goes on with "step"."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            out = jax.block_until_ready(call(*held, batch))
            found[name].append(1e3 * (time.perf_counter() - began))
            if name == "step":
                held = out
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def measure(sizes: tuple[int, ...], repeats: int, most: int) -> dict[str, Any]:
    """One line: all rows take part, or `most` at most; memory is the process' peak."""
    params, loss_fn, batch = problem(*sizes)
    tx, calls = kept_stages(loss_fn, most) if most else stages(loss_fn)
    median = in_turns(calls, (params, tx.init(params)), batch, repeats)
    names = ("rows", "width", "batch_size", "words")
    record = dict(zip(names, sizes, strict=True)) | {
        "kept": most,
        "touched_rows": int(jnp.unique(batch[0]).size),
        "milliseconds": {k: round(v, 2) for k, v in median.items()},
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "load": os.getloadavg()[0],
    }
    if most:
        return record
    noise = median["released"] - median["clipped"]
    return record | {"noise_share": round(noise / median["step"], 3)}


def main() -> None:
    """Measures and prints one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--kept", type=int, default=0, help="the most rows of a step")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--toy", action="store_true", help="a small table, once")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    sizes = (40, 4, 4, 5) if args.toy else (args.rows, 128, 256, 64)
    repeats = 1 if args.toy else args.repeats
    record = measure(sizes, repeats, args.kept)
    print(json.dumps(record))
    path = args.out or (None if args.toy else LINES)
    if path:
        about = machine() | {"command": " ".join(sys.argv)}
        with path.open("a") as file:
            file.write(json.dumps(record | about) + "\n")


if __name__ == "__main__":
    main()
