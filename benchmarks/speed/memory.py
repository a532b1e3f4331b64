"""Memory of one private step at any logical batch, measured in a fresh process.

    python benchmarks/speed/memory.py
    python benchmarks/speed/memory.py --toy

Each size is one private step (Poisson draw, clipped sum, score, noise, Adam) of a row
of step_models.py, in a process of its own: chunks of the draw are gathered one at a
time, each in micro-batches that fit the stated budget, and their clipped sums add up
before the one noise. Images are made as they are gathered, so that what is counted is
what the step needs, compiling it included. Peak resident memory (ru_maxrss) is read
before the step, once model and optimizer stand, and after it; one line a size goes to
benchmarks/results/memory.jsonl.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dp_ilg
from dp_ilg.clipping.memory import fit_microbatch
from dp_ilg.experiments.papers.reproduce import machine
from dp_ilg.sampling.gather import take
from dp_ilg.training.step import make_train_step
from step_models import build

LINES = Path(__file__).parents[1] / "results" / "memory.jsonl"
SIZES = (1024, 8192, 65_536)
NAME, CHUNK, BUDGET_MIB = "cifar_cnn", 1024, 128


def resident_mib() -> float:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Images:
    """Images without end: row i is image i modulo 1024 of a few random ones."""

    dtype = np.dtype(np.float32)

    def __init__(self, count: int, shape: tuple[int, ...]):
        self.shape = (count, *shape)
        rng = np.random.default_rng(0)
        self.kept = rng.standard_normal((min(count, 1024), *shape), np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self.kept[rows % len(self.kept)]


def one_step(size: int, toy: bool) -> dict[str, Any]:
    """Takes one step of a logical batch and returns what it needed."""
    row = build(NAME, toy=toy, batch_size=2)
    chunk = min(CHUNK if not toy else 8, size)
    count = 2 * size
    labels = np.arange(count, dtype=np.int32) % 10
    source = Images(count, row.batch[0].shape[1:]), labels
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0,
        delta=1e-6,
        num_examples=count,
        batch_size=size,
        num_steps=1,
    )
    rows = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((chunk, *a.shape[1:]), a.dtype), row.batch
    )
    fast = dp_ilg.clipped_grad(row.loss_fn, l2_clip_norm=plan.l2_clip_norm)
    held = fit_microbatch(fast, row.params, rows, BUDGET_MIB * 2**20)
    grad_fn = dp_ilg.clipped_grad(
        row.loss_fn, l2_clip_norm=plan.l2_clip_norm, microbatch_size=held
    )
    tx = dp_ilg.dp_adam_ilg(1e-3, plan, key=jax.random.key(0))
    step = make_train_step(grad_fn, tx)
    state = tx.init(row.params)
    sampler = dp_ilg.PoissonSampler.for_plan(plan, key=1, chunk_size=chunk)
    drawn = sampler.chunks(0)
    chunks = ((take(source, c.indices), c.is_padding_example) for c in drawn)
    before, began = resident_mib(), time.perf_counter()
    params, state = step(row.params, state, chunks)
    jax.block_until_ready(params)
    leaves = jax.tree.leaves(params)
    return {
        "row": NAME,
        "batch_size": size,
        "drawn": int(sum((~c.is_padding_example).sum() for c in drawn)),
        "chunks": len(drawn),
        "chunk_size": chunk,
        "budget_mib": BUDGET_MIB,
        "microbatch": held,
        "parameters": sum(x.size for x in leaves),
        "before_mib": round(before, 1),
        "peak_mib": round(resident_mib(), 1),
        "above_mib": round(resident_mib() - before, 1),
        "seconds": round(time.perf_counter() - began, 1),
        "finite": bool(all(np.isfinite(x).all() for x in leaves)),
        "toy": toy,
    }


def main() -> None:
    """Measures every size in a child and appends its line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+")
    parser.add_argument("--toy", action="store_true", help="tiny images, small batches")
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(one_step(args.child, args.toy)))
        return
    path = args.out or (None if args.toy else LINES)
    for size in args.sizes or ((16, 64) if args.toy else SIZES):
        command = [sys.executable, __file__, "--child", str(size)]
        command += ["--toy"] if args.toy else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        record = json.loads(done.stdout) | machine() | {"command": " ".join(sys.argv)}
        print(
            f"batch {record['batch_size']}: {record['above_mib']} MiB above the model,"
            f" {record['seconds']} s, micro-batch {record['microbatch']}",
            flush=True,
        )
        if path:
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
