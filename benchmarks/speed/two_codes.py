"""Times the private step of two states of the code, turn about.

    python benchmarks/speed/two_codes.py --before ../before
    python benchmarks/speed/two_codes.py --before . --toy --repeats 2
    python benchmarks/speed/two_codes.py --table

Each tree gets a process that compiles the step and waits. The processes take turns, so
that both see the same weather on the machine. Medians, and the ratio of the medians, go
to benchmarks/results/two_codes_step.jsonl.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from common import RESULTS, ROOT, finished, machine  # noqa: E402

LINES = RESULTS / "two_codes_step.jsonl"
ROWS = ("mlp", "mnist_cnn", "lm_d128")


class Worker:
    """A process that holds one compiled step."""

    def __init__(self, tree: Path, row: str, toy: bool):
        command = [sys.executable, __file__, "--worker", row, *["--toy"] * toy]
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": str(tree.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self.answer()

    def answer(self) -> Any:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError("A worker ended early; its message is above.")
        return json.loads(line)

    def step(self) -> float:
        """Seconds of one step."""
        self.process.stdin.write("\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


def work(name: str, toy: bool) -> None:
    """Compiles the step of a row and takes one for every line that comes in."""
    sys.path.insert(0, str(HERE))
    import jax

    from step_contestants import function, ours
    from step_models import build

    row = build(name, toy=toy)
    contestant = ours(row, 0, engine="auto")
    state = contestant.tx.init(row.params)
    inputs = row.params, state, row.batch
    step = jax.jit(function(contestant, "step")).lower(*inputs).compile()
    jax.block_until_ready(step(*inputs))
    memory: Any = step.memory_analysis()
    print(json.dumps({"peak_bytes": memory.temp_size_in_bytes}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        jax.block_until_ready(step(*inputs))
        print(json.dumps(time.perf_counter() - began), flush=True)


def measure(name: str, before: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One line: both medians and their ratio."""
    workers = [Worker(tree, name, options.toy) for tree in (before, ROOT)]
    for worker in workers:
        worker.step()
    times: list[list[float]] = [[], []]
    for turn in range(options.repeats):
        for k in (0, 1) if turn % 2 else (1, 0):
            times[k].append(workers[k].step())
    for worker in workers:
        worker.close()
    medians = [statistics.median(x) for x in times]
    return {
        "row": name,
        "before_ms": round(1e3 * medians[0], 2),
        "after_ms": round(1e3 * medians[1], 2),
        "ratio": round(medians[1] / medians[0], 4),
        "before_mib": round(workers[0].facts["peak_bytes"] / 2**20, 1),
        "after_mib": round(workers[1].facts["peak_bytes"] / 2**20, 1),
        "repeats": options.repeats,
        "toy": options.toy,
    }


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as text."""
    head = f"{'row':10} {'before ms':>10} {'after ms':>10} {'ratio':>7} {'MiB':>16}"
    rows = [
        f"{x['row']:10} {x['before_ms']:>10} {x['after_ms']:>10} {x['ratio']:>7} "
        f"{x['before_mib']:>7} {x['after_mib']:>8}"
        for x in lines
    ]
    return "\n".join([head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=LINES)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options.toy)
    for name in options.rows if options.before else []:
        line = measure(name, options.before, options) | machine()
        with open(options.out, "a") as out:
            out.write(json.dumps(line) + "\n")
        print(
            json.dumps({k: line[k] for k in ("row", "ratio", "after_ms")}), flush=True
        )
    print(table(finished(options.out)))


if __name__ == "__main__":
    main()
