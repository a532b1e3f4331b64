"""Measures every layer of every task: size, norms, signal and noise. NOT private.

    python benchmarks/utility/layer_study.py --data-dir ../shared/data
    python benchmarks/utility/layer_study.py --tasks mnist_cnn --steps 5 --rows 256
    python benchmarks/utility/layer_study.py --plot layers.svg

A task is a shipped configuration, trained privately for some steps of its plan. Norms
of examples are then computed on public data without noise, which no guarantee covers.
Every finished task is two JSON lines (before the first step and after the last) in
benchmarks/results/layer_study.jsonl and is not run again.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import RESULTS, ROOT, commit, finished, machine  # noqa: E402

LINES = RESULTS / "layer_study.jsonl"
TASKS = (
    "digits mnist_cnn fashion_cnn cifar10_cnn mnist_scattering fashion_scattering "
    "cifar10_scattering imdb_embedding imdb_transformer text_lm flights_mlp"
).split()
NOTE = "computed from the data without noise: for public data, no privacy guarantee"


def run(task: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The two records of a task."""
    from dp_ilg.experiments.config.schema import read_config
    from dp_ilg.experiments.runs.job import build_job
    from dp_ilg.experiments.runs.keys import run_keys
    from dp_ilg.experiments.sweeps.layer_study import study

    config = read_config(ROOT / "configs" / f"{task}.toml")
    began = time.perf_counter()
    data_dir = Path(args.data_dir) if args.data_dir else None
    job = build_job(config, data_dir)
    found = study(
        job, run_keys(job, args.seed), min(args.steps, job.plan.num_steps), args.rows
    )
    facts = {
        "task": task,
        "seed": args.seed,
        "rows": args.rows,
        "note": NOTE,
        "noise_multiplier": float(job.plan.noise_multipliers[0]),
        "seconds": round(time.perf_counter() - began, 1),
        "commit": commit(),
    }
    return [facts | machine() | record for record in found]


def table(records: list[dict[str, Any]]) -> str:
    """One line a record, as Markdown: what could be gained, and signal over noise."""
    out = [
        "| task | step | layers | noise energy | signal / noise: uniform | "
        "min_noise_energy |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        uniform, shaped = (overall(record, r) for r in ("uniform", "min_noise_energy"))
        out.append(
            f"| {record['task']} | {record['step']} | {len(record['layers'])} | "
            f"{record['noise_energy_ratio']:.3f} | {uniform:.3f} | {shaped:.3f} |"
        )
    return "\n".join(out)


def overall(record: dict[str, Any], rule: str) -> float:
    """Norm of all layers' signal over that of all layers' noise, in one step."""
    found = [layer[rule] for layer in record["layers"]]
    signal, noise = (
        sum(entry[part] ** 2 for entry in found) for part in ("signal", "noise")
    )
    return (signal / noise) ** 0.5


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """The figure of each task's last record."""
    from dp_ilg.experiments.reports.svg import save_figure
    from dp_ilg.experiments.sweeps.layer_plot import plot_layers

    last = {record["task"]: record for record in records}
    chosen = [last[task] for task in TASKS if task in last]
    if chosen:
        save_figure(plot_layers(chosen), path)


def main() -> None:
    """Runs what is missing and prints the table, or draws what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=LINES)
    parser.add_argument("--plot", type=Path, help="run nothing, draw every layer here")
    args = parser.parse_args()
    done = {record["task"] for record in finished(args.out)}
    for task in [] if args.plot else args.tasks:
        if task not in done:
            with args.out.open("a") as file:
                lines = [json.dumps(record) for record in run(task, args)]
                file.write("\n".join(lines) + "\n")
            print(f"{task}: done", flush=True)
    print(table(finished(args.out)))
    if args.plot:
        draw(finished(args.out), args.plot)


if __name__ == "__main__":
    main()
