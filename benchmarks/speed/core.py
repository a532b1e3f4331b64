"""Times the private step against the ordinary one, and the accountant's answers.

    python benchmarks/speed/core.py --out benchmarks/results/core.jsonl
    python benchmarks/speed/core.py --toy

Every row interleaves its contestants, takes medians, gives ratios to the ordinary Adam
step (full batch and best micro-batch) beside absolute times, and is one JSON line with
the machine, the versions and the command.
"""

import argparse
import functools
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import dp_ilg

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import machine  # noqa: E402

REPEATS = 10
SIZES = {"mlp": ((784, 1000, 10), 256), "small_mlp": ((64, 64, 10), 256)}
TOY = {"toy_mlp": ((8, 16, 3), 16)}


def init(sizes: tuple[int, ...], key: jax.Array) -> Any:
    """A tanh MLP."""
    keys = jax.random.split(key, len(sizes))
    return [
        {"kernel": jax.random.normal(k, (a, b)) / a**0.5, "bias": jnp.zeros(b)}
        for k, a, b in zip(keys, sizes, sizes[1:], strict=False)
    ]


def loss_fn(params: Any, example: Any) -> jax.Array:
    """Cross entropy of one example."""
    x, y = example
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    logits = x @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def ordinary_step(size: int, chunk: int) -> Any:
    """The step without privacy, over micro-batches of `chunk`."""
    tx = optax.adam(1e-3)

    def mean_loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(jax.vmap(loss_fn, (None, 0))(params, batch))

    def step(params: Any, state: Any, batch: Any) -> Any:
        pieces = jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), batch)
        zero = jax.tree.map(jnp.zeros_like, params)

        def body(total: Any, piece: Any) -> Any:
            grads = jax.grad(mean_loss)(params, piece)
            return jax.tree.map(jnp.add, total, grads), None

        grads = jax.lax.scan(body, zero, pieces)[0]
        grads = jax.tree.map(lambda g: g * (chunk / size), grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def private_step(size: int, chunk: int, rule: str) -> Any:
    """The whole private step: gradient, clip, score, noise, Adam."""
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0,
        delta=1e-5,
        num_examples=60_000,
        batch_size=size,
        num_steps=10_000,
    )
    tx = dp_ilg.dp_adam_ilg(1e-3, plan, key=jax.random.key(1), importance=rule)
    grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=1.0, microbatch_size=chunk)

    def step(params: Any, state: Any, batch: Any) -> Any:
        clipped = grad_fn(params, batch, geometry=tx.geometry(state))
        updates, state = tx.update(clipped, state, params)
        return optax.apply_updates(params, updates), state

    return tx, step


def compiled(tx: Any, step: Any, params: Any, batch: Any) -> tuple[Any, float, float]:
    """Ahead-of-time compiled step, its compile seconds and XLA's temporary MiB."""
    state = tx.init(params)
    began = time.perf_counter()
    run: Any = jax.jit(step).lower(params, state, batch).compile()
    seconds = time.perf_counter() - began
    memory = run.memory_analysis()
    mebibytes = getattr(memory, "temp_size_in_bytes", 0) / 2**20
    return functools.partial(run, params, state, batch), seconds, mebibytes


def bench_step(name: str, sizes: tuple[int, ...], size: int, repeats: int) -> dict:
    """Medians of interleaved repeats of every contestant of one row."""
    params = init(sizes, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (size, sizes[0]))
    batch = (x, jnp.arange(size) % sizes[-1])
    chunks = sorted({size, max(1, size // 4), max(1, size // 16)})
    makers = {f"ordinary/{c}": ordinary_step(size, c) for c in chunks}
    for rule in ("uniform", "min_noise_energy"):
        for c in chunks:
            makers[f"{rule}/{c}"] = private_step(size, c, rule)
    runs = {k: compiled(m[0], m[1], params, batch) for k, m in makers.items()}
    times: dict[str, list[float]] = {k: [] for k in runs}
    for _ in range(repeats + 1):
        for key, (run, _, _) in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            times[key].append(time.perf_counter() - began)
    medians = {k: statistics.median(v[1:]) for k, v in times.items()}
    full = medians[f"ordinary/{size}"]
    best = min(v for k, v in medians.items() if k.startswith("ordinary"))
    rows = {
        key: {
            "milliseconds": 1e3 * value,
            "over_full_batch": value / full,
            "over_best_microbatch": value / best,
            "compile_seconds": runs[key][1],
            "temporary_mib": runs[key][2],
        }
        for key, value in medians.items()
    }
    return {"row": name, "batch_size": size, "repeats": repeats, "steps": rows}


def bench_accounting(stages: int, steps: int) -> dict:
    """Seconds to calibrate and to ask for epsilon again in a fresh plan."""
    schedule = dp_ilg.schedules.constant()
    if stages > 1:
        schedule = dp_ilg.schedules.linear(0.5)
    began = time.perf_counter()
    plan = dp_ilg.plan_privacy(
        epsilon=2.0,
        delta=1e-5,
        num_examples=60_000,
        batch_size=1024,
        num_steps=steps,
        schedule=schedule,
        num_stages=stages,
    )
    calibrated = time.perf_counter() - began
    began = time.perf_counter()
    epsilon = plan.epsilon(steps - 1)
    asked = time.perf_counter() - began
    return {
        "row": f"accounting_{stages}_stages",
        "calibrate_seconds": calibrated,
        "epsilon_seconds": asked,
        "epsilon": epsilon,
    }


def main() -> None:
    """Runs every row and writes JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="smallest sizes, once")
    parser.add_argument("--out", help="file to append JSON lines to")
    args = parser.parse_args()
    facts = machine()
    shapes, repeats = (TOY, 2) if args.toy else (SIZES, REPEATS)
    results = [bench_step(n, s, b, repeats) for n, (s, b) in shapes.items()]
    results.append(bench_accounting(1, 20 if args.toy else 600))
    results.append(bench_accounting(2 if args.toy else 16, 20 if args.toy else 600))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    lines = [json.dumps(r | {"peak_resident_mib": peak} | facts) for r in results]
    print("\n".join(lines))
    if args.out:
        with open(args.out, "a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
