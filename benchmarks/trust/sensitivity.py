"""A search that tries to break the sensitivity bound of the clip.

    python benchmarks/trust/sensitivity.py --out audit_sensitivity.jsonl
    python benchmarks/trust/sensitivity.py --cases 5000

A case is a batch, a geometry, a clip norm and a mode: the batch is clipped with and
without its last example, and how far the sum moved is taken in float64, over C. Seven
ways of making batches, three dtypes, all clip modes, groups cut and whole, with and
without maps. The largest ratio must be at most 1 + 1e-6. Beside it stands what rounding
alone does to sums of many aligned examples: a float32 sum of n clipped gradients is as
coarse as n C / 2^24.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dp_ilg
from dp_ilg.clipping.clip import CLIP_MODES, as_clip_mode, clip_sum
from dp_ilg.clipping.per_example import from_gradients
from dp_ilg.experiments.papers.reproduce import machine
from dp_ilg.geometry.coordinates import enter_gradients
from dp_ilg.geometry.geometry import LARGEST_RATIO
from dp_ilg.geometry.groups import Groups, pieces_of

PAIRS, EXAMPLES = 200, 4
LIMIT = 1 + 1e-6
SHAPES = {
    "scalar_and_row": {"a": (), "b": (7,)},
    "matrices": {"m": (6, 4), "n": (4,), "o": (4, 2)},
    "tensor": {"c": (3, 3, 2, 2), "d": (5, 1)},
    "wide": {"w": (257,), "v": (2, 65)},
}
CUTS = {"scalar_and_row": "b", "matrices": "m", "tensor": "c", "wide": "w"}
DTYPES = ("float32", "bfloat16", "float16")
DENORMAL, TINY = 1e-45, float(np.finfo(np.float32).tiny)
Rng = np.random.Generator


class Setting(NamedTuple):
    """What is compiled once: shapes, dtype, mode, is a leaf cut, are leaves mapped."""

    shape: str
    dtype: str
    mode: str
    cut: bool
    mapped: bool = False


class Batch(NamedTuple):
    """Gradients ``[pairs, examples, ...]``, weights ``[pairs, groups]``, and C."""

    gradients: Any
    weights: Any
    bound: Any


@functools.cache
def clippers(setting: Setting) -> tuple[Any, Groups, Callable, Callable]:
    """Parameters, groups, the compiled pair of sums, and a step of gradient ascent."""
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    zeros = lambda s: jnp.zeros(s, setting.dtype)  # noqa: E731
    params = jax.tree.map(zeros, SHAPES[setting.shape], is_leaf=is_shape)
    cut = dp_ilg.layers.by_leaf(dp_ilg.layers.blocks(CUTS[setting.shape], edges=[1, 2]))
    groups = dp_ilg.layers.group(params, cut if setting.cut else "leaf")
    mode = as_clip_mode(setting.mode)
    last = jnp.arange(EXAMPLES) == EXAMPLES - 1
    maps = maps_of(params, setting)

    def pair(gradients: Any, weights: Any, bound: Any) -> tuple:
        geometry = dp_ilg.Geometry(weights, groups, maps)
        if maps is not None:
            gradients = enter_gradients(maps, gradients, groups)
        engine = from_gradients(gradients, groups)
        run = lambda mask: clip_sum(engine, geometry, bound, mode, mask)  # noqa: E731
        return run(jnp.zeros(EXAMPLES, bool)), run(last)

    def moved(gradients: Any, weights: Any, bound: Any) -> Any:
        one, other = pair(gradients, weights, bound)
        gaps = jax.tree.map(jnp.subtract, one.gradients, other.gradients)
        norms = groups.norms(jax.tree.leaves(gaps))
        return jnp.sum(jnp.square(norms / weights / bound))

    def climb(gradients: Any, weights: Any, bound: Any) -> Any:
        slope = jax.grad(moved)(gradients, weights, bound)

        def step(g: Any, d: Any) -> Any:
            d = jnp.where(jnp.isfinite(d), d, 0).astype(jnp.float32)
            size = jnp.sqrt(jnp.mean(jnp.square(g.astype(jnp.float32))))
            top = jnp.maximum(jnp.max(jnp.abs(d)), TINY)
            return (g + 0.1 * size * d / top).astype(g.dtype)

        return jax.tree.map(step, gradients, slope)

    return params, groups, jax.jit(jax.vmap(pair)), jax.jit(jax.vmap(climb))


def maps_of(params: Any, setting: Setting) -> Any:
    """A matrix along the last axis of every leaf and scales along the others."""
    if not setting.mapped:
        return None
    rng, axes = np.random.default_rng(0), {}
    for name, value in params.items():
        axes[name] = [10.0 ** rng.uniform(-2, 2, size) for size in value.shape]
        if value.ndim and name != CUTS[setting.shape]:
            root = rng.normal(size=(value.shape[-1],) * 2)
            axes[name][-1] = root @ root.T / len(root) + 0.01 * np.eye(len(root))
    return dp_ilg.AxisMaps.of(params, axes)


def random_batch(rng: Rng, params: Any, groups: Groups) -> Batch:
    """Magnitudes over 70 decades, by example and by entry; unlike weights."""

    def leaf(p: Any) -> np.ndarray:
        shape = (PAIRS, EXAMPLES, *p.shape)
        decades = rng.uniform(-37, 37, shape[:2] + (1,) * p.ndim)
        decades = decades + rng.uniform(-3, 3, shape)
        value = 10.0 ** np.clip(decades, -44, 38) * rng.choice([-1, 1], shape)
        return np.where(rng.random(shape) < 0.1, 0, value)

    return _batch(rng, params, groups, leaf)


def magnitudes(rng: Rng, params: Any, groups: Groups) -> Batch:
    """Only the extremes: denormal, smallest normal, one, 1e38, largest, zero."""
    values = np.array([0, DENORMAL, 1e-38, TINY, 1e-20, 1, 1e20, 1e37, 8e37, 3e38])

    def leaf(p: Any) -> np.ndarray:
        shape = (PAIRS, EXAMPLES, *p.shape)
        own = rng.choice(values, shape)
        alike = rng.choice(values, shape[:2] + (1,) * p.ndim)
        some = rng.random((PAIRS,) + (1,) * (p.ndim + 1)) < 0.5
        return np.where(some, own, alike) * rng.choice([-1, 1], shape)

    return _batch(rng, params, groups, leaf)


def cancelling(rng: Rng, params: Any, groups: Groups) -> Batch:
    """The last example undoes or outweighs the others."""

    def leaf(p: Any) -> np.ndarray:
        shared = rng.normal(size=(PAIRS, 1, *p.shape))
        own = rng.normal(size=(PAIRS, EXAMPLES, *p.shape)) * 1e-3
        sign = np.array([1.0, 1, 1, -1]).reshape(-1, *[1] * p.ndim)
        sizes = 10.0 ** rng.uniform(-6, 6, (PAIRS, EXAMPLES) + (1,) * p.ndim)
        return (shared + own) * sign * sizes

    return _batch(rng, params, groups, leaf)


def layers(rng: Rng, params: Any, groups: Groups) -> Batch:
    """Some layers huge, some zero, some denormal."""
    scales = np.array([0, 1e-44, 1e-30, 1, 1e30, 1e37])

    def leaf(p: Any) -> np.ndarray:
        scale = rng.choice(scales, (PAIRS, 1) + (1,) * p.ndim)
        return rng.normal(size=(PAIRS, EXAMPLES, *p.shape)) * scale

    return _batch(rng, params, groups, leaf)


def floor_and_ceiling(rng: Rng, params: Any, groups: Groups) -> Batch:
    """Weights at the two ends of their range, gradients near the bound in them."""
    plain = lambda p: rng.normal(size=(PAIRS, EXAMPLES, *p.shape))  # noqa: E731
    made = _batch(rng, params, groups, plain)
    ends = rng.choice([1.0, 1 / LARGEST_RATIO], (PAIRS, len(groups.names)))
    ends = ends * 10.0 ** rng.uniform(-4, 4, (PAIRS, 1))
    return made._replace(weights=jnp.asarray(ends, jnp.float32))


def boundary(rng: Rng, params: Any, groups: Groups) -> Batch:
    """Examples whose norm is C but for a few roundings, where min(1, C/|g|) turns."""
    plain = lambda p: rng.normal(size=(PAIRS, EXAMPLES, *p.shape))  # noqa: E731
    made = _batch(rng, params, groups, plain)
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(made.gradients)]
    weights = np.asarray(made.weights, np.float64)
    norm = np.sqrt(squares(groups, leaves, weights[:, None]))
    near = 1 + rng.choice([-1, 1], norm.shape) * 10.0 ** rng.uniform(-8, -4, norm.shape)
    factor = np.asarray(made.bound, np.float64)[:, None] * near / norm
    scaled = [x * factor.reshape(*factor.shape, *[1] * (x.ndim - 2)) for x in leaves]
    cast = [
        _cast(x, p.dtype) for x, p in zip(scaled, jax.tree.leaves(params), strict=True)
    ]
    tree = jax.tree.unflatten(jax.tree.structure(params), cast)
    return made._replace(gradients=tree)


STRATEGIES: dict[str, Callable[[Rng, Any, Groups], Batch]] = {
    "random": random_batch,
    "extreme magnitudes": magnitudes,
    "cancelling": cancelling,
    "huge and zero layers": layers,
    "weights at floor and ceiling": floor_and_ceiling,
    "norms at the bound": boundary,
}


def _batch(rng: Rng, params: Any, groups: Groups, leaf: Callable) -> Batch:
    gradients = jax.tree.map(lambda p: _cast(leaf(p), p.dtype), params)
    weights = np.exp(rng.normal(size=(PAIRS, len(groups.names))) * rng.uniform(0, 3))
    bound = 10.0 ** rng.uniform(-8, 8, PAIRS)
    return Batch(
        gradients, jnp.asarray(weights, jnp.float32), jnp.asarray(bound, jnp.float32)
    )


def _cast(value: np.ndarray, dtype: Any) -> Any:
    limit = float(jnp.finfo(dtype).max)
    return jnp.asarray(np.clip(value, -limit, limit), dtype)


def squares(groups: Groups, leaves: list, weights: np.ndarray) -> np.ndarray:
    """Squared weighted norms of trees with leading axes, in float64.

    `weights` has the leading axes, or ones, and then the groups.
    """
    lead = weights.ndim - 1
    total: Any = 0.0
    for leaf, value in zip(groups.leaves, leaves, strict=True):
        for start, stop, owner in pieces_of(leaf):
            cut = (slice(None),) * (lead + leaf.axis) + (slice(start, stop),)
            part = value[cut] if leaf.edges else value
            flat = part.reshape(*value.shape[:lead], -1) / weights[..., owner, None]
            total = total + np.sum(flat**2, axis=-1)
    return total


def ratios(setting: Setting, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """How far the sum moved, over C, and the layer shares, for every case."""
    _, groups, pair, _ = clippers(setting)
    one, other = pair(*batch)
    gaps = [
        np.asarray(a, np.float64) - np.asarray(b, np.float64)
        for a, b in zip(
            jax.tree.leaves(one.gradients),
            jax.tree.leaves(other.gradients),
            strict=True,
        )
    ]
    weights = np.asarray(batch.weights, np.float64)
    moved = np.sqrt(squares(groups, gaps, weights)) / np.asarray(
        batch.bound, np.float64
    )
    shares = np.linalg.norm(
        np.asarray(one.layer_shares, np.float64) - np.asarray(other.layer_shares),
        axis=1,
    )
    return moved, shares


def search(cases: int, seed: int, ascent: int = 8) -> dict[str, Any]:
    """Searches until so many cases are done.

    Args:
        cases: at least so many.
        seed: of everything.
        ascent: steps of gradient ascent from every eighth batch, each a case.

    Returns:
        Counts and the largest ratios, by strategy.
    """
    rng = np.random.default_rng(seed)
    worst = dict.fromkeys([*STRATEGIES, "gradient ascent"], 0.0)
    done, share, turn = dict.fromkeys(worst, 0), 0.0, 0
    settings = _settings(rng)
    while sum(done.values()) < cases:
        name = [*STRATEGIES][turn % len(STRATEGIES)]
        setting = settings[turn // len(STRATEGIES) % len(settings)]
        params, groups, _, climb = clippers(setting)
        batch, climbs = STRATEGIES[name](rng, params, groups), 0
        if turn % 8 == 0 and setting.dtype == "float32":
            climbs = ascent
        for climbed in range(climbs + 1):
            kind = "gradient ascent" if climbed else name
            if climbed:
                batch = batch._replace(gradients=climb(*batch))
            moved, shares = ratios(setting, batch)
            worst[kind] = max(worst[kind], _largest(moved))
            share = max(share, _largest(shares))
            done[kind] += PAIRS
        turn += 1
    return {
        "cases": sum(done.values()),
        "largest_ratio": max(worst.values()),
        "largest_share": share,
        "by_strategy": worst,
        "cases_by_strategy": done,
    }


def _largest(values: np.ndarray) -> float:
    """The largest; infinity if any is no number, which no case may be."""
    return float(np.max(np.nan_to_num(values, nan=np.inf)))


def _settings(rng: Rng) -> list[Setting]:
    """Some of all combinations, every value of each among them."""
    whole = [
        Setting(shape, dtype, mode, cut, mapped)
        for shape in SHAPES
        for dtype in DTYPES
        for mode in CLIP_MODES
        for cut in (False, True)
        for mapped in (False, True)
    ]
    return [whole[i] for i in rng.permutation(len(whole))[:24]]


def rounding(counts: tuple[int, ...] = (16, 256, 4096), size: int = 1000) -> dict:
    """Largest ratio for sums of many examples that all point the same way."""
    params = {"w": jnp.zeros(size)}
    geometry = dp_ilg.Geometry.uniform(params)
    rng, found = np.random.default_rng(0), {}
    for count in counts:
        shared = rng.normal(size=(1, size))
        gradients = jnp.asarray(
            shared + rng.normal(size=(count, size)) / 10, jnp.float32
        )
        engine = from_gradients({"w": gradients}, geometry.groups)
        sums = [
            clip_sum(engine, geometry, 1.0, as_clip_mode("joint"), jnp.asarray(mask))
            for mask in (np.zeros(count, bool), np.arange(count) == count - 1)
        ]
        one, other = (np.asarray(s.gradients["w"], np.float64) for s in sums)
        found[str(count)] = float(np.linalg.norm(one - other))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = search(args.cases, args.seed)
    found["sums_of_many_aligned_examples"] = rounding()
    command = f"python benchmarks/trust/sensitivity.py --cases {args.cases}"
    record = found | machine() | {"seed": args.seed, "command": command}
    print(json.dumps(record))
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
    if found["largest_ratio"] > LIMIT or found["largest_share"] > LIMIT:
        raise SystemExit("The bound is broken.")


if __name__ == "__main__":
    main()
