"""A search for an example whose norm is larger than the norm it is clipped by.

    python benchmarks/trust/norm_bounds.py --cases 300000 --out norm_bounds.jsonl
    python benchmarks/trust/norm_bounds.py --cases 3000 --rule quarter

A case is one example, set at will through a loss that is linear in a layer's output.
Its true norm is taken in float64 from the float32 terms (from the formed gradient where
the engine forms it) and divided by the norm that the engine found: never above 1.
Families of terms that repeat and cancel, sequences up to 1,024, and an ascent on the
ratio. A line is a block of cases; a run that finds its file continues it. The negative
control ``--rule quarter`` searches with the guard that was guessed, and breaks it.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dp_ilg
from dp_ilg.clipping.bookkeeping import cost
from dp_ilg.clipping.bookkeeping.engine import find_paths
from dp_ilg.clipping.engine_table import ENGINES
from dp_ilg.geometry.groups import Groups, pieces_of

BATCH, STEPS = 32, 12
Rng = np.random.Generator


class Setting(NamedTuple):
    """A layer, its length and widths, the axis its leaf is cut along, the engine."""

    layer: str
    terms: int
    first: int
    second: int
    cut: int | None = None
    engine: str = "bookkeeping"


SETTINGS = {
    "one term": Setting("dense", 1, 200, 40),
    "few, 2": Setting("dense", 2, 48, 32),
    "few, 5": Setting("dense", 5, 96, 24, 1),
    "few, 8": Setting("dense", 8, 64, 64, 0),
    "gram, 9": Setting("dense", 9, 64, 64),
    "gram, 20": Setting("dense", 20, 64, 64),
    "gram, 24, cut": Setting("dense", 24, 130, 100, 0),
    "gram, 32": Setting("dense", 32, 256, 220),
    "formed, 64": Setting("dense", 64, 24, 16),
    "formed, 256": Setting("dense", 256, 16, 12, 1),
    "formed, 1024": Setting("dense", 1024, 12, 8),
    "vmap, 64": Setting("dense", 64, 48, 32, 0, "vmap"),
    "rows, 5": Setting("rows", 5, 16, 12, 0),
    "rows, 64": Setting("rows", 64, 24, 16, 1),
    "rows, 1024": Setting("rows", 1024, 40, 12),
    "tied, 12": Setting("tied", 12, 40, 24),
    "pooled, 128": Setting("pooled", 128, 8, 60, 0),
}


def loss_of(layer: str) -> Callable:
    """Linear in the output of a layer, with what multiplies it in the example."""
    return {
        "dense": lambda p, e: jnp.sum((e["x"] @ p["w"]) * e["y"]),
        "rows": lambda p, e: jnp.sum(p["w"][e["ids"]] * e["y"]),
        "tied": lambda p, e: (
            jnp.sum(p["w"][e["ids"]] * e["y"]) + jnp.sum((e["x"] @ p["w"]) * e["z"])
        ),
        "pooled": lambda p, e: jnp.sum(
            (jax.nn.relu(e["y"] + p["w"]) + p["v"]) * e["y"]
        ),
    }[layer]


class Scene(NamedTuple):
    """What is compiled once for a setting.

    Attributes:
        groups: of its parameters.
        run: maps a batch to norms and, where they are formed, gradients.
        slope: of the logarithms of the norms, with regard to the batch.
        formed: whether the terms are the gradients that the engine formed.
    """

    groups: Groups
    run: Callable
    slope: Callable
    formed: bool


@functools.cache
def scene(setting: Setting) -> Scene:
    """Compiles a setting."""
    params = {"w": jnp.zeros((setting.first, setting.second))}
    if setting.layer == "pooled":
        params = {"w": jnp.zeros(setting.second), "v": jnp.zeros(setting.second)}
    layers: Any = "leaf"
    if setting.cut is not None:
        edge = params["w"].shape[setting.cut] // 3
        cut = dp_ilg.layers.blocks("w", axis=setting.cut, edges=[edge])
        layers = dp_ilg.layers.by_leaf(cut)
    groups = dp_ilg.layers.group(params, layers)
    loss, engine = loss_of(setting.layer), ENGINES[setting.engine]
    shape = draw(np.random.default_rng(0), setting, "normal")
    paths = find_paths(loss, params, shape, groups)
    held = [part for part in paths.parts if not cost.forms_gradient(part)]
    formed = setting.engine != "bookkeeping" or not held

    def norms(batch: Any) -> Any:
        return engine(loss, params, batch, groups).norms

    def run(batch: Any) -> tuple[Any, Any]:
        found = engine(loss, params, batch, groups)
        alone = jax.vmap(found.weighted_sum)(jnp.eye(BATCH)) if formed else None
        return found.norms, alone

    def lengths(floats: Any, ids: Any) -> Any:
        return jnp.sum(jnp.log(jnp.maximum(norms(floats | ids), 1e-30)))

    return Scene(groups, jax.jit(run), jax.jit(jax.grad(lengths)), formed)


def terms_like(rng: Rng, shape: tuple[int, ...], kind: str) -> Any:
    """Terms ``[batch, terms, entries]`` of a family, all of one vector or nearly."""
    value = rng.normal(size=shape)
    base = rng.normal(size=(shape[0], 1, shape[2]))
    apart = 10.0 ** rng.uniform(-7, -1, (shape[0], 1, 1))
    if kind == "repeated":
        return base * np.ones(shape)
    if kind == "near":
        return base + apart * value
    if kind == "alternating":
        odd = (np.arange(shape[1]) % 2)[None, :, None]
        return base + odd * apart * rng.normal(size=base.shape)
    if kind == "blank":
        blank = rng.random((*shape[:2], 1)) < rng.uniform(0.3, 1)
        return np.where(blank, base, apart * value)
    if kind == "decades":
        return value * 10.0 ** rng.uniform(-6, 6, (*shape[:2], 1))
    return value


def cancelled(rng: Rng, value: Any, kind: str) -> Any:
    """Signs, and a last term, with which terms of the other factor add up to little."""
    terms = value.shape[1]
    sign = np.where(np.arange(terms) % 2 == 0, 1.0, -1.0)[None, :, None]
    if kind == "signs":
        return sign * value
    if kind == "ranking":
        pairs = np.repeat(value[:, : (terms + 1) // 2], 2, axis=1)[:, :terms]
        return sign * pairs
    left = 10.0 ** rng.uniform(-8, -1, (value.shape[0], 1))
    value[:, -1] = -(1 + left) * value[:, :-1].sum(axis=1)
    return value


FAMILIES = {
    "normal": ("normal", "normal", None),
    "repeated, last undoes": ("repeated", "normal", "last"),
    "repeated, signs": ("repeated", "near", "signs"),
    "one token": ("repeated", "repeated", "signs"),
    "alternating": ("alternating", "repeated", "signs"),
    "ranking": ("near", "normal", "ranking"),
    "blank patches": ("blank", "blank", "last"),
    "near, last undoes": ("near", "near", "last"),
    "near, signs": ("near", "near", "signs"),
    "decades": ("decades", "decades", None),
}


def draw(rng: Rng, setting: Setting, family: str) -> dict[str, Any]:
    """A batch of a family, as the loss of the setting takes it."""
    one, two, undo = FAMILIES[family]
    x = terms_like(rng, (BATCH, setting.terms, setting.first), one)
    y = terms_like(rng, (BATCH, setting.terms, setting.second), two)
    if undo and setting.terms > 1:
        y = cancelled(rng, y, undo)
    size = 10.0 ** rng.uniform(-12, 12, (BATCH, 1, 1))
    found = {"x": x, "y": y * size}
    if setting.layer in ("rows", "tied"):
        few = rng.integers(1, setting.first)
        ids = rng.integers(0, few, (BATCH, setting.terms))
        found["ids"] = np.where(one == "repeated", ids[:, :1], ids).astype(np.int32)
    if setting.layer == "tied":
        found["z"] = -found["y"][:, ::-1]
    wide = {k: v for k, v in found.items() if k in NEEDED[setting.layer]}
    return {k: v if k == "ids" else v.astype(np.float32) for k, v in wide.items()}


NEEDED = {"dense": "xy", "rows": ("ids", "y"), "tied": ("ids", *"xyz"), "pooled": "y"}


def gradients(setting: Setting, batch: dict[str, Any]) -> Any:
    """The gradient of ``w`` in float64, from the float32 terms."""
    wide = {k: v if k == "ids" else np.float64(v) for k, v in batch.items()}
    total = np.zeros((BATCH, setting.first, setting.second))
    if "ids" in wide:
        place = np.arange(BATCH)[:, None]
        np.add.at(total, (place, wide["ids"]), wide["y"])
    if "x" in wide:
        total += np.swapaxes(wide["x"], 1, 2) @ wide["z" if "z" in wide else "y"]
    return total


def true_norms(groups: Groups, leaves: list[Any]) -> Any:
    """Norms of every example's groups in float64, ``[batch, groups]``."""
    square = np.zeros((BATCH, len(groups.names)))
    for leaf, value in zip(groups.leaves, leaves, strict=True):
        for start, stop, owner in pieces_of(leaf):
            cut = (slice(None),) * (1 + leaf.axis) + (slice(start, stop),)
            part = np.float64(value[cut] if leaf.edges else value).reshape(BATCH, -1)
            square[:, owner] += np.sum(part**2, axis=1)
    return np.sqrt(square)


def proven(setting: Setting, batch: dict[str, Any]) -> Any:
    """True over computed norm, the largest of an example's groups, as it stands."""
    found, alone = scene(setting).run(batch)
    leaves = jax.tree.leaves(alone) if alone else [gradients(setting, batch)]
    true = true_norms(scene(setting).groups, [np.asarray(x) for x in leaves])
    found = np.asarray(found, np.float64)
    return np.max(np.where(true > 0, true / np.where(true > 0, found, 1), 0), axis=1)


@jax.jit
def _quarter(x: Any, y: Any) -> Any:
    exact = jax.lax.Precision.HIGHEST
    a, b = (jnp.einsum("bta,bsa->bts", z, z, precision=exact) for z in (x, y))
    diagonal = lambda z: jnp.diagonal(z, axis1=1, axis2=2)  # noqa: E731
    sizes = jnp.sqrt(diagonal(a) * diagonal(b))
    alike = jnp.square(jnp.sum(sizes, axis=1))
    reach = alike + 8 * jnp.sum(jnp.square(sizes), axis=1)
    slack = 0.25 * jnp.finfo(jnp.float32).eps * reach
    return jnp.sqrt(jnp.maximum(jnp.sum(a * b, axis=(1, 2)), 0) + slack)


def quarter(setting: Setting, batch: dict[str, Any]) -> Any:
    """The same for Gram products and the guard of a quarter, which was guessed."""
    tops = {k: np.abs(v).max(axis=(1, 2), keepdims=True) for k, v in batch.items()}
    scaled = {k: v / tops[k] for k, v in batch.items()}
    true = np.linalg.norm(gradients(setting, scaled).reshape(BATCH, -1), axis=1)
    return true / np.asarray(_quarter(scaled["x"], scaled["y"]), np.float64)


RULES = {"proven": proven, "quarter": quarter}


def climbed(rng: Rng, setting: Setting, batch: dict, rule: Any) -> Iterator[Any]:
    """Steps up the ratio: along its slope, with a shake; kept where it rises."""
    best = rule(setting, batch)
    for _ in range(STEPS):
        tried = _moved(rng, setting, batch)
        ratio = rule(setting, tried)
        better = ratio > best
        batch = {
            k: np.where(better.reshape(-1, *[1] * (v.ndim - 1)), tried[k], v)
            for k, v in batch.items()
        }
        best = np.maximum(best, ratio)
        yield ratio


def _moved(rng: Rng, setting: Setting, batch: dict[str, Any]) -> dict[str, Any]:
    floats = {k: v for k, v in batch.items() if k != "ids"}
    rest = {k: v for k, v in batch.items() if k == "ids"}
    down = scene(setting).slope(floats, rest)
    up = _true_slope(setting, batch)
    out = dict(batch)
    for name, value in floats.items():
        size = np.sqrt(
            np.mean(np.square(np.float64(value)), axis=(1, 2), keepdims=True)
        )
        slope = up.get(name, 0) - np.nan_to_num(np.asarray(down[name], np.float64))
        top = np.abs(slope).max(axis=(1, 2), keepdims=True)
        shake = rng.normal(size=value.shape) * 10.0 ** rng.uniform(-8, -1)
        step = 10.0 ** rng.uniform(-7, -1) * slope / np.where(top > 0, top, 1)
        out[name] = (value + size * (step + shake)).astype(np.float32)
    return out


def _true_slope(setting: Setting, batch: dict[str, Any]) -> dict[str, Any]:
    """Slope of the logarithm of the true norm, in float64, for dense layers."""
    if setting.layer != "dense":
        return {}
    whole = gradients(setting, batch)
    square = np.sum(whole**2, axis=(1, 2), keepdims=True)
    whole = whole / np.where(square > 0, square, 1)
    x, y = np.float64(batch["x"]), np.float64(batch["y"])
    return {"x": y @ np.swapaxes(whole, 1, 2), "y": x @ whole}


def block(name: str, number: int, rule: str) -> dict[str, Any]:
    """One block: every family of a setting once, and an ascent from one of them.

    Args:
        name: of the setting.
        number: of the block; it seeds the draws.
        rule: "proven" or "quarter".

    Returns:
        Counts and the largest ratio of every family, as a line of the record.
    """
    rng = np.random.default_rng([number, len(name), SETTINGS[name].terms])
    setting, ratio = SETTINGS[name], RULES[rule]
    largest, cases = {}, 0
    for family in FAMILIES:
        largest[family] = float(np.max(ratio(setting, draw(rng, setting, family))))
        cases += BATCH
    start = draw(rng, setting, [*FAMILIES][number % len(FAMILIES)])
    steps = list(climbed(rng, setting, start, ratio))
    largest["ascent"] = float(np.max(steps))
    cases += BATCH * len(steps)
    return {
        "setting": name,
        "block": number,
        "rule": rule,
        "cases": cases,
        "largest_ratio": max(largest.values()),
        "by_family": largest,
    }


def search(cases: int, rule: str = "proven", out: Path | None = None) -> list[dict]:
    """Blocks of all settings in turn until so many cases are there.

    Args:
        cases: at least so many, those of `out` included.
        rule: "proven" or "quarter", which has Gram products only.
        out: a file of lines to continue.

    Returns:
        The blocks.
    """
    done = [json.loads(x) for x in out.read_text().splitlines()] if _is(out) else []
    done = [line for line in done if line.get("rule") == rule]
    there = {(line["setting"], line["block"]) for line in done}
    names = [n for n in SETTINGS if rule == "proven" or n.startswith(("gram", "few"))]
    number = 0
    while sum(line["cases"] for line in done) < cases:
        for name in names:
            if (name, number) not in there:
                done.append(block(name, number, rule))
                _write(out, done[-1])
        number += 1
    return done


def _is(path: Path | None) -> bool:
    return path is not None and path.exists()


def _write(out: Path | None, line: dict[str, Any]) -> None:
    if out is not None:
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    """Searches and prints the summary, which is the last line of the record."""
    from dp_ilg.experiments.papers.reproduce import machine

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300_000)
    parser.add_argument("--rule", choices=[*RULES], default="proven")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    done = search(args.cases, args.rule, args.out)
    worst = max(done, key=lambda line: line["largest_ratio"])
    command = f"python benchmarks/trust/norm_bounds.py --cases {args.cases}"
    summary = {
        "summary": args.rule,
        "cases": sum(line["cases"] for line in done),
        "largest_ratio": worst["largest_ratio"],
        "where": worst["setting"],
        "by_setting": {
            name: max(x["largest_ratio"] for x in done if x["setting"] == name)
            for name in {line["setting"] for line in done}
        },
        "command": f"{command} --rule {args.rule}",
        **machine(),
    }
    print(json.dumps(summary))
    _write(args.out, summary)
    if args.rule == "proven" and not worst["largest_ratio"] <= 1:
        raise SystemExit("A norm is too small.")


if __name__ == "__main__":
    main()
