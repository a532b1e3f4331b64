"""Runs `dp-ilg train` over seeds and writes what was reached; resumable.

    python benchmarks/utility/accuracy.py --data-dir ../shared/data --workers 2
    python benchmarks/utility/accuracy.py --rows digits --seeds 1 --toy
    python benchmarks/utility/accuracy.py --table

A row is a configuration with overrides; a run is a row and a seed. Every finished run
is one JSON line in benchmarks/results/accuracy.jsonl with its command, machine and
versions, and is not run again. The lines of IMDB were made before `dp-ilg compare`, now
see configs/sweeps/imdb.toml. The seeds are published, so the runs are measurements
and protect nobody.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import RESULTS, ROOT, commit, finished, machine  # noqa: E402

LINES = RESULTS / "accuracy.jsonl"
ROWS: dict[str, tuple[str, list[str]]] = {
    "digits": ("digits", []),
    "digits, uniform": ("digits", ["--importance", "uniform"]),
    "mnist": ("mnist_cnn", []),
    "mnist, uniform": ("mnist_cnn", ["--importance", "uniform"]),
}
QUIET = ["--run.eval-every", "100"]
TOY = ["--num-steps", "3", "--batch-size", "32"]


def run(row: str, seed: int, data_dir: str | None, toy: bool) -> dict[str, Any]:
    """One training run in a process of its own; returns its record."""
    config, changes = ROWS[row]
    command = ["train", f"configs/{config}.toml", *changes, "--seed", str(seed)]
    command += ["--data-dir", data_dir] if data_dir else []
    command += TOY if toy else QUIET
    with tempfile.TemporaryDirectory() as folder:
        place = ["--run-dir", f"{folder}/run", "--json"]
        done = subprocess.run(
            [sys.executable, "-m", "dp_ilg.experiments.cli.main", *command, *place],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"{row}, seed {seed}: {done.stderr.strip()[-300:]}")
    summary = json.loads(done.stdout)
    kept = ("test_accuracy", "epsilon", "delta", "steps", "seconds", "params_sha256")
    record = {"row": row, "seed": seed, **{k: summary[k] for k in kept}}
    return (
        record
        | machine()
        | {"commit": commit(), "command": "dp-ilg " + " ".join(command)}
    )


def table(records: list[dict[str, Any]]) -> str:
    """Mean, spread and time of every row, as Markdown."""
    out = [
        "| run | seeds | epsilon | test % | spread | s a run |",
        "|---|---|---|---|---|---|",
    ]
    for row in dict.fromkeys(r["row"] for r in records):
        own = [r for r in records if r["row"] == row]
        got = [100 * r["test_accuracy"] for r in own]
        spread = statistics.stdev(got) if len(got) > 1 else float("nan")
        seconds = statistics.median(r["seconds"] for r in own)
        out.append(
            f"| {row} | {len(own)} | {max(r['epsilon'] for r in own):.2f} | "
            f"{statistics.mean(got):.2f} | {spread:.2f} | {seconds:.0f} |"
        )
    return "\n".join(out)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", default=[*ROWS], choices=[*ROWS])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--data-dir")
    parser.add_argument("--toy", action="store_true", help="three steps, kept apart")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    path = LINES
    if args.toy:
        path = Path(tempfile.mkdtemp()) / "accuracy.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {(r["row"], r["seed"]) for r in finished(path)}
    todo = [(r, s) for r in args.rows for s in range(args.seeds)]
    todo = [] if args.table else [t for t in todo if t not in known]

    def work(item: tuple[str, int]) -> None:
        record = run(*item, args.data_dir, args.toy)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(work, todo))
    print(table(finished(path)))


if __name__ == "__main__":
    main()
