"""What noise from a cryptographic generator costs beside that of JAX's own.

    python benchmarks/speed/noise_cost.py --out audit_noise_cost.jsonl

One draw of all of a step's noise, as many normal numbers as the model has parameters:
threefry in a compiled function, and `dp_ilg.noise.secure` on the host, its transfer to
JAX arrays included. Medians of interleaved repeats.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

import dp_ilg
from dp_ilg.experiments.papers.reproduce import machine
from dp_ilg.noise.normal import standard_normals
from dp_ilg.noise.secure import SecureNoise

MODELS = {
    "digits MLP": ((64, 64), (64,), (64, 10), (10,)),
    "MLP 784-1000-10": ((784, 1000), (1000,), (1000, 10), (10,)),
}


def seconds(work: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def measure(shapes: tuple, repeats: int) -> dict[str, Any]:
    params = {str(i): jnp.zeros(shape) for i, shape in enumerate(shapes)}
    geometry, key = dp_ilg.Geometry.uniform(params), jax.random.key(0)
    source, leaves = SecureNoise(secret=bytes(32)), list(params.values())
    own = jax.jit(lambda key: standard_normals(key, leaves))
    ways = {
        "threefry_ms": lambda step: own(jax.random.fold_in(key, step)),
        "secure_ms": lambda step: source.draws(step, params, geometry),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(repeats + 1):
        for name, way in ways.items():
            found[name].append(1e3 * seconds(lambda way=way, step=step: way(step)))
    medians = {name: round(median(times[1:]), 3) for name, times in found.items()}
    count = sum(leaf.size for leaf in leaves)
    per_million = medians["secure_ms"] / count * 1e6
    return medians | {"draws": count, "secure_ms_per_million": round(per_million, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    command = f"python benchmarks/speed/noise_cost.py --repeats {args.repeats}"
    for name, shapes in MODELS.items():
        found = measure(shapes, args.repeats)
        record = {"model": name, "repeats": args.repeats} | found | machine()
        line = json.dumps(record | {"command": command})
        print(line)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
