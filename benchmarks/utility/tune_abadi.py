"""Tries settings of `dp-ilg reproduce abadi` on 10,000 held-out training images.

    python benchmarks/utility/tune_abadi.py --data-dir ../shared/data '{"epsilon": 2,
        "epochs": 20, "learning_rate": 8, "pca_noise_multiplier": 8}'

Each argument is a setting as JSON. The test set is not read for it: what is reported
as accuracy is that on the held-out images, after training on the other 50,000. The
search itself is not charged.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from dp_ilg.experiments.data.datasets import load_dataset
from dp_ilg.experiments.papers.pca_network import Images, Setting, run
from dp_ilg.experiments.papers.reproduce import RunLog

LINES = Path(__file__).parents[1] / "results" / "abadi_tuning.jsonl"
SEED = 1000  # none of the seeds that are reported


def held_out(data_dir: Path | None) -> Images:
    """50,000 training images to train on and the other 10,000 to validate on."""
    data = load_dataset("mnist", data_dir)
    x, y = np.asarray(data.x_train), data.y_train
    x = x.reshape(len(x), -1)
    rows = np.random.default_rng(0).permutation(len(x))
    train, valid = rows[:50_000], rows[50_000:]
    return Images(x[train], y[train], x[valid], y[valid])


def main() -> None:
    """Runs the settings given and appends a record each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="+")
    parser.add_argument("--data-dir", type=Path)
    args = parser.parse_args()
    images, log = held_out(args.data_dir), RunLog(LINES)
    for text in args.settings:
        setting = Setting(**{"reported": 0.0, **json.loads(text)})
        name = {"row": "validation", "setting": dataclasses.asdict(setting)}
        found = log.find(name)
        if not found:
            found = run(setting, images, SEED)
            found["validation_accuracy"] = found.pop("test_accuracy")
            found = log.add(name, found)
        print(f"{100 * found['validation_accuracy']:.2f} % {text}", flush=True)


if __name__ == "__main__":
    main()
