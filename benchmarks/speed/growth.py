"""How time and memory grow with batch, depth and width, ours beside the ordinary step.

    python benchmarks/speed/growth.py                 # all series
    python benchmarks/speed/growth.py --series batch_mlp
    python benchmarks/speed/growth.py --toy           # two tiny points of three series

A series changes one thing: the batch at a fixed micro-batch, the depth of a language
model, or the width of one or of an MLP. Every point is measured as a row of
step.py is (interleaved rounds, the gradient alone and the whole step) and is one
line of benchmarks/results/growth.jsonl, with temporary memory from XLA and, for the
whole step, resident memory from a fresh process. A point that is there under the same
label is not measured again unless --force. --one-core pins the process to one core.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import step  # before JAX: it pins to one core where asked  # isort: skip
import jax

import step_contestants as contestants
import step_records as records
from step import Variant, say
from step_models import build

LINES = records.RESULTS.with_name("growth.jsonl")
FAMILIES = ("ordinary", "bookkeeping")


class Series(NamedTuple):
    """A row of step.py and what of it changes from point to point."""

    row: str
    changed: str
    points: tuple[int, ...]
    batch_size: int
    chunk: int
    fixed: dict[str, Any] = {}


_SMALL_LM: dict[str, Any] = dict(length=32, width=64, depth=2)
_BATCHES = (64, 256, 1024, 4096, 16_384)
SERIES: dict[str, Series] = {
    "batch_mlp": Series("mlp", "batch_size", _BATCHES, 64, 64),
    "batch_cnn": Series("mnist_cnn", "batch_size", _BATCHES, 64, 64),
    "depth_lm": Series("lm_d128", "depth", (1, 2, 4, 8), 32, 8, _SMALL_LM),
    "width_lm": Series("lm_d128", "width", (32, 64, 128, 256), 32, 8, _SMALL_LM),
    "width_mlp": Series("mlp", "width", (256, 512, 1024, 2048, 4096), 64, 64),
}
_TINY_LM: dict[str, Any] = dict(vocabulary=11, length=4, width=8, depth=1, heads=2)
TOY: dict[str, Series] = {
    "batch_mlp": Series("mlp", "batch_size", (2, 4), 2, 2, dict(inputs=8, width=4)),
    "depth_lm": Series("lm_d128", "depth", (1, 2), 2, 2, _TINY_LM),
    "width_mlp": Series("mlp", "width", (4, 8), 2, 2, dict(inputs=8)),
}


def changes(series: Series, point: int) -> dict[str, Any]:
    """What `build` is told for one point."""
    return {"batch_size": series.batch_size, **series.fixed, series.changed: point}


def bench(name: str, point: int, kind: str, path: Path, args: Any) -> None:
    """Measures one point and appends its line."""
    series = args.known[name]
    told = changes(series, point)
    row = build(series.row, **told)
    chunk = min(series.chunk, row.batch_size)
    todo = [
        Variant(family, 0 if family == "auto" else chunk) for family in args.contestants
    ]
    facts = step.measure(row, kind, todo, args.repeats, args.toy)
    for variant in todo:
        own = facts[variant.name]
        if kind == "step" and not args.toy and "error" not in own:
            job = {"row": series.row, "toy": False, "changes": told, "kind": kind}
            job["variant"] = variant
            own["resident_mib"] = step.resident_in_child(job, args.one_core)
    head = {"row": f"{name}/{point}", "kind": kind, "framework": "jax"}
    body = {"label": args.label, "batch_size": row.batch_size, "contestants": facts}
    records.append(path, head | body | step.about())
    jax.clear_caches()


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--series", nargs="+", choices=list(SERIES))
    parser.add_argument(
        "--contestants",
        nargs="+",
        default=list(FAMILIES),
        choices=list(contestants.FAMILIES),
        help="the first is the reference",
    )
    parser.add_argument("--points", nargs="+", type=int, help="only these points")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--label", help="name of the run; by default dp_ilg's commit")
    parser.add_argument("--force", action="store_true", help="measure again")
    parser.add_argument("--one-core", action="store_true")
    parser.add_argument("--toy", action="store_true", help="small points, kept apart")
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    args = parser.parse_args()
    args.known = TOY if args.toy else SERIES
    args.series = [n for n in args.series or args.known if n in args.known]
    args.repeats = args.repeats or (1 if args.toy else step.REPEATS)
    return args


def measure(path: Path, args: argparse.Namespace) -> None:
    """Measures every point that is missing."""
    args.label = args.label or records.default_label()
    if args.toy:
        jax.config.update("jax_disable_most_optimizations", True)
    absent = [f for f in args.contestants if contestants.missing(f)]
    args.contestants = [f for f in args.contestants if f not in absent]
    if absent:
        say(f"left out: {', '.join(absent)}")
    kinds = records.KINDS[:1] if args.toy else records.KINDS
    points = [(n, p) for n in args.series for p in args.known[n].points]
    for name, point in points:
        if args.points and point not in args.points:
            continue
        for kind in kinds:
            there = records.read(path, args.label)
            if args.force or (f"{name}/{point}", kind, "jax") not in there:
                say(f"{name} {point}, {kind}")
                bench(name, point, kind, path, args)


def main() -> None:
    """Measures what is missing."""
    args = parse()
    path = args.out or LINES
    if args.toy and not args.out:
        path = Path(tempfile.mkdtemp()) / "growth.jsonl"
    measure(path, args)


if __name__ == "__main__":
    sys.exit(main())
