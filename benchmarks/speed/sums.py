"""Times a private step with exact sums against the same step of another checkout.

    git worktree add /tmp/before COMMIT
    python benchmarks/speed/sums.py --before /tmp/before --rows mlp mnist_cnn lm_d128

Two processes, one a checkout, take turns at one step each, so that what else runs on
the machine slows both alike. Prints the median time of each, and the median and
quartiles of the ratio of neighbours in time. Takes a few minutes on two quiet cores.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parents[2]
WORKER = """
import sys, time
sys.path[:0] = ["benchmarks/speed", "benchmarks", "."]
import jax
import step_contestants as contestants
from step_models import build
row = build(sys.argv[1], toy=False)
contestant = contestants.FAMILIES["auto"](row, 0)
state = contestant.tx.init(row.params)
call = jax.jit(contestants.function(contestant, sys.argv[2]))
arguments = (row.params, state, row.batch)
jax.block_until_ready(call(*arguments))
print("ready", flush=True)
for _ in sys.stdin:
    began = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    print(time.perf_counter() - began, flush=True)
"""


def worker(checkout: Path, row: str, kind: str) -> subprocess.Popen:
    """A process that takes a step whenever it reads a line."""
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, row, kind],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen) -> str:
    """The next line that a worker prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def measure(before: Path, row: str, kind: str, repeats: int) -> np.ndarray:
    """Seconds of both checkouts, ``[repeats, 2]``."""
    both = [worker(path, row, kind) for path in (before, HERE)]
    try:
        if [answer(process) for process in both] != ["ready", "ready"]:
            raise RuntimeError(f"row {row} did not start in both checkouts")
        times = np.zeros((repeats, 2))
        for turn in range(repeats):
            for k in (0, 1) if turn % 2 else (1, 0):
                asked = both[k].stdin
                assert asked is not None
                asked.write("\n")
                asked.flush()
                times[turn, k] = float(answer(both[k]))
        return times
    finally:
        for process in both:
            process.kill()


def main() -> None:
    """Prints one line a row and kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=["mlp", "mnist_cnn", "lm_d128"])
    parser.add_argument("--kinds", nargs="+", default=["step", "gradient"])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    for row in args.rows:
        for kind in args.kinds:
            times = measure(args.before, row, kind, args.repeats)
            low, middle, high = np.quantile(
                times[:, 1] / times[:, 0], [0.25, 0.5, 0.75]
            )
            before, after = 1e3 * np.median(times, axis=0)
            print(
                f"{row} {kind}: {before:.2f} -> {after:.2f} ms, ratio {middle:.3f} "
                f"({low:.3f} to {high:.3f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
