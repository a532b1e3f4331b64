"""What clipping in mapped coordinates costs: the clipped gradient with and without.

    python benchmarks/speed/maps.py
    python benchmarks/speed/maps.py --toy

*scales*: a vector along every axis of every leaf. *matrices*: a Kronecker pair for each
kernel, and for an embedding scales of its rows and a matrix on its columns. All kinds
take turns; every timed call follows an untimed one of its kind. Medians, and the ratio
of the medians to that without maps.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import dp_ilg  # noqa: E402
from common import RESULTS, machine  # noqa: E402
from dp_ilg.geometry.layers import paths  # noqa: E402

KINDS = ("none", "scales", "matrices")
LARGEST_MATRIX = 1024


def mlp(widths: tuple[int, ...], batch: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    params = {
        f"d{k}": {"w": rng.normal(size=p) / p[0] ** 0.5, "b": np.zeros(p[1])}
        for k, p in enumerate(zip(widths, widths[1:], strict=False))
    }
    x, y = rng.normal(size=(batch, widths[0])), rng.integers(0, widths[-1], batch)

    def loss(p: Any, example: Any) -> Any:
        h = jnp.tanh(example[0] @ p["d0"]["w"] + p["d0"]["b"])
        return -jax.nn.log_softmax(h @ p["d1"]["w"] + p["d1"]["b"])[example[1]]

    return loss, _float32(params), (jnp.asarray(x, jnp.float32), jnp.asarray(y))


def embedding(rows: int, width: int, words: int, batch: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    params = {
        "table": rng.normal(size=(rows, width)),
        "w": rng.normal(size=(width, width)) / width**0.5,
        "out": rng.normal(size=(width, 1)) / width**0.5,
    }
    ids = rng.zipf(1.3, (batch, words)) % rows

    def loss(p: Any, ids: Any) -> Any:
        h = jnp.tanh(jnp.mean(p["table"][ids], 0) @ p["w"])
        return jax.nn.softplus((h @ p["out"])[0])

    return loss, _float32(params), jnp.asarray(ids)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def coordinates(params: Any, kind: str) -> Any:
    """The coordinates of a kind."""
    rng = np.random.default_rng(1)
    if kind == "none":
        return None
    axes = {}
    for path, value in paths(params):
        axes["/".join(path)] = own = [rng.uniform(0.5, 2, n) for n in value.shape]
        for k, n in enumerate(value.shape):
            if kind == "matrices" and value.ndim == 2 and n <= LARGEST_MATRIX:
                root = rng.normal(size=(n, n))
                own[k] = root @ root.T / n + 0.3 * np.eye(n)
    return dp_ilg.AxisMaps.of(params, axes)


def measured(name: str, problem: tuple[Any, Any, Any], repeats: int) -> dict[str, Any]:
    """Milliseconds of every kind, in turns."""
    loss, params, batch = problem
    run = jax.jit(dp_ilg.clipped_grad(loss, l2_clip_norm=1.0))
    groups = dp_ilg.layers.group(params)
    ones = jnp.ones(len(groups.names), jnp.float32)
    there = {k: dp_ilg.Geometry(ones, groups, coordinates(params, k)) for k in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(repeats + 1):
        for kind, geometry in there.items():
            jax.block_until_ready(run(params, batch, geometry=geometry))
            start = time.perf_counter()
            jax.block_until_ready(run(params, batch, geometry=geometry))
            if turn:
                times[kind].append(1e3 * (time.perf_counter() - start))
    plain = median(times["none"])
    found: dict[str, Any] = {"model": name, "repeats": repeats}
    for kind, own in times.items():
        low, _, high = quantiles(own, n=4)
        found[f"{kind}_ms"] = round(median(own), 3)
        found[f"{kind}_quartiles_ms"] = [round(low, 3), round(high, 3)]
        found[f"{kind}_ratio"] = round(median(own) / plain, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS / "maps.jsonl")
    args = parser.parse_args()
    rows = {
        "MLP 784-1000-10, batch 256": lambda: mlp((784, 1000, 10), 256),
        "embedding 10,000 x 128, 64 words, batch 256": lambda: embedding(
            10_000, 128, 64, 256
        ),
    }
    if args.toy:
        rows = {
            "MLP 8-6-3": lambda: mlp((8, 6, 3), 16),
            "embedding 20 x 4": lambda: embedding(20, 4, 9, 16),
        }
    command = "python benchmarks/speed/maps.py" + (" --toy" if args.toy else "")
    for name, make in rows.items():
        record = measured(name, make(), 3 if args.toy else args.repeats)
        line = json.dumps(record | machine() | {"command": command})
        print(line, flush=True)
        if not args.toy:
            with args.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
