"""Which exponents of importance and size: the rule against its neighbours, by accuracy.

    python benchmarks/utility/exponents.py --data-dir ../shared/data
    python benchmarks/utility/exponents.py --toy
    python benchmarks/utility/exponents.py --table

A rule gives group j noise proportional to ``I_j^p n_j^-q``. Theory says p = 1/2 and
q = 1/4 for the least noise energy; here both move, on IMDB in bands at epsilon 1, all
else as shipped but for the batch and for Adam, which is plain. Every finished run is
one JSON line and is not run again. Seeds are published: measurements, no protection.
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
from dp_ilg.experiments.config.schema import Config, read_config  # noqa: E402
from dp_ilg.experiments.sweeps.bench import Bench  # noqa: E402
from dp_ilg.geometry.rules import RULES, power_rule  # noqa: E402

LINES = RESULTS / "exponents.jsonl"
POWERS = (
    (0.0, 0.0),
    (0.25, 0.125),
    (0.5, 0.25),
    (0.75, 0.375),
    (1.0, 0.5),
    (0.5, 0.0),
    (0.5, 0.5),
    (0.25, 0.25),
    (0.75, 0.25),
    (0.0, 0.25),
)


def shipped(toy: bool) -> Config:
    """IMDB at epsilon 1 in batches of 1,024, or a few steps of the digits."""
    name = "digits" if toy else "imdb_embedding"
    config = read_config(ROOT / "configs" / f"{name}.toml")
    changes: dict[str, Any] = dict(epsilon=1.0, batch_size=1024, num_steps=300)
    if toy:
        changes = dict(epsilon=8.0, batch_size=64, num_steps=3)
    rate = config.optimizer.learning_rate if toy else 0.02
    return dataclasses.replace(
        config,
        privacy=dataclasses.replace(config.privacy, **changes),
        optimizer=dataclasses.replace(
            config.optimizer, learning_rate=rate, adam="plain"
        ),
    )


def with_powers(config: Config, powers: tuple[float, float], seed: int) -> Config:
    """The same run under another rule and seed."""
    name = f"I^{powers[0]:g} n^-{powers[1]:g}"
    RULES[name] = power_rule(*powers)
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(config.optimizer, importance=name),
        run=dataclasses.replace(config.run, seed=seed),
    )


def table(records: list[dict[str, Any]]) -> str:
    """Mean, spread and the difference to theory's exponents, paired by seed."""
    base = {r["seed"]: r["accuracy"] for r in records if r["powers"] == [0.5, 0.25]}
    out = ["| p | q | seeds | test % | against 1/2, 1/4 |", "|---|---|---|---|---|"]
    for powers in POWERS:
        own = [r for r in records if tuple(r["powers"]) == powers and r["seed"] in base]
        if not own:
            continue
        got = [100 * r["accuracy"] for r in own]
        gaps = [100 * (r["accuracy"] - base[r["seed"]]) for r in own]
        spread = statistics.stdev(got) if len(got) > 1 else float("nan")
        out.append(
            f"| {powers[0]:g} | {powers[1]:g} | {len(own)} | "
            f"{statistics.mean(got):.2f} ± {spread:.2f} | "
            f"{statistics.mean(gaps):+.2f} |"
        )
    return "\n".join(out)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data-dir")
    parser.add_argument("--toy", action="store_true", help="three steps, kept apart")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    path = Path(tempfile.mkdtemp()) / "exponents.jsonl" if args.toy else LINES
    known = {(tuple(r["powers"]), r["seed"]) for r in finished(path)}
    seeds = range(1 if args.toy else args.seeds)
    todo = [(powers, seed) for powers in POWERS for seed in seeds]
    bench = Bench(Path(args.data_dir) if args.data_dir else None)
    for powers, seed in () if args.table else todo:
        if (powers, seed) in known:
            continue
        began = time.perf_counter()
        found = bench.run(with_powers(shipped(args.toy), powers, seed), str(powers))
        if found["status"] != "done":
            raise SystemExit(found["error"])
        kept = ("status", "accuracy", "epsilon_spent", "delta", "steps")
        record = {"powers": powers, "seed": seed} | {k: found[k] for k in kept}
        record |= machine() | {"seconds": round(time.perf_counter() - began, 1)}
        command = "python benchmarks/utility/exponents.py"
        facts = {"commit": commit(), "command": command}
        with path.open("a") as file:
            print(json.dumps(record | facts), file=file)
    print(table(finished(path)))


if __name__ == "__main__":
    main()
