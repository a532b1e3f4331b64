"""Time and memory of epsilon and of calibration, by number of steps and stages.

    python benchmarks/speed/accounting.py
    python benchmarks/speed/accounting.py --toy --out /tmp/accounting.jsonl

Every case runs in a process of its own with the cache of epsilons off, then once more
with a fresh cache that has the answer. Seconds are those of the processor; wall time
and the load of the machine are beside them. Matrix products run on one thread: others
would count as busy while they wait. The noise falls linearly to half.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
import step_records as records  # noqa: E402
from common import RESULTS, machine  # noqa: E402

LINES = RESULTS / "accounting.jsonl"
# steps, stages, what is given, largest batch (None cuts nothing)
CASES = [
    (1_000_000, 1, "noise_multiplier=1.0", None),
    (10_000, 1, "epsilon=4.0", None),
    (10_000, 1, "epsilon=4.0", 1_100),
    (10_000, 1, "epsilon=4.0", 1_200),
    (1_000_000, 1, "epsilon=4.0", None),
    (100_000, 16, "epsilon=4.0", None),
    (1_000_000, 1_000, "noise_multiplier=4.0", None),
    (1_000, 1_000, "noise_multiplier=1.0", None),
    (1_000_000, 1_000, "epsilon=4.0", None),
    (1_000, 1_000, "epsilon=4.0", None),
]
TOY = [(100, 20, "noise_multiplier=1.0", None), (100, 1, "epsilon=4.0", 1_200)]
CODE = """
import json, resource, sys, time
import dp_accounting, scipy.signal, scipy.stats
from dp_ilg import plan_privacy, schedules
wall, start = time.perf_counter(), time.process_time()
plan = plan_privacy({how}, delta=1e-7, num_examples=1_000_000, batch_size=1000,
                    num_steps={steps}, num_stages={stages}, max_batch_size={most},
                    schedule=schedules.linear(0.5 if {stages} > 1 else 1.0))
found = plan.epsilon()
print(json.dumps({{
    "epsilon": found, "noise_multiplier": float(plan.noise_multipliers[0]),
    "distinct": len(plan.stages), "seconds": time.process_time() - start,
    "wall_seconds": time.perf_counter() - wall,
    "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}}))
"""


def run(case: tuple[int, int, str, int | None], cache: str) -> dict[str, Any]:
    """One case in a fresh process."""
    steps, stages, how, most = case
    code = CODE.format(steps=steps, stages=stages, how=how, most=most)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DP_ILG_CACHE": cache, "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    asked = {"steps": steps, "stages": stages, "given": how, "max_batch_size": most}
    return asked | json.loads(done.stdout)


def main() -> None:
    """Runs every case and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=LINES)
    parser.add_argument("--toy", action="store_true", help="two small cases")
    args = parser.parse_args()
    about = machine() | records.run_facts()
    for case in TOY if args.toy else CASES:
        with tempfile.TemporaryDirectory() as folder:
            record = run(case, "") | {"load": os.getloadavg()[0], "toy": args.toy}
            run(case, folder)
            record["cached_seconds"] = run(case, folder)["seconds"]
        records.append(args.out, record | about)
        print(json.dumps({k: v for k, v in record.items() if k not in about}))


if __name__ == "__main__":
    main()
