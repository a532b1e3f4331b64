"""Which score of an example: every row of the table against uniform, by accuracy.

    python benchmarks/utility/scores.py
    python benchmarks/utility/scores.py --task imdb --data-dir ../shared/data
    python benchmarks/utility/scores.py --toy
    python benchmarks/utility/scores.py --table

A score says how important one example finds each group; their noisy mean sets the
weights. All rows have the same rule, plan and budget, uniform weights spend none of it
on scores. Every row is tuned alike: some learning rates on one seed, then five other
seeds at the best. Every finished run is one JSON line and is not run again. Seeds are
published: measurements, no protection.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import RESULTS, ROOT, commit, finished, machine  # noqa: E402
from dp_ilg.clipping.scores.table import SCORES  # noqa: E402
from dp_ilg.experiments.config.schema import Config, read_config  # noqa: E402
from dp_ilg.experiments.sweeps.bench import Bench  # noqa: E402

LINES = RESULTS / "scores.jsonl"
ROWS = ("uniform", *SCORES)
TASKS = {
    "digits": ("digits", dict(epsilon=2.0), (0.005, 0.01, 0.02, 0.04)),
    "imdb": (
        "imdb_embedding",
        dict(epsilon=1.0, batch_size=1024, num_steps=150),
        (0.01, 0.02, 0.04),
    ),
}
"""Configuration, what of its privacy is changed, and the learning rates tried."""
TUNING_SEED = 100


def configured(task: str, row: str, rate: float, seed: int, toy: bool) -> Config:
    """The run of a row: groups are leaves, Adam is plain, all else as shipped."""
    name, changes, _ = TASKS[task]
    config = read_config(ROOT / "configs" / f"{name}.toml")
    optimizer: dict[str, Any] = dict(learning_rate=rate, adam="plain", layers="leaf")
    changes = changes | (dict(batch_size=64, num_steps=3) if toy else {})
    if row == "uniform":
        changes["score_budget"] = 0.0
        optimizer["importance"] = "uniform"
    else:
        optimizer["score"] = row
    return dataclasses.replace(
        config,
        privacy=dataclasses.replace(config.privacy, **changes),
        optimizer=dataclasses.replace(config.optimizer, **optimizer),
        run=dataclasses.replace(config.run, seed=seed),
    )


def best_rate(records: list[dict[str, Any]], task: str, row: str) -> float | None:
    """The learning rate of the best tuning run, or None before there is one."""
    own = [
        r
        for r in records
        if (r["task"], r["row"], r["seed"]) == (task, row, TUNING_SEED)
    ]
    if not own:
        return None
    return max(own, key=lambda r: r["accuracy"])["learning_rate"]


def table(records: list[dict[str, Any]]) -> str:
    """Mean and spread over the seeds that were not tuned on, paired with uniform."""
    out = ["| task | score | rate | seeds | test % | against uniform |"]
    out.append("|---|---|---|---|---|---|")
    for task in TASKS:
        tested = [r for r in records if r["task"] == task and r["seed"] != TUNING_SEED]
        rate = best_rate(records, task, "uniform")
        plain = [
            r for r in tested if (r["row"], r["learning_rate"]) == ("uniform", rate)
        ]
        base = {r["seed"]: r["accuracy"] for r in plain}
        for row in ROWS:
            rate = best_rate(records, task, row)
            own = [r for r in tested if (r["row"], r["learning_rate"]) == (row, rate)]
            own = [r for r in own if r["seed"] in base]
            if not own:
                continue
            got = [100 * r["accuracy"] for r in own]
            gaps = [100 * (r["accuracy"] - base[r["seed"]]) for r in own]
            spread = statistics.stdev(got) if len(got) > 1 else float("nan")
            out.append(
                f"| {task} | {row} | {rate:g} | {len(own)} "
                f"| {statistics.mean(got):.2f} ± {spread:.2f} | "
                f"{statistics.mean(gaps):+.2f} |"
            )
    return "\n".join(out)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=sorted(TASKS), default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data-dir")
    parser.add_argument("--toy", action="store_true", help="three steps, kept apart")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    path = Path(tempfile.mkdtemp()) / "scores.jsonl" if args.toy else LINES
    if not args.table:
        bench = Bench(Path(args.data_dir) if args.data_dir else None)
        for row in ROWS:
            _run_row(args, row, path, bench)
    print(table(finished(path)))


def _run_row(args: argparse.Namespace, row: str, path: Path, bench: Bench) -> None:
    rates = TASKS[args.task][2]
    for rate in rates:
        _run(args, (row, rate, TUNING_SEED), path, bench)
    best = best_rate(finished(path), args.task, row)
    assert best is not None
    for seed in range(1 if args.toy else args.seeds):
        _run(args, (row, best, seed), path, bench)


def _run(
    args: argparse.Namespace, what: tuple[str, float, int], path: Path, bench: Bench
) -> None:
    names = ("task", "row", "learning_rate", "seed")
    key = dict(zip(names, (args.task, *what), strict=True))
    if any(all(r[n] == key[n] for n in names) for r in finished(path)):
        return
    began = time.perf_counter()
    found = bench.run(configured(args.task, *what, args.toy), str(what))
    if found["status"] != "done":
        raise SystemExit(found["error"])
    kept = ("status", "accuracy", "epsilon_spent", "delta", "steps")
    record = key | {k: found[k] for k in kept} | machine()
    record |= {"seconds": round(time.perf_counter() - began, 1), "commit": commit()}
    record["command"] = "python benchmarks/utility/scores.py"
    with path.open("a") as file:
        print(json.dumps(record), file=file)


if __name__ == "__main__":
    main()
