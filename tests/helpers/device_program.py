"""Run under simulated devices by test_devices.py: prints what it found as JSON."""

import dataclasses
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import dp_ilg
from dp_ilg.noise.normal import normal_steps, sharded_draws
from dp_ilg.training import mesh as meshes
from dp_ilg.training.step import make_train_step

ROWS, GROUPS = 64, 4
PARAMS = {
    "a": jnp.ones((8, 32)) / 16,
    "b": jnp.ones((32, 3)) / 30,
    "c": jnp.zeros(32),
    "d": jnp.zeros((5, 3)),  # no axis that 2, 4 or 8 divides
}
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
PLAN = dp_ilg.plan_privacy(
    noise_multiplier=1.0,
    delta=1e-5,
    num_examples=1000,
    batch_size=ROWS,
    num_steps=4,
    score_budget=0.1,
)


def loss(params, x):
    hidden = jnp.tanh(x @ params["a"] + params["c"])
    return jnp.sum(hidden @ params["b"]) ** 2 + jnp.sum(params["d"] * x[0])


def collectives(text):
    """Numbers that each kind of collective yields, summed over a compiled program."""
    found = {}
    for types, kind in COLLECTIVE.findall(text):
        sizes = re.findall(r"(?:f64|f32|u32|s32|u8|pred)\[([\d,]*)\]", types)
        total = sum(int(np.prod([int(n) for n in s.split(",") if n])) for s in sizes)
        found[kind] = found.get(kind, 0) + total
    return found


def batch():
    return jax.random.normal(jax.random.key(0), (ROWS, 8)), jnp.arange(ROWS) >= 60


def prepared(shape, engine, plan=PLAN):
    """The step, and its arguments, on a mesh; on one device for no shape."""
    tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(3))
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=0.1, engine=engine)
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    if shape is None:
        return make_train_step(grad_fn, tx), params, state, batch()
    mesh = meshes.make_mesh(*shape)
    at = meshes.Shardings.of(params, state, mesh)
    params, state = meshes.placed((params, state), (at.params, at.state))
    rows = jax.device_put(batch(), at.rows)
    return make_train_step(meshes.spread(grad_fn, mesh), tx, at), params, state, rows


def compiled(shape, engine):
    """The compiled step: every jitted function is caught as it is made."""
    real, made = jax.jit, []
    jax.jit = lambda f, **options: made.append(real(f, **options)) or made[-1]
    try:
        _, params, state, rows = prepared(shape, engine)
    finally:
        jax.jit = real
    step = next(f for f in made if f.__name__ == "whole")
    return str(step.lower(params, state, *rows).compile().as_text())


def ordinary(shape):
    """What an ordinary data-parallel Adam step of the same model communicates."""
    mesh = meshes.make_mesh(*shape)
    tx = optax.adam(1e-2)
    state = tx.init(PARAMS)
    at = meshes.Shardings.of(PARAMS, state, mesh)

    def step(params, state, x, mask):
        mean = lambda p: jnp.mean(jax.vmap(loss, (None, 0))(p, x))  # noqa: E731
        updates, state = tx.update(jax.grad(mean)(params), state, params)
        return optax.apply_updates(params, updates), state

    told, _ = at.jit_options()
    return jax.jit(step, **told).lower(PARAMS, state, *batch()).compile().as_text()


def trained(shape, engine, quick, plan=PLAN):
    step, params, state, rows = prepared(shape, engine, plan)
    for chunks in ([rows], [rows], [rows] if quick else [rows, rows]):
        params, state = step(params, state, chunks)
    return meshes.whole(params)


def correlated():
    """Noise that cancels: the run of one device, and where its memory lies."""
    plan = dataclasses.replace(PLAN, strategy=(1.0, 0.75, 0.5))
    one, got = (trained(shape, "vmap", True, plan) for shape in (None, (2, 4)))
    _, _, state, _ = prepared((2, 4), "vmap", plan)
    (memory,) = [part.memory for part in state if hasattr(part, "memory")]
    gaps = [float(np.abs(np.asarray(got[k]) - one[k]).max()) for k in got]
    cut = [not x.is_fully_replicated for x in jax.tree.leaves(memory)]
    return {"apart": max(gaps), "cut": cut, "rows": memory["a"].shape[0]}


def noise(shards):
    """Draws on a mesh, and those of one device."""
    leaves = [jnp.zeros((16, 24)), jnp.zeros((3, 8, 40)), jnp.zeros(8), jnp.zeros(5)]
    mesh, key = meshes.make_mesh(1, shards), jax.random.key(7)
    lying = meshes.param_shardings(leaves, mesh)
    places = [s if len(s.spec) else None for s in lying]

    def draw(key):
        with sharded_draws(places):
            return normal_steps(key, leaves)

    drawn = jax.jit(draw, out_shardings=lying)
    text = str(drawn.lower(key).compile().as_text())
    plain = normal_steps(key, leaves)
    same = [
        bool((np.asarray(a) == b).all()) for a, b in zip(drawn(key), plain, strict=True)
    ]
    return {
        "same": same,
        "cut": [s is not None for s in places],
        "collectives": collectives(text),
        "whole": len(re.findall(r"[fsu]32\[(?:16,24|384|3,8,40|960)\]", text)),
    }


def main(quick):
    engines = ["vmap"] if quick else ["vmap", "bookkeeping"]
    shapes = [(2, 4)] if quick else [(1, 1), (2, 1), (4, 1), (8, 1), (1, 8), (4, 2)]
    one = {engine: trained(None, engine, quick) for engine in engines}
    apart = {}
    for engine in engines:
        for shape in shapes:
            got = trained(shape, engine, quick)
            apart[f"{engine} {shape}"] = max(
                float(np.abs(np.asarray(got[k]) - one[engine][k]).max()) for k in got
            )
    moved = float(jnp.abs(one["vmap"]["a"] - PARAMS["a"]).max())
    found = {"devices": jax.device_count(), "apart": apart, "moved": moved}
    found["correlated"] = correlated()
    found["noise"] = {n: noise(n) for n in ([8] if quick else [1, 2, 4, 8])}
    for name, shape in {"replicated": (8, 1), "cut": (1, 8), "both": (2, 4)}.items():
        if quick and name == "both":
            continue
        for engine in engines:
            found[f"{name} {engine}"] = collectives(compiled(shape, engine))
    found["ordinary"] = collectives(ordinary((8, 1)))
    print(json.dumps(found))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
