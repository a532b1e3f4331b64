"""What a step's noise costs: the default's draw, the one before it, and the host's.

    python benchmarks/speed/noise_cost.py --out audit_noise_cost.jsonl

One draw of all of a step's noise, as many numbers as the model has parameters: the
compiled draw of 192 bits; for comparison the float32 draw of 23 bits that
``jax.random.normal`` makes, in a kernel as tight (it ends at 5.4 standard deviations);
`dp_ilg.noise.secure` and `dp_ilg.noise.exact` on the host, the transfer to JAX arrays
included. Medians of interleaved repeats; the exact sampler is timed in every seventh.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import dp_ilg
from dp_ilg.experiments.papers.reproduce import machine
from dp_ilg.noise import normal
from dp_ilg.noise.exact import ExactNoise
from dp_ilg.noise.secure import SecureNoise

MODELS = {
    "digits MLP": ((64, 64), (64,), (64, 10), (10,)),
    "MLP 784-1000-10": ((784, 1000), (1000,), (1000, 10), (10,)),
}


def seconds(work: Any) -> float:
    began = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - began


def short_draw(key: Any, leaves: list) -> list:
    """JAX's float32 normal numbers, from both words of one block joined to 23 bits."""
    found = []
    for index, leaf in enumerate(leaves):
        first, second = jax.random.key_data(jax.random.fold_in(key, index))
        count = lax.iota(jnp.uint32, -(-leaf.size // 64) * 64)
        one, other = normal._threefry(first, second, 0, count)
        bits = ((one ^ other) >> np.uint32(9)) | np.uint32(0x3F800000)
        unit = lax.bitcast_convert_type(bits, jnp.float32) - np.float32(1)
        low = np.nextafter(np.float32(-1), np.float32(0))
        uniform = jnp.maximum(unit * (np.float32(1) - low) + low, low)
        draw = np.float32(np.sqrt(2)) * lax.erf_inv(uniform)
        found.append(draw[: leaf.size].reshape(leaf.shape))
    return found


def measure(shapes: tuple, repeats: int) -> dict[str, Any]:
    params = {str(i): jnp.zeros(shape) for i, shape in enumerate(shapes)}
    geometry, key = dp_ilg.Geometry.uniform(params), jax.random.key(0)
    leaves = list(params.values())
    secure, exact = SecureNoise(secret=bytes(32)), ExactNoise(secret=bytes(32))
    own = jax.jit(lambda key: normal.normal_steps(key, leaves))
    zeros = lambda key: leaves  # noqa: E731 - both draw behind a branch, see normal.py
    branch = lambda key, wanted: lax.cond(  # noqa: E731
        wanted, lambda k: short_draw(k, leaves), zeros, key
    )
    short = jax.jit(branch)
    ways = {
        "threefry_ms": lambda step: own(jax.random.fold_in(key, step)),
        "short_tailed_ms": lambda step: short(jax.random.fold_in(key, step), True),
        "secure_ms": lambda step: secure.draws(step, params, geometry),
        "exact_ms": lambda step: exact.draws(step, params, geometry),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(repeats + 1):
        for name, way in ways.items():
            if name != "exact_ms" or step % 7 == 0:
                seen = seconds(lambda way=way, step=step: way(step))
                found[name].append(1e3 * seen)
    medians = {name: round(median(times[1:]), 3) for name, times in found.items()}
    pairs = zip(found["threefry_ms"][1:], found["short_tailed_ms"][1:], strict=True)
    medians["ratio"] = round(median(ours / short for ours, short in pairs), 2)
    count = sum(leaf.size for leaf in leaves)
    per_million = medians["exact_ms"] / count * 1e6
    return medians | {"draws": count, "exact_ms_per_million": round(per_million, 1)}


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
