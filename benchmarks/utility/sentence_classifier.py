"""A private head on frozen public text vectors: IMDB at small epsilons.

    python benchmarks/utility/sentence_classifier.py --data-dir D
    python benchmarks/utility/sentence_classifier.py --data-dir D --validation 0.2 \
        --learning-rates 0.05 0.1 0.2 --seeds 1
    python benchmarks/utility/sentence_classifier.py --table

Configurations are those of configs/encoders: the mean of word vectors, and the middle
of a sentence encoder, both out of Python packages and of public weights. With
--validation a share of the training reviews stands in for the test set; that is how the
learning rate was chosen. One line a run goes to
benchmarks/results/sentence_classifier.jsonl. Seeds are published, so the runs are
measurements and protect nobody.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from dp_ilg.accounting.ledger import PrivacyLedger
from dp_ilg.experiments.config.schema import Config, read_config
from dp_ilg.experiments.papers.reproduce import machine
from dp_ilg.experiments.runs.job import build_job, load_data
from dp_ilg.experiments.runs.keys import run_keys
from dp_ilg.experiments.runs.trainer import Watch, make_tools, start, train

ROOT = Path(__file__).parents[2]
LINES = ROOT / "benchmarks" / "results" / "sentence_classifier.jsonl"
ROWS = ("word_vectors", "sentence_encoder")


def changed(config: Config, epsilon: float, rate: float | None, share: Any) -> Config:
    """A configuration with another epsilon, learning rate or held-out share."""
    privacy = dataclasses.replace(config.privacy, epsilon=epsilon)
    data = dataclasses.replace(config.data, validation=share)
    run = dataclasses.replace(config.run, eval_every=config.privacy.num_steps)
    optimizer = config.optimizer
    if rate is not None:
        optimizer = dataclasses.replace(optimizer, learning_rate=rate)
    parts: dict[str, Any] = dict(privacy=privacy, data=data, run=run)
    return dataclasses.replace(config, optimizer=optimizer, **parts)


def runs(config: Config, data: Any, seeds: range) -> list[dict[str, Any]]:
    """Trains with every seed; all share what is compiled."""
    job = build_job(config, data=data)
    tools, records = make_tools(job), []
    for seed in seeds:
        found: list[dict[str, Any]] = []
        keys = run_keys(job, seed)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ledger.jsonl"
            with PrivacyLedger(path, job.plan, key=keys.optimizer) as ledger:
                watch = Watch(evaluated=found.append)
                end = train(job, start(job, keys), ledger, watch, tools)
        records.append(
            {
                "features": config.data.features,
                "seed": seed,
                "epsilon": job.plan.epsilon(),
                "delta": job.plan.delta,
                "asked": config.privacy.epsilon,
                "validation": config.data.validation,
                "learning_rate": config.optimizer.learning_rate,
                "test_examples": len(job.data.y_test),
                "test_accuracy": found[-1]["test_accuracy"],
                "seconds": round(end.seconds, 1),
            }
        )
    return records


def table(records: list[dict[str, Any]]) -> str:
    """Mean and spread of every row, as Markdown."""
    lines = ["| features | epsilon | held out | rate | seeds | % |", "|" + "---|" * 6]
    heads = [
        (r["features"], r["asked"], r["validation"], r["learning_rate"])
        for r in records
    ]
    for head in dict.fromkeys(heads):
        got = [
            100 * r["test_accuracy"]
            for r, own in zip(records, heads, strict=True)
            if own == head
        ]
        spread = f" ± {statistics.stdev(got):.2f}" if len(got) > 1 else ""
        cells = [*map(str, head), str(len(got)), f"{statistics.mean(got):.2f}{spread}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs what was asked for and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--epsilons", nargs="+", type=float, default=[0.5, 1.0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[None])
    parser.add_argument("--validation", type=float)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--out", type=Path, default=LINES)
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    for row in () if args.table else args.rows:
        config = read_config(ROOT / "configs" / "encoders" / f"imdb_{row}.toml")
        data = load_data(changed(config, 1.0, None, args.validation), args.data_dir)
        for epsilon in args.epsilons:
            for rate in args.learning_rates:
                own = changed(config, epsilon, rate, args.validation)
                about = machine() | {"command": " ".join(sys.argv)}
                found = runs(own, data, range(args.seeds))
                with args.out.open("a") as file:
                    file.writelines(json.dumps(r | about) + "\n" for r in found)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    print(table([json.loads(line) for line in lines]))


if __name__ == "__main__":
    main()
