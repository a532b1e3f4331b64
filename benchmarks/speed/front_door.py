"""What the front door costs: its step and its loop beside the ones written by hand.

    python benchmarks/speed/front_door.py

*step*: ``train.step(state, lot)`` beside the compiled step of `make_train_step`, on
batches that lie ready. *loop*: the whole iteration, drawing, gathering, charging on
disk and stepping, beside the loop of docs/guides/plain_jax.md with the same step. Both
kinds take turns; every timed call follows an untimed one of its kind; medians, and the
ratio of the least times, which a busy machine moves less.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))
import dp_ilg  # noqa: E402
from common import RESULTS, machine  # noqa: E402
from dp_ilg.optimizers.behind_noise import behind_noise  # noqa: E402
from dp_ilg.training.step import make_train_step  # noqa: E402

WIDTHS = {"digits linear": (64, 10), "MLP 784-1000-10": (784, 1000, 10)}
EXAMPLES, BATCH = 4096, 256


def loss_fn(params: Any, example: Any) -> Any:
    """Cross-entropy of an MLP, of one example."""
    x, y = example
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    logits = x @ params[-1]["w"] + params[-1]["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def start(widths: tuple[int, ...]) -> list[Any]:
    rng = np.random.default_rng(0)
    pairs = zip(widths, widths[1:], strict=False)
    return [
        {"w": jnp.asarray(rng.normal(size=p) / p[0], jnp.float32), "b": jnp.zeros(p[1])}
        for p in pairs
    ]


def by_hand(plan: Any, params: Any, rows: Any, ledger: Any) -> dict[str, Callable]:
    """The step, and the loop around it, from their parts."""
    key, batch_key = jax.random.split(jax.random.key(0))
    tx = behind_noise(optax.adam(1e-3), plan, key=key)
    grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=plan.l2_clip_norm)
    step = make_train_step(grad_fn, tx)
    sampler = dp_ilg.PoissonSampler.for_plan(plan, key=batch_key)
    held = [params, tx.init(params), 0]
    book = dp_ilg.PrivacyLedger(ledger, plan, key=key)

    def lot() -> Any:
        chunks = sampler.chunks(held[2])
        return [(tuple(a[i] for a in rows), mask) for i, mask in chunks]

    def take(lot: Any) -> Any:
        held[0], held[1] = step(held[0], held[1], lot)
        held[2] += 1
        return jax.block_until_ready(held[0])

    def loop() -> Any:
        book.record(held[2])
        return take(lot())

    ready = lambda count: [  # noqa: E731
        jax.device_put([(tuple(a[i] for a in rows), m) for i, m in sampler.chunks(t)])
        for t in range(count)
    ]
    return {"ready": ready, "step": take, "loop": loop}


def front_door(plan: Any, params: Any, rows: Any, ledger: Any) -> dict[str, Callable]:
    """The same through `private_training`."""
    train = dp_ilg.private_training(loss_fn, optax.adam(1e-3), plan)
    held = [train.init(params)]
    lots = train.batches(rows, ledger=ledger)

    def take(lot: Any) -> Any:
        held[0] = train.step(held[0], lot)
        return jax.block_until_ready(held[0].params)

    ready = lambda count: list(lots)  # noqa: E731 - all of the plan's
    return {"ready": ready, "step": take, "loop": lambda: take(next(lots))}


def seconds(way: dict[str, Callable], what: str, lots: Any) -> float:
    """One timed call after an untimed one of its kind."""
    for _ in range(2):
        given = (next(lots),) if what == "step" else ()
        began = time.perf_counter()
        way[what](*given)
        took = time.perf_counter() - began
    return took


def measure(name: str, what: str, repeats: int, folder: Path) -> dict[str, Any]:
    """Medians of both ways, turn about, and their ratio."""
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0,
        delta=1e-5,
        num_examples=EXAMPLES,
        batch_size=BATCH,
        num_steps=2 * repeats + 2,
    )
    rng = np.random.default_rng(1)
    x = rng.normal(size=(EXAMPLES, WIDTHS[name][0])).astype(np.float32)
    rows = x, rng.integers(0, 10, EXAMPLES).astype(np.int32)
    ways = {
        "by_hand_ms": by_hand(plan, start(WIDTHS[name]), rows, folder / "hand.jsonl"),
        "front_door_ms": front_door(
            plan, start(WIDTHS[name]), rows, folder / "door.jsonl"
        ),
    }
    lots = dict.fromkeys(ways)
    if what == "step":  # no thread gathers while these are timed
        lots = {key: iter(way["ready"](plan.num_steps)) for key, way in ways.items()}
    for key, way in ways.items():
        seconds(way, what, lots[key])  # compiles
    seen: dict[str, list[float]] = {key: [] for key in ways}
    for turn in range(repeats):
        for key in sorted(ways, reverse=bool(turn % 2)):
            seen[key].append(1e3 * seconds(ways[key], what, lots[key]))
    found = {key: median(values) for key, values in seen.items()}
    ratio = found["front_door_ms"] / found["by_hand_ms"]
    least = min(seen["front_door_ms"]) / min(seen["by_hand_ms"])
    rounded = {key: round(value, 3) for key, value in found.items()}
    ratios = {"ratio": round(ratio, 3), "ratio_of_least": round(least, 3)}
    return {"model": name, "what": what, **rounded, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(RESULTS / "front_door.jsonl"))
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--toy", action="store_true")
    given = parser.parse_args()
    names = list(WIDTHS)[:1] if given.toy else list(WIDTHS)
    repeats = 10 if given.toy else given.repeats
    with open(given.out, "a") as out:
        for name in names:
            for what in ("step", "loop"):
                with tempfile.TemporaryDirectory() as folder:
                    found = measure(name, what, repeats, Path(folder))
                record = {"benchmark": "front_door", **found, "repeats": repeats}
                print(json.dumps(record))
                out.write(json.dumps(record | machine()) + "\n")


if __name__ == "__main__":
    main()
