"""Trains the same configurations and seeds with two states of the code; resumable.

    python benchmarks/utility/two_codes.py --code before --tree ../before
    python benchmarks/utility/two_codes.py --code after --tree .
    python benchmarks/utility/two_codes.py --table

It answers whether a change of the arithmetic (norms, sums, noise) costs accuracy. A run
is one JSON line in benchmarks/results/two_codes.jsonl and is not run again. Runs of one
seed share the initial parameters and the sampling rate, not the noise. The seeds are
published: the runs are measurements and protect nobody.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import RESULTS, ROOT, finished, machine  # noqa: E402

LINES = RESULTS / "two_codes.jsonl"
TASKS = ("imdb_embedding", "mnist_cnn", "digits")
QUIET = ["--run.eval-every", "1000", "--run.checkpoint-every", "1000"]
TOY = ["--num-steps", "2", "--batch-size", "32"]
_PROGRAM = """
import sys
from dp_ilg.experiments.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(task: str, seed: int, tree: Path, data_dir: str, toy: bool) -> dict[str, Any]:
    """One training run in a process of its own; returns what it reached."""
    config = ROOT / "configs" / f"{task}.toml"
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--run-dir", f"{folder}/run", "--data-dir", data_dir, "--json"]
        flags += ["--seed", str(seed), *QUIET, *(TOY if toy else [])]
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, "train", str(config), *flags],
            env=os.environ | {"PYTHONPATH": str(tree)},
            cwd=folder,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found = json.loads(done.stdout)
    names = ("test_accuracy", "epsilon", "delta", "steps", "seconds", "num_params")
    return {name: found[name] for name in names if name in found}


def commit_of(tree: Path) -> str:
    """The commit that a tree has checked out."""
    asked = ["git", "-C", str(tree), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


def table(lines: list[dict[str, Any]]) -> str:
    """Mean and spread of each, and the paired difference with its 95 % interval."""
    from scipy import stats

    rows = ["task         before          after           after - before, 95 %"]
    for task in dict.fromkeys(line["task"] for line in lines):
        own: dict[str, dict[int, float]] = {"before": {}, "after": {}}
        for line in lines:
            if line["task"] == task:
                own[line["code"]][line["seed"]] = 100 * line["test_accuracy"]
        seeds = sorted(own["before"].keys() & own["after"].keys())
        if len(seeds) < 2:
            continue
        gaps = [own["after"][s] - own["before"][s] for s in seeds]
        half = stats.t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps)
        half /= len(gaps) ** 0.5
        shown = [
            f"{statistics.mean(v[s] for s in seeds):.2f} ± "
            f"{statistics.stdev(v[s] for s in seeds):.2f}"
            for v in (own["before"], own["after"])
        ]
        mean = statistics.mean(gaps)
        rows.append(
            f"{task:12} {shown[0]:15} {shown[1]:15} {mean:+.2f} "
            f"[{mean - half:+.2f}, {mean + half:+.2f}], {len(seeds)} seeds"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--code", choices=("before", "after"), default="after")
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data-dir", default=str(ROOT.parent / "shared" / "data"))
    parser.add_argument("--out", type=Path, default=LINES)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    tree, data = options.tree.resolve(), str(Path(options.data_dir).resolve())
    there = {(x["code"], x["task"], x["seed"]) for x in finished(options.out)}
    for task in [] if options.table else options.tasks:
        for seed in range(options.seeds):
            if (options.code, task, seed) in there:
                continue
            found = run(task, seed, tree, data, options.toy)
            facts = dict(code=options.code, task=task, seed=seed, **found)
            line = facts | {"commit": commit_of(tree)} | machine()
            with open(options.out, "a") as out:
                out.write(json.dumps(line) + "\n")
            print(json.dumps(facts), flush=True)
    print(table(finished(options.out)))


if __name__ == "__main__":
    main()
