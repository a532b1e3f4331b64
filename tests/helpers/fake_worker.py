"""A worker of a sweep that trains nothing: `fake_worker.py FOLDER BEHAVIOUR SEED`.

It writes down what it is asked and answers with made-up accuracies that are best at a
learning rate of 0.03, or behaves badly once, or always, when asked for SEED. With
"texts" there are perplexities.
"""

import json
import math
import os
import signal
import sys
import time
import tomllib
from pathlib import Path

PLAN = {
    "accountant": "rdp",
    "batch_size": 100,
    "delta": 1e-5,
    "l2_clip_norm": 1.0,
    "neighboring_relation": "add_or_remove_one",
    "num_examples": 1000,
    "num_steps": 10,
    "score_budget": 0.0,
    "stages": [[10, 2.0]],
    "target_epsilon": 2.0,
}


def answer(config):
    rate, seed = config["optimizer"]["learning_rate"], config["run"]["seed"]
    accuracy = 0.9 - 0.1 * abs(math.log10(rate / 0.03)) + 0.001 * (seed % 10)
    if config["optimizer"].get("method") == "dp_sgd":
        accuracy -= 0.05
    return {
        "status": "done",
        "accuracy": accuracy,
        "epsilon_spent": 1.9,
        "delta": 1e-5,
        "seconds": 0.2,
        "train_seconds": 0.1,
        "plan": json.dumps(PLAN),
    }


def misbehave(behaviour, folder):
    mark = folder / "misbehaved"
    if behaviour == "die-once" and mark.exists():
        return None
    with mark.open("a") as file:
        file.write("once\n")
    if behaviour in ("die-once", "die-always"):
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "exit":
        sys.exit(3)
    if behaviour == "hang":
        time.sleep(60)
    return {"status": behaviour, "error": f"It is {behaviour}."}


def main(folder, behaviour, seed):
    for line in sys.stdin:
        config = tomllib.loads(json.loads(line)["config"])
        with (folder / "asked.jsonl").open("a") as file:
            file.write(json.dumps(config) + "\n")
        found = answer(config)
        if behaviour == "texts":
            found["perplexity"] = 100 * found["accuracy"]
        elif config["run"]["seed"] == seed:
            found = misbehave(behaviour, folder) or found
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
