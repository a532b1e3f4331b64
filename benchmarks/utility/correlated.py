"""Correlated noise: what a plan expects, what moving weights leave, and what it costs.

    python benchmarks/utility/correlated.py --out benchmarks/results/correlated.jsonl
    python benchmarks/utility/correlated.py --toy

Lines of three kinds. ``expected``: the noise of the sums of steps, as a part of that of
independent noise, for an epsilon and a number of bands. ``weights``: the same for the
weights that a run on digits chose, by the decay of their running average, or frozen
after some steps. ``time``: a step of the MNIST CNN's size, bands against none, medians
of interleaved calls.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import signal

import dp_ilg
from dp_ilg.accounting.correlated import choice, strategies
from dp_ilg.experiments.papers.reproduce import machine

FACTS: dict[str, Any] = dict(
    delta=1e-5, num_examples=60_000, batch_size=1024, num_steps=1000
)
SHAPES = {"a": (784, 1000), "b": (1000, 10), "c": (1000,)}


def expected(toy: bool) -> Iterator[dict[str, Any]]:
    """A line for each epsilon and number of bands."""
    for epsilon in (8.0,) if toy else (1.0, 3.0, 8.0):
        make = functools.partial(dp_ilg.plan_privacy, epsilon=epsilon, **FACTS)
        for row in choice.compared(make, (1, 4) if toy else choice.CANDIDATES):
            longer = strategies.length(row.strategy)
            grown = strategies.growth(row.strategy or (1.0,))
            plan = make(strategy=row.strategy)
            yield {
                "kind": "expected",
                **FACTS,
                "epsilon": epsilon,
                "bands": row.bands,
                "relative": row.relative,
                "one_step": longer * grown * float(plan.noise_multipliers[0]),
            }


def trajectory(decay: float, steps: int, plan: Any) -> np.ndarray:
    """The weights of a run on digits, ``[steps, groups]``."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = x / 16.0
    key = jax.random.key(0)
    params = {
        "first": jax.random.normal(key, (64, 64)) / 8,
        "second": jnp.zeros((64, 10)),
    }
    tx = dp_ilg.dp_adam_ilg(0.01, plan, key=jax.random.key(1), ema_decay=decay)

    def loss(p: Any, example: Any) -> Any:
        logits = jax.nn.relu(example[0] @ p["first"]) @ p["second"]
        return -jax.nn.log_softmax(logits)[example[1]]

    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=plan.l2_clip_norm)
    sampler = dp_ilg.PoissonSampler.for_plan(plan, key=2)
    data, state, found = (jnp.asarray(x, jnp.float32), jnp.asarray(y)), None, []
    state = tx.init(params)

    @jax.jit
    def step(params: Any, state: Any, batch: Any, mask: Any) -> Any:
        geometry = tx.geometry(state)
        total = grad_fn(params, batch, geometry=geometry, is_padding_example=mask)
        updates, state = tx.update(total, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for t in range(steps):
        found.append(np.asarray(tx.geometry(state).weights, np.float64))
        (chunk,) = sampler.chunks(t)
        rows, mask = chunk
        batch = jax.tree.map(lambda a, r=rows: a[jnp.maximum(jnp.asarray(r), 0)], data)
        params, state = step(params, state, batch, jnp.asarray(mask))
    return np.stack(found)


def left_of(weights: np.ndarray, strategy: tuple[float, ...]) -> float:
    """Root mean square noise of the sums for weights ``[steps]``, a fresh draw of 1."""
    steps = len(weights)
    inverse = signal.lfilter([1.0], strategy or (1.0,), np.eye(1, steps)[0])
    reach = np.zeros((steps, steps))  # of draw s in the sum of the steps to t
    for s in range(steps):
        reach[s:, s] = np.cumsum(weights[s:] * inverse[: steps - s])
    return float(np.sqrt((reach**2).sum(1).mean())) * strategies.length(strategy)


def moving(toy: bool) -> Iterator[dict[str, Any]]:
    """A line for each way to keep weights still."""
    steps = 40 if toy else 300
    plan = dp_ilg.plan_privacy(
        epsilon=8.0, delta=1e-5, num_examples=1797, batch_size=64, num_steps=steps,
        score_budget=0.01, bands=8,
    )  # fmt: skip
    for decay in (0.9,) if toy else (0.0, 0.5, 0.9, 0.99):
        path = trajectory(decay, steps, plan)
        for frozen in (None, 20) if toy else (None, 20, 50):
            held = path.copy()
            if frozen is not None:
                held[frozen:] = held[frozen]
            ratios = [
                left_of(w, plan.strategy) / left_of(w, ()) for w in held.T
            ]  # the noise multiplier of both is the same here
            still = left_of(np.ones(steps), plan.strategy) / left_of(np.ones(steps), ())
            jumps = np.abs(np.diff(np.log(held), axis=0)).mean()
            yield {
                "kind": "weights",
                "bands": plan.bands,
                "num_steps": steps,
                "ema_decay": decay,
                "frozen_after": frozen,
                "worst_group": max(ratios),
                "still": still,
                "mean_log_change": float(jumps),
            }


def timed(toy: bool) -> Iterator[dict[str, Any]]:
    """A line for each number of bands: noise and Adam alone, and the whole step."""
    shapes = {"a": (64, 32)} if toy else SHAPES
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    repeats, batch = (3, 8) if toy else (15, 256)
    width = shapes["a"][0]

    def loss(p: Any, x: Any) -> Any:
        hidden = jnp.tanh(x @ p["a"] + p.get("c", 0.0))
        out = hidden @ p["b"] if "b" in p else hidden
        return jnp.sum(out**2)

    rows = jax.random.normal(jax.random.key(0), (batch, width))
    calls = {}
    for bands in (1, 4) if toy else (1, 4, 16):
        plan = dp_ilg.plan_privacy(noise_multiplier=1.0, bands=bands, **FACTS)
        tx = dp_ilg.dp_adam_ilg(1e-3, plan, key=jax.random.key(0), importance="uniform")
        grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(p: Any, s: Any, tx: Any = tx, grad_fn: Any = grad_fn) -> Any:
            total = grad_fn(p, rows, geometry=tx.geometry(s))
            updates, s = tx.update(total, s, p)
            return jax.tree.map(jnp.add, p, updates), s

        calls[bands] = [step, (jax.tree.map(jnp.copy, params), tx.init(params))]
    found: dict[int, list[float]] = {bands: [] for bands in calls}
    rng = np.random.default_rng(0)
    for _ in range(repeats):
        for bands in rng.permutation(list(calls)):
            step, position = calls[int(bands)]
            position = jax.block_until_ready(step(*position))  # untimed, of its kind
            start = time.perf_counter()
            calls[int(bands)][1] = jax.block_until_ready(step(*position))
            found[int(bands)].append(time.perf_counter() - start)
    base = statistics.median(found[1])
    size = sum(x.size for x in params.values())
    for bands, seconds in found.items():
        yield {
            "kind": "time",
            "parameters": size,
            "batch": batch,
            "bands": bands,
            "repeats": repeats,
            "median_ms": 1e3 * statistics.median(seconds),
            "ratio": statistics.median(seconds) / base,
            "memory_bytes": 4 * (bands - 1) * size,
        }


def main() -> None:
    """Measures all three and writes their lines."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", action="store_true", help="a small form")
    parser.add_argument("--kinds", nargs="*", default=["expected", "weights", "time"])
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    args = parser.parse_args()
    kinds = {"expected": expected, "weights": moving, "time": timed}
    for kind in args.kinds:
        for line in kinds[kind](args.toy):
            text = json.dumps(line | machine())
            print(text)
            if args.out is not None:
                with args.out.open("a") as file:
                    file.write(text + "\n")


if __name__ == "__main__":
    main()
