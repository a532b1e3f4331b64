"""The free error bar of a run beside the spread over seeds, on the digits.

    python benchmarks/utility/error_bar.py
    python benchmarks/utility/error_bar.py --toy

Every run's summary says how much its last five evaluations differ. This runs the
bundled configuration under several seeds and epsilons; the table compares the mean of
the runs' own bars with the standard deviation over the seeds. Every finished run is one
JSON line and is not run again. Seeds are published: measurements, no protection.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import RESULTS, ROOT, commit, finished, machine  # noqa: E402
from dp_ilg.experiments.config.schema import Config, read_config  # noqa: E402
from dp_ilg.experiments.runs import runner  # noqa: E402

LINES = RESULTS / "error_bar.jsonl"
EPSILONS = (1.0, 8.0)


def configured(epsilon: float, seed: int, toy: bool) -> Config:
    """The bundled run, evaluated at every tenth step."""
    config = read_config(ROOT / "configs" / "digits.toml")
    small = dict(batch_size=64, num_steps=6) if toy else {}
    every = 1 if toy else 10
    return dataclasses.replace(
        config,
        privacy=dataclasses.replace(config.privacy, epsilon=epsilon, **small),
        run=dataclasses.replace(config.run, seed=seed, eval_every=every),
    )


def main() -> None:
    """Runs what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--toy", action="store_true", help="six steps, kept apart")
    args = parser.parse_args()
    path = Path(tempfile.mkdtemp()) / "error_bar.jsonl" if args.toy else LINES
    runner.write_report = lambda folder: folder
    for epsilon in EPSILONS:
        for seed in range(1 if args.toy else args.seeds):
            _run(path, epsilon, seed, args.toy)


def _run(path: Path, epsilon: float, seed: int, toy: bool) -> None:
    key = dict(task="digits", epsilon=epsilon, seed=seed)
    if any(all(r[n] == key[n] for n in key) for r in finished(path)):
        return
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = configured(epsilon, seed, toy)
        found = runner.run_training(config, Path(folder) / "run")
    record = key | {n: found[n] for n in ("test_accuracy", "iterates", "delta")}
    record |= {"seconds": round(time.perf_counter() - began, 1)} | machine()
    record |= {"commit": commit(), "command": "python benchmarks/utility/error_bar.py"}
    with path.open("a") as file:
        print(json.dumps(record), file=file)
    print({n: record[n] for n in (*key, "test_accuracy", "iterates")}, flush=True)


if __name__ == "__main__":
    main()
