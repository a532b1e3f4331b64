"""How far the density of a draw is from a Gaussian's, point by point.

    python benchmarks/trust/noise_density.py --out noise_density.jsonl

Exact whole numbers for the draw and 40 digits for the Gaussian, at 40 points in five
cells around each distance, both signs. Beside it what a float32 draw of 23 bits has
there. Takes ten seconds.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from dp_ilg.experiments.papers.reproduce import machine  # noqa: E402
from tests.helpers import noise_law  # noqa: E402

DISTANCES = (0, 1, 3, 5, 6, 7)
FLOAT32_ENDS = 5.42  # standard deviations


def largest_error(stddevs: int, points: int) -> float:
    """Over random places near a distance, and their mirror images."""
    rng = np.random.default_rng(stddevs)
    places = rng.integers(0, 5 * noise_law.CELL, points) + stddevs * noise_law.STDDEV
    both = [x for place in places.tolist() for x in (place, -1 - place)]
    return max(abs(noise_law.relative_error(x)) for x in both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    command = f"python benchmarks/trust/noise_density.py --points {args.points}"
    for stddevs in DISTANCES:
        facts = {
            "stddevs": stddevs,
            "relative_error": largest_error(stddevs, args.points),
            "float32": "no draw at all" if stddevs > FLOAT32_ENDS else "draws",
        }
        line = json.dumps(facts | machine() | {"command": command})
        print(line)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
