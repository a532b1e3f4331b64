"""How time and memory grow with batch, depth and width, ours beside the ordinary step.

    python benchmarks/bench_growth.py                 # all series
    python benchmarks/bench_growth.py --series batch_mlp --plot
    python benchmarks/bench_growth.py --plot          # only draw growth_*.svg
    python benchmarks/bench_growth.py --toy           # two tiny points of three series

A series changes one thing: the batch at a fixed micro-batch, the depth of a language
model, or the width of one or of an MLP. Every point is measured as a row of
bench_step.py is (interleaved rounds, the gradient alone and the whole step) and is one
line of benchmarks/results/growth.jsonl, with temporary memory from XLA and, for the
whole step, resident memory from a fresh process. A point that is there under the same
label is not measured again unless --force. --one-core pins the process to one core.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import bench_step  # pins to one core before JAX where asked
import jax
import step_contestants as contestants
import step_records as records
from bench_step import Variant, say
from step_models import build

RESULTS = records.ROOT / "benchmarks" / "results" / "growth.jsonl"
FAMILIES = ("ordinary", "bookkeeping")


class Series(NamedTuple):
    """A row of bench_step.py and what of it changes from point to point."""

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
    facts = bench_step.measure(row, kind, todo, args.repeats, args.toy)
    for variant in todo:
        own = facts[variant.name]
        if kind == "step" and not args.toy and "error" not in own:
            job = {"row": series.row, "toy": False, "changes": told, "kind": kind}
            job["variant"] = variant
            own["resident_mib"] = bench_step.resident_in_child(job, args.one_core)
    head = {"row": f"{name}/{point}", "kind": kind, "framework": "jax"}
    body = {"label": args.label, "batch_size": row.batch_size, "contestants": facts}
    records.append(path, head | body | bench_step.about())
    jax.clear_caches()


def per_family(found: dict, name: str, kind: str, field: str) -> dict[str, list]:
    """Points and values of every family along a series."""
    lines: dict[str, list] = {}
    for (row, own_kind, _), facts in found.items():
        series, point = row.split("/")
        if (series, own_kind) != (name, kind):
            continue
        for variant, own in records.timed(facts).items():
            value = {
                "ms": own["milliseconds"],
                "memory": own.get("resident_mib", own["temporary_mib"]),
            }[field]
            lines.setdefault(variant.split("/")[0], []).append((int(point), value))
    return {family: sorted(points) for family, points in lines.items()}


def draw(found: dict, name: str, series: Series, path: Path) -> None:
    """Draws time (an example, for batches) and memory of a series as one SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "growth"
    from matplotlib import pyplot

    each = series.changed == "batch_size"
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    for kind, style in (("gradient", "--"), ("step", "-")):
        for family, points in per_family(found, name, kind, "ms").items():
            x = [p for p, _ in points]
            y = [v / p if each else v for p, v in points]
            time.plot(x, y, style, marker="o", label=f"{family}, {kind}")
    for family, points in per_family(found, name, "step", "memory").items():
        memory.plot(*zip(*points, strict=True), marker="o", label=family)
    titles = (
        "milliseconds an example" if each else "milliseconds",
        "peak MiB, whole step",
    )
    for axes, title in zip((time, memory), titles, strict=True):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(series.changed.replace("_", " "))
        axes.set_title(title)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.suptitle(f"{name}: {series.row}, micro-batch {series.chunk}, CPU")
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    pyplot.close(figure)


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
    parser.add_argument("--plot", action="store_true", help="only draw the plots")
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    args = parser.parse_args()
    args.known = TOY if args.toy else SERIES
    args.series = [n for n in args.series or args.known if n in args.known]
    args.repeats = args.repeats or (1 if args.toy else bench_step.REPEATS)
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
    """Measures what is missing, then draws; or only draws."""
    args = parse()
    path = args.out or RESULTS
    if args.toy and not args.out:
        path = Path(tempfile.mkdtemp()) / "growth.jsonl"
    if not args.plot:
        measure(path, args)
    found = records.read(path, args.label)
    for name in args.series:
        if any(row.startswith(name + "/") for row, _, _ in found):
            place = path.with_name(f"growth_{name}.svg")
            draw(found, name, args.known[name], place)


if __name__ == "__main__":
    sys.exit(main())
