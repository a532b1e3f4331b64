"""Weak and strong scaling of a private step, and what its devices send each other.

    python benchmarks/speed/scaling.py --out benchmarks/results/scaling.jsonl
    python benchmarks/speed/scaling.py --toy --out scaling.jsonl

Each row is a team: processes pinned to one core each that sum over TCP (Gloo), or
simulated devices of one process. Strong scaling shares one batch, weak scaling gives
every device a batch of its own. Beside the time of a step (median) a row has the bytes
that the collectives of the compiled step yield, and those of an ordinary data-parallel
Adam step of the same model. Times say little where there are fewer free cores than
devices: `load` is the load average before the row.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)
BYTES = {"f32": 4, "u32": 4, "s32": 4, "pred": 1, "u8": 1}


def sent(text: str) -> dict[str, int]:
    """Bytes that each kind of collective yields on one device, over a program."""
    found: dict[str, int] = {}
    for types, kind in COLLECTIVE.findall(text):
        for dtype, shape in re.findall(r"(f32|u32|s32|pred|u8)\[([\d,]*)\]", types):
            size = BYTES[dtype] * prod(int(n) for n in shape.split(",") if n)
            found[kind] = found.get(kind, 0) + size
    return found


def work(row: dict[str, Any]) -> None:
    """One process of a team; number 0 prints what it measured."""
    if row["pinned"]:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[row["process"] % len(cores)]})
    from dp_ilg.experiments.runs.hosts import Devices, joined

    address = f"127.0.0.1:{row['port']}" if row["processes"] > 1 else None
    devices = Devices(
        replicas=row["devices"] // row["shards"],
        shards=row["shards"],
        coordinator=address,
        processes=row["processes"],
        process=row["process"],
    )
    with joined(devices) as hosts:
        found = measure(row, devices.mesh())
    if hosts.leads:
        print(json.dumps(found))


def measure(row: dict[str, Any], mesh: Any) -> dict[str, Any]:
    import jax
    import numpy as np

    from dp_ilg.training.mesh import Shardings, placed
    from dp_ilg.training.mesh_rows import place_rows

    params = model(row["widths"])
    tx = optimizer()
    state = tx.init(params)
    at = Shardings.of(params, state, mesh)
    step = private_step(tx, mesh, at)
    compiled = jax.jit(step, donate_argnums=(0, 1), **at.jit_options()[0])
    dice = np.random.default_rng(0)
    share = row["batch"] // row["processes"]
    x = dice.normal(size=(share, row["widths"][0])).astype(np.float32)
    y = dice.integers(row["widths"][-1], size=share).astype(np.int32)
    batch, mask = place_rows(mesh, ((x, y), np.zeros(share, bool)))
    plain = ordinary_sent(params, batch, mask, mesh)
    params, state = placed((params, state), (at.params, at.state))
    run = compiled.lower(params, state, batch, mask).compile()
    times = []
    for _ in range(row["repeats"] + 2):
        began = time.perf_counter()
        params, state = jax.block_until_ready(run(params, state, batch, mask))
        times.append(1e3 * (time.perf_counter() - began))
    return {
        "step_ms": round(median(times[2:]), 3),
        "sent_bytes": sent(str(run.as_text())),
        "ordinary_sent_bytes": plain,
        "num_params": sum(p.size for p in jax.tree.leaves(params)),
    }


def model(widths: tuple[int, ...]) -> Any:
    import jax.numpy as jnp

    pairs = zip(widths, widths[1:], strict=False)
    return {
        f"layer{i}": {"kernel": jnp.ones((n, m)) / n, "bias": jnp.zeros(m)}
        for i, (n, m) in enumerate(pairs)
    }


def loss(params: Any, example: Any) -> Any:
    import jax.numpy as jnp
    import optax

    x, y = example
    *hidden, last = [params[name] for name in sorted(params)]
    for layer in hidden:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    logits = x @ last["kernel"] + last["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def optimizer() -> Any:
    import jax

    import dp_ilg

    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0,
        delta=1e-6,
        num_examples=100_000,
        batch_size=1000,
        num_steps=1000,
        accountant="rdp",
    )
    return dp_ilg.dp_adam_ilg(1e-3, plan, key=jax.random.key(0))


def private_step(tx: Any, mesh: Any, at: Any) -> Any:
    import optax

    import dp_ilg
    from dp_ilg.training.mesh import spread

    grad_fn = spread(dp_ilg.clipped_grad(loss, l2_clip_norm=1.0), mesh)

    def step(params: Any, state: Any, batch: Any, mask: Any) -> Any:
        geometry = tx.geometry(state)
        clipped = grad_fn(params, batch, geometry=geometry, is_padding_example=mask)
        with at.draws():
            updates, state = tx.update(clipped, state, params)
        return optax.apply_updates(params, updates), state

    return step


def ordinary_sent(params: Any, batch: Any, mask: Any, mesh: Any) -> dict[str, int]:
    import jax
    import jax.numpy as jnp
    import optax

    from dp_ilg.training.mesh import Shardings

    tx = optax.adam(1e-3)
    state = tx.init(params)

    def step(params: Any, state: Any, batch: Any, mask: Any) -> Any:
        mean = lambda p: jnp.mean(jax.vmap(loss, (None, 0))(p, batch))  # noqa: E731
        updates, state = tx.update(jax.grad(mean)(params), state, params)
        return optax.apply_updates(params, updates), state

    told = Shardings.of(params, state, mesh).jit_options()[0]
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, state)
    )
    run = jax.jit(step, **told).lower(*shapes, batch, mask).compile()
    return sent(str(run.as_text()))


def team(row: dict[str, Any]) -> dict[str, Any]:
    """Runs all processes of a row."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        row["port"] = server.getsockname()[1]
    each = row["devices"] // row["processes"]
    flags = f"--xla_force_host_platform_device_count={each}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    load = round(os.getloadavg()[0], 1)
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--row", json.dumps(row | {"process": i})],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=env,
        )
        for i in range(row["processes"])
    ]
    told = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"A process of {row} failed.")
    shown = {k: v for k, v in row.items() if k != "port"}
    return shown | {"load": load} | json.loads(told[0].strip().splitlines()[-1])


def rows(toy: bool) -> list[dict[str, Any]]:
    widths, batch = ((16, 32, 4), 16) if toy else ((784, 1000, 10), 512)
    found = []
    for kind in ("strong", "weak"):
        for processes, devices, shards in [(1, 1, 1), (2, 2, 1), (2, 2, 2), (1, 2, 1)]:
            if toy and (kind == "weak" or (processes, devices) == (1, 1)):
                continue
            found.append(
                {
                    "kind": kind,
                    "processes": processes,
                    "devices": devices,
                    "shards": shards,
                    "batch": batch * (devices if kind == "weak" else 1),
                    "widths": widths,
                    "pinned": processes == devices,
                    "repeats": 2 if toy else 20,
                }
            )
    return found[:1] if toy else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        return work(json.loads(args.row))
    from dp_ilg.experiments.papers.reproduce import machine

    facts = machine() | {"command": "python " + " ".join(sys.argv)}
    facts["cores"] = len(os.sched_getaffinity(0))
    for row in rows(args.toy):
        line = json.dumps(team(row) | facts)
        print(line)
        if args.out:
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
