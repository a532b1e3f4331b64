"""The bundled sweep in a toy form, by real processes, one of which is killed."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dp_ilg.experiments.sweeps.compare import CompareOptions, compare
from dp_ilg.experiments.sweeps.pool import COMPILED
from dp_ilg.experiments.sweeps.results import read_results

SWEEP = Path(__file__).parents[3] / "configs" / "sweeps" / "digits.toml"
TOY = [
    ('"../digits.toml"', f'"{SWEEP.parent.parent}/digits.toml"'),
    ("num_steps = 100", 'num_steps = 3\noverrides.privacy.accountant = "rdp"'),
    ("epsilons = [1.0, 4.0]", "epsilons = [4.0]"),
    ("seeds = [0, 1, 2, 3, 4]", "seeds = [0, 1]"),
    ("learning_rates = [0.01, 0.03, 0.1]", "learning_rates = [0.01, 0.1]"),
    ("values = [0.3, 1.0]", "values = [1.0]"),
]


def workers():
    """Processes that this one started to run a sweep."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            words = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if int(parent) == os.getpid() and b"sweeps.worker" in words:
            found.append(int(path.name))
    return found


def kill_one(folder, killed):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not read_results(folder):
        time.sleep(0.01)  # until the first run is on file, so that another is under way
    killed.append(workers()[0])
    os.kill(killed[0], signal.SIGKILL)


@pytest.mark.slow  # its small form, with a fake worker, is in test_compare.py
def test_a_toy_of_the_bundled_sweep_survives_kill_9(tmp_path):
    text = SWEEP.read_text()
    text = text[: text.index('[[methods]]\nname = "dp_adam_ilg, min')]
    for old, new in TOY:
        assert old in text, old
        text = text.replace(old, new)
    path, folder, killed = tmp_path / "toy.toml", tmp_path / "out", []
    path.write_text(text)
    killer = threading.Thread(target=kill_one, args=(folder, killed))
    killer.start()
    found = compare(path, CompareOptions(out=folder))
    killer.join()
    assert killed and found["complete"], found["missing"]
    runs = [r for r in read_results(folder) if r["kind"] == "run"]
    assert len(runs) == len({r["digest"] for r in runs}) == 2 + 2
    assert {r["status"] for r in runs} == {"done"}
    held = {(r["phase"], r["num_examples"], r["num_evaluated"]) for r in runs}
    assert held == {("tuning", 1150, 287), ("final", 1437, 360)}
    assert all(0 < r["epsilon_spent"] <= 4 for r in runs)
    assert not workers() and not (folder / COMPILED).exists()
