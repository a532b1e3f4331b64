"""Sums over meshes of one, two and four devices have the bits of one device."""

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import dp_ilg
from dp_ilg.clipping.lots import sum_over_axis
from dp_ilg.training import mesh as meshes
from dp_ilg.training.mesh_rows import place_rows
from tests.helpers.mapped import random_maps

ROWS = 64
SHAPES = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2)]
MAPPED = [(2, 1), (2, 2)]


def loss(params, example):
    ids, y = example
    hidden = jnp.mean(params["table"][ids], axis=0)
    return jnp.sum(jnp.tanh(hidden @ params["w"] + params["b"]) * y)


def prepared():
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
        "b": jnp.zeros(4),
        "table": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32),
    }
    batch = rng.integers(0, 16, (ROWS, 6)), rng.normal(size=(ROWS, 4)).astype("f4")
    metrics = {"loss": dp_ilg.Metric(lambda loss, aux: loss, -1.0, 1.0)}
    facts: Any = dict(microbatch_size=8, metrics=metrics)
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=0.3, **facts)
    return params, batch, np.arange(ROWS) % 5 == 2, grad_fn


def same(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def found():
    """For every mesh, whether `spread` and `sum_over_axis` give one device's bits."""
    params, batch, mask, grad_fn = prepared()
    geometry = dp_ilg.Geometry.uniform(params, layers="leaf")
    facts = dict(geometry=geometry)
    run = jax.jit(lambda p, b, m: grad_fn(p, b, is_padding_example=m, **facts))
    alone = run(params, batch, mask)
    out = {}
    for shape in SHAPES:
        mesh = meshes.make_mesh(*shape)
        spread = meshes.spread(grad_fn, mesh)
        call = jax.jit(lambda p, b, m, f=spread: f(p, b, is_padding_example=m, **facts))
        out[f"spread {shape}"] = same(alone, call(params, batch, mask))

        def own(p, b, m):
            part = grad_fn(p, b, is_padding_example=m, **facts)
            plain = jax.lax.psum(part.gradients, meshes.AXES)
            return sum_over_axis(part, meshes.AXES), plain

        rows = P(meshes.AXES)
        call = jax.shard_map(
            own, mesh=mesh, in_specs=(P(), rows, rows), out_specs=P(), check_vma=False
        )
        exact, plain = jax.jit(call)(params, batch, mask)
        out[f"axis {shape}"] = same(alone, exact)
        out[f"plain {shape}"] = same(alone.gradients, plain)

    def unlike(p, b, m):
        bound = 0.3 + jax.lax.axis_index("replicas")
        part = dp_ilg.clipped_grad(loss, l2_clip_norm=0.3)(
            p, b, is_padding_example=m, **facts
        )
        return sum_over_axis(
            dataclasses.replace(part, l2_clip_norm=jnp.float32(bound)), meshes.AXES
        ).l2_clip_norm

    maps = random_maps(params, "matrices")
    mapped = dataclasses.replace(geometry, coordinates=maps)
    for shape in MAPPED:
        spread = meshes.spread(grad_fn, meshes.make_mesh(*shape))
        one, many = (
            jax.jit(
                lambda g, f=f: f(params, batch, geometry=g, is_padding_example=mask)
            )
            for f in (grad_fn, spread)
        )
        out[f"mapped {shape}"] = same(one(mapped), many(mapped))

    mesh = meshes.make_mesh(2, 1)
    call = jax.shard_map(
        unlike,
        mesh=mesh,
        in_specs=(P(), P(meshes.AXES), P(meshes.AXES)),
        out_specs=P(),
        check_vma=False,
    )
    out["unlike"] = bool(np.isnan(jax.jit(call)(params, batch, mask)))
    return out


def test_one_two_and_four_devices_give_the_same_bits():
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.test_exact_meshes"],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout.strip().splitlines()[-1])
    exact = [value for key, value in got.items() if not key.startswith("plain")]
    assert len(exact) == 2 * len(SHAPES) + len(MAPPED) + 1 and all(exact), got
    plain = [v for k, v in got.items() if k.startswith("plain") and k != "plain (1, 1)"]
    assert not all(plain), "ordinary sums would have passed, too"


def digest(process, processes, port):
    """Of what a mesh of all processes' devices sums, each reading its own rows."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", processes, process)
    params, batch, mask, grad_fn = prepared()
    mesh = meshes.make_mesh(jax.device_count(), 1)
    geometry = dp_ilg.Geometry.uniform(params, layers="leaf")
    own = slice(process * ROWS // processes, (process + 1) * ROWS // processes)
    rows = place_rows(mesh, jax.tree.map(lambda x: x[own], (batch, mask)))
    spread = meshes.spread(grad_fn, mesh)
    run = jax.jit(lambda p, b, m: spread(p, b, geometry=geometry, is_padding_example=m))
    total = run(meshes.placed(params, meshes.param_shardings(params, mesh)), *rows)
    fields = total.gradients, total.remainder, total.fine, total.layer_shares
    fields += (total.metrics,)
    arrays = [x.addressable_data(0) for x in jax.tree.leaves(fields)]
    content = b"".join(np.asarray(x).tobytes() for x in arrays)
    return hashlib.sha256(content).hexdigest()


def digests(processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.test_exact_meshes"]
            + [str(x) for x in (process, processes, port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        for process in range(processes)
    ]
    outs = [process.communicate(timeout=300) for process in started]
    assert all(p.returncode == 0 for p in started), outs[0][1][-2000:]
    return [json.loads(out.strip().splitlines()[-1]) for out, _ in outs]


@pytest.mark.slow
def test_two_processes_give_the_bits_of_one():
    (one,), both = digests(1), digests(2)
    assert both == [one, one]


if __name__ == "__main__":
    numbers = [int(x) for x in sys.argv[1:]]
    print(json.dumps(digest(*numbers) if numbers else found()))
