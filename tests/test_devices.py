"""On many devices: one noise on the global array, the same bits as on one device."""

import json
import os
import subprocess
import sys

PROGRAM = """
import functools, json
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import dp_ilg

plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_examples=1000,
    batch_size=64, num_steps=4, score_budget=0.1)
tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(3))
loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["a"]) @ p["b"]) ** 2
grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=0.1)
batch = jax.random.normal(jax.random.key(0), (64, 16))

def fresh():
    return {"a": jnp.ones((16, 800)) / 16, "b": jnp.ones((800, 2)) / 30}

@jax.jit
def step(params, state, x):
    clipped = grad_fn(params, x, geometry=tx.geometry(state))
    updates, state = tx.update(clipped, state, params)
    return optax.apply_updates(params, updates), state

@jax.jit
def release(params, x):
    noise = dp_ilg.add_importance_noise(plan, key=jax.random.key(9))
    clipped = grad_fn(params, x, geometry=dp_ilg.Geometry.uniform(params))
    quiet = jax.tree.map(jnp.zeros_like, clipped.gradients)
    import dataclasses
    clipped = dataclasses.replace(clipped, gradients=quiet)
    return noise.update(clipped, noise.init(params))[0]

mesh = Mesh(np.array(jax.devices()), ("data",))
rows = NamedSharding(mesh, P("data"))
cases = {
    "one": (lambda t: jax.device_put(t, jax.devices()[0]), batch),
    "data": (lambda t: jax.device_put(t, NamedSharding(mesh, P())),
             jax.device_put(batch, rows)),
    "fsdp": (lambda t: jax.device_put(t, rows), jax.device_put(batch, rows)),
}
out = {"devices": jax.device_count()}
for name, (put, x) in cases.items():
    params, state = put(fresh()), tx.init(fresh())
    for _ in range(3):
        params, state = step(params, state, x)
    noise = release(put(fresh()), x)
    out[name] = [np.asarray(params["a"]).tolist(), np.asarray(noise["a"]).tolist()]
sigma = plan.gradient_noise_multipliers[0] * 0.1 / 64
flat = {k: [np.array(v) for v in out[k]] for k in cases}
one = flat["one"]
print(json.dumps({
    "devices": jax.device_count(),
    "params": max(float(np.abs(flat[k][0] - one[0]).max()) for k in cases),
    "noise_equal": all(bool(np.array_equal(flat[k][1], one[1])) for k in cases),
    "std_ratio": float(np.std(flat["data"][1]) / sigma),
}))
"""


def test_eight_devices_give_the_one_device_run():
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout.strip().splitlines()[-1])
    assert got["devices"] == 8
    assert got["noise_equal"], "noise differs between meshes"
    assert 0.97 < got["std_ratio"] < 1.03
    assert got["params"] < 1e-5
