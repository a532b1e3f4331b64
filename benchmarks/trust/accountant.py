"""The default accountant against an oracle, over random runs of its whole domain.

    python benchmarks/trust/accountant.py --runs 2000
    python benchmarks/trust/accountant.py --runs 3 --out /tmp/accountant.jsonl

Delta from 1e-30 to 1e-2, 1 to 10,000,000 steps, rates from 1e-6 to 1, one or several
noise multipliers, unsampled Gaussians beside them, both relations, epsilon from 1e-4
to 100. Runs are numbered: those in the file already are skipped, so it can be resumed.
One line a run: what was asked, epsilon, processor seconds, the oracle's delta at it
over delta (above 1: the claim is false), and at an epsilon a thousandth smaller (below
1: it is loose).
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from common import RESULTS, commit, machine  # noqa: E402
from tests.helpers.random_plans import draw, verdict  # noqa: E402

LINES = RESULTS / "accountant.jsonl"


def done(path: Path) -> set[int]:
    """Numbers of the runs that are in the file."""
    if not path.exists():
        return set()
    return {json.loads(line)["run"] for line in path.read_text().splitlines()}


def main() -> None:
    """Checks every run that is not in the file yet and says what was worst."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=LINES)
    parser.add_argument("--runs", type=int, default=2000)
    args = parser.parse_args()
    about = machine() | {"commit": commit()}
    for run in sorted(set(range(args.runs)) - done(args.out)):
        kinds, delta, sensitivity = draw(np.random.default_rng(run))
        steps = [list(kind) for kind in kinds]
        asked = {"run": run, "kinds": steps, "delta": delta, "sensitivity": sensitivity}
        record = asked | verdict(kinds, delta, sensitivity)
        with open(args.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(record | about) + "\n")
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
