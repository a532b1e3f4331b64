"""Private fine-tuning steps of a GPT-2-small-shaped network, each in a fresh process.

    python benchmarks/speed/fine_tune.py
    python benchmarks/speed/fine_tune.py --rows lora:8 all:2
    python benchmarks/speed/fine_tune.py --toy

A row is a way of tuning (a row of TUNINGS in dp_ilg/training/fine_tune.py) and a
batch. Weights are random: what is measured is time, resident memory (ru_maxrss) and
XLA's temporary memory, and what is counted is work. Everybody is drawn in every step
(q = 1), so that the batch has one size. One line a row goes to
benchmarks/results/fine_tune.jsonl.

`work` counts what a step must do: floating-point operations of an example (two for
each multiplication with an addition: forward, derivatives by activations, and, of what
is trained, by weights, with the norms of their factors) and bytes for each trained
parameter (noise, moments and update; and the sum of each micro-batch). `predicted` is
operations / rate + bytes / bandwidth for an accelerator's two numbers (--tflops,
--terabytes), at the share of both that is reached (--efficiency).
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import dp_ilg
from dp_ilg.experiments.models.gpt2 import Gpt2, Gpt2Size, gpt2_loss, random_params
from dp_ilg.experiments.papers.reproduce import machine
from dp_ilg.training.fine_tune import make_tuning_step, tune

LINES = Path(__file__).parents[1] / "results" / "fine_tune.jsonl"
ROWS = ("lora:8", "bias:8", "all:2", "all:4")
TOY = Gpt2Size(vocabulary=40, context=16, width=16, depth=1, heads=2)
LENGTH, RANK = 64, 8


def resident_mib() -> float:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work(size: Gpt2Size, length: int, name: str, trained: int) -> dict[str, float]:
    """Operations of one example and bytes of one step, from the sizes alone."""
    dense = 12 * size.depth * size.width**2 + size.vocabulary * size.width
    mixing = 4 * size.depth * length**2 * size.width
    forward = 2 * dense * length + mixing
    weights, grams = 0.0, 0.0
    if name == "all":
        widths = (4, 2, 5, 5)  # inputs and outputs of a block's kernels, in widths
        weights = 2.0 * dense * length
        grams = 2.0 * size.depth * sum(widths) * size.width * length**2
        grams += 2.0 * (size.vocabulary + size.width) * (2 * length) ** 2
    elif name == "lora":
        weights = 2.0 * trained * length * 2
    flops = 2 * forward + mixing + weights + grams
    return {
        "flops_per_example": flops,
        "ordinary_flops_per_example": 3 * forward,
        "update_bytes": 4.0 * trained * 8,  # sum, noise, two moments and it, twice
        "sum_bytes_per_microbatch": 4.0 * trained * 2,
    }


def measure(name: str, batch: int, toy: bool, steps: int) -> dict[str, Any]:
    """Takes private steps and returns what they needed."""
    size, length = (TOY, 8) if toy else (Gpt2Size(), LENGTH)
    module = Gpt2(size)
    params, loss_fn = random_params(module, length), gpt2_loss(module)
    shape = (batch, length + 1)
    texts = jax.random.randint(jax.random.key(0), shape, 0, size.vocabulary, "int32")
    keys = jax.random.split(jax.random.key(1))
    options: Any = dict(key=keys[0], rank=RANK, head="ln_f")
    tuning = tune(name, loss_fn, params, texts[0], **options)
    frozen, trained, rows = tuning.frozen, tuning.trained, tuning.loss_fn
    del params, tuning
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0,
        delta=1e-5,
        num_examples=batch,
        batch_size=batch,
        num_steps=steps + 1,
    )
    tx = dp_ilg.dp_adam_ilg(1e-4, plan, key=keys[1])
    state, before = tx.init(trained), resident_mib()
    clip: Any = dict(l2_clip_norm=plan.l2_clip_norm)
    held = dp_ilg.clipped_grad(lambda p, e: rows(frozen, p, e), **clip).microbatch(
        trained, texts
    )
    step = make_tuning_step(rows, tx, **clip)
    began = time.perf_counter()
    compiled = step.lower(frozen, trained, state, texts, None).compile()
    seconds = [time.perf_counter() - began]
    leaves = jax.tree.leaves(trained)
    count, base = (sum(x.size for x in jax.tree.leaves(t)) for t in (trained, frozen))
    for _ in range(steps):
        began = time.perf_counter()
        trained, state = compiled(frozen, trained, state, texts, None)
        jax.block_until_ready(trained)
        seconds.append(time.perf_counter() - began)
    memory = compiled.memory_analysis()
    finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(trained))
    return {
        "row": name,
        "batch_size": batch,
        "length": length,
        "microbatch": held,
        "trained_parameters": count,
        "frozen_parameters": base,
        "leaves": len(leaves),
        "compile_seconds": round(seconds[0], 1),
        "step_seconds": [round(s, 2) for s in seconds[1:]],
        "median_seconds": round(statistics.median(seconds[1:]), 2),
        "model_mib": round(before, 1),
        "peak_mib": round(resident_mib(), 1),
        "temporary_mib": round(memory.temp_size_in_bytes / 2**20, 1),
        "aliased_mib": round(memory.alias_size_in_bytes / 2**20, 1),
        "finite": finite,
        "load": os.getloadavg()[0],
        "work": work(size, length, name, count),
        "toy": toy,
    }


def predicted(record: dict[str, Any], args: argparse.Namespace) -> str:
    """Seconds of a step on an accelerator, by rate and by bandwidth."""
    own = record["work"]
    pieces = -(-args.batch // args.microbatch)
    moved = own["update_bytes"] + pieces * own["sum_bytes_per_microbatch"]
    by_rate = args.batch * own["flops_per_example"] / (args.tflops * 1e12)
    by_bytes = moved / (args.terabytes * 1e12)
    total = (by_rate + by_bytes) / args.efficiency
    return (
        f"{record['row']}, batch {args.batch} of {record['length']} tokens: "
        f"{by_rate:.3f} s of arithmetic, {by_bytes:.4f} s of traffic, predicted "
        f"{total:.3f} s at {args.efficiency:.0%} of {args.tflops} TFLOP/s and "
        f"{args.terabytes} TB/s"
    )


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", help="tuning:batch")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--toy", action="store_true", help="a tiny network, one step")
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    parser.add_argument("--predict", action="store_true", help="only predict")
    parser.add_argument("--batch", type=int, default=1024, help="of the prediction")
    parser.add_argument("--microbatch", type=int, default=64)
    parser.add_argument("--tflops", type=float, default=60.0)
    parser.add_argument("--terabytes", type=float, default=3.0)
    parser.add_argument("--efficiency", type=float, default=0.4)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures every row in a child and appends its line."""
    args = parse()
    path = args.out or (None if args.toy else LINES)
    if args.child:
        name, batch = args.child.split(":")
        steps = 1 if args.toy else args.steps
        print(json.dumps(measure(name, int(batch), args.toy, steps)))
        return
    if args.predict:
        for line in (args.out or LINES).read_text().splitlines():
            print(predicted(json.loads(line), args))
        return
    for row in args.rows or (("lora:2", "all:2") if args.toy else ROWS):
        command = [sys.executable, __file__, "--child", row, "--steps", str(args.steps)]
        command += ["--toy"] if args.toy else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        record = json.loads(done.stdout) | machine() | {"command": " ".join(sys.argv)}
        print(
            f"{row}: {record['median_seconds']} s a step, {record['peak_mib']} MiB "
            f"resident, {record['trained_parameters']} trained parameters",
            flush=True,
        )
        if path:
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
