"""Times private steps of ten models against the ordinary Adam step, and our peers.

    python benchmarks/speed/step.py              # all rows: hours on two cores
    python benchmarks/speed/step.py --rows mlp lm_d128 --contestants ordinary auto
    python benchmarks/speed/step.py --resident   # and peak memory, in child processes
    python benchmarks/speed/step.py --table      # Markdown, every variant
    python benchmarks/speed/step.py --toy        # every row once at toy size

One process on all its cores (--one-core: on one) measures every contestant of a row in
interleaved rounds, ten unless it is slow (over 20 s a call, or 15 times the ordinary
step: three). First the gradient alone at every micro-batch, then the whole step
(gradient, clip, score, noise, Adam) at the whole batch and at the best micro-batch of
each family. A line of benchmarks/results/step.jsonl is one such measurement with its
machine, versions, command and commit. What stands there under the same label (by
default the last commit of dp_ilg) is not measured again unless --force. Ratios are to
the ordinary step over the whole batch, measured in the same rounds; the table adds
those to the best ordinary step in micro-batches. For torch and Opacus see
step_torch.py, which writes to the same file.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import step_records as records

sys.path.insert(0, str(Path(__file__).parents[1]))
if "--one-core" in sys.argv:
    records.pin_to_one_core()

import jax  # noqa: E402
import numpy as np  # noqa: E402

import step_contestants as contestants  # noqa: E402
from common import machine  # noqa: E402
from step_contestants import FAMILIES, Variant  # noqa: E402
from step_models import ROWS, Row, build  # noqa: E402

REPEATS = 10
TOY_FAMILIES = ["ordinary", "ordinary_unrolled", "auto"]


def compiled(row: Row, variant: Variant, kind: str) -> tuple[Any, dict[str, Any]]:
    """The compiled call of a contestant, with what compiling it took and needs."""
    contestant = FAMILIES[variant.family](row, variant.chunk)
    arguments = (row.params, contestant.tx.init(row.params), row.batch)
    began = time.perf_counter()
    call = jax.jit(contestants.function(contestant, kind)).lower(*arguments).compile()
    facts: dict[str, Any] = {"compile_seconds": time.perf_counter() - began}
    memory = call.memory_analysis()
    facts["temporary_mib"] = getattr(memory, "temp_size_in_bytes", 0) / 2**20
    facts["micro_batch"] = variant.chunk or None
    facts["whole"] = variant.chunk == row.batch_size
    if kind == "gradient":
        leaves = jax.tree.leaves(contestants.plain(call(*arguments)))
        facts["gradient_norm"] = float(
            np.hypot.reduce([np.linalg.norm(x) for x in leaves])
        )
    return functools.partial(call, *arguments), facts


def measure(
    row: Row, kind: str, todo: list[Variant], repeats: int, strict: bool
) -> dict[str, dict[str, Any]]:
    """Facts of every contestant; the first of them is the reference.

    One that fails is recorded with its error, unless strict.
    """
    calls, facts = {}, {}
    for variant in todo:
        try:
            calls[variant.name], facts[variant.name] = compiled(row, variant, kind)
        except Exception as error:
            if strict:
                raise
            facts[variant.name] = {"error": f"{type(error).__name__}: {error}"[:500]}
            say(f"  {variant.name} failed: {facts[variant.name]['error']}")
    runs = {
        name: functools.partial(lambda call: jax.block_until_ready(call()), call)
        for name, call in calls.items()
    }
    times = records.interleave(runs, repeats, todo[0].name)
    for name, timing in records.summary(times, todo[0].name).items():
        facts[name] |= timing
    return facts


def check_norms(facts: dict[str, dict[str, Any]]) -> str:
    """What disagrees: all private families must clip to the same sum."""
    norms = {
        name: own["gradient_norm"]
        for name, own in facts.items()
        if name.split("/")[0] in contestants.PRIVATE and "gradient_norm" in own
    }
    middle = sorted(norms.values())[len(norms) // 2] if norms else 0.0
    wrong = {k: v for k, v in norms.items() if abs(v - middle) > 1e-3 * middle}
    return f"unlike the others' norm {middle}: {wrong}" if wrong else ""


def chosen(row: Row, kind: str, families: list[str], gradients: dict) -> list[Variant]:
    """Variants to measure: all, or for the whole step those that the gradient chose."""
    every = contestants.variants(row, kind, families)
    best = set(records.best_of(records.timed(gradients)).values())
    if kind == "gradient" or not best:
        return every
    return [
        v
        for v in every
        if v.chunk in (0, row.batch_size)
        or v.name in best
        or not any(name.startswith(v.family + "/") for name in best)
    ]


def fewer(row: Row, chunks: list[int] | None) -> Row:
    """The row with only these of its micro-batches."""
    if chunks is None:
        return row
    kept = [tuple(c for c in own if c in chunks) for own in (row.chunks, row.unrolled)]
    return row._replace(chunks=kept[0], unrolled=kept[1])


def bench(
    name: str, kind: str, families: list[str], path: Path, args: argparse.Namespace
) -> None:
    """Measures what is missing of one row and kind, and appends a line."""
    row = fewer(build(name, toy=args.toy), args.chunks)
    found = records.read(path, args.label)
    every = chosen(row, kind, families, found.get((name, "gradient", "jax"), {}))
    known = records.timed(found.get((name, kind, "jax"), {}))
    todo = [v for v in every if args.force or v.name not in known]
    if not todo:
        say(f"{name}, {kind}: all there")
        return
    reference = Variant("ordinary", row.batch_size)
    todo = [reference, *[v for v in todo if v != reference]]
    say(f"{name}, {kind}: {len(todo)} contestants")
    facts = measure(row, kind, todo, args.repeats, args.toy)
    save(path, name, kind, row, facts, args.label)
    wrong = check_norms(facts)
    if wrong and args.toy:
        raise SystemExit(f"{name}: {wrong}")
    if wrong:
        say(f"  {name}: {wrong}")


def save(
    path: Path, name: str, kind: str, row: Row, facts: dict[str, Any], label: str
) -> None:
    """Appends one line with what the numbers depend on."""
    head = {"row": name, "kind": kind, "framework": "jax", "label": label}
    body = {"batch_size": row.batch_size, "contestants": facts}
    records.append(path, head | body | about())


@functools.cache
def about() -> dict[str, Any]:
    """Machine, versions, command and commit."""
    facts = machine() | records.run_facts()
    for package in ("flax", "jax-privacy"):
        try:
            facts["versions"][package] = version(package)
        except PackageNotFoundError:
            facts["versions"][package] = None
    return facts


def resident(job: dict[str, Any]) -> float:
    """Peak MiB of one contestant's calls; for a process that does nothing else."""
    row = build(job["row"], toy=job["toy"], **job["changes"])
    call, _ = compiled(row, Variant(*job["variant"]), job["kind"])
    return records.resident_peak(lambda: jax.block_until_ready(call()))


def resident_in_child(job: dict[str, Any], one_core: bool) -> float:
    """`resident` in a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps(job)]
    command += ["--one-core"] if one_core else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:])
    return float(done.stdout)


def bench_resident(
    name: str, families: list[str], path: Path, args: argparse.Namespace
) -> None:
    """Adds the peak memory of the step of every variant that the table shows."""
    row = build(name, toy=args.toy)
    known = records.timed(records.read(path, args.label).get((name, "step", "jax"), {}))
    facts = {}
    for own in records.shown(known):
        family, chunk = own.split("/")
        if family not in families or ("resident_mib" in known[own] and not args.force):
            continue
        variant = (family, 0 if chunk == "own" else int(chunk))
        job = {"row": name, "toy": args.toy, "changes": {}, "kind": "step"}
        job["variant"] = variant
        peak = resident_in_child(job, args.one_core)
        facts[own] = {"resident_mib": peak}
        say(f"{name}, {own}: {peak:.0f} MiB resident")
    if facts:
        save(path, name, "step", row, facts, args.label)


def say(text: str) -> None:
    """Tells how far it is; standard output is for the table."""
    print(text, file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    """Reads the command line and settles the defaults that depend on it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--contestants", nargs="+", choices=list(FAMILIES))
    parser.add_argument("--kinds", nargs="+", choices=records.KINDS)
    parser.add_argument(
        "--chunks", nargs="*", type=int, help="only these micro-batches"
    )
    parser.add_argument("--repeats", type=int, default=None)
    parser.add_argument("--label", help="name of the run; by default dp_ilg's commit")
    parser.add_argument("--force", action="store_true", help="measure again")
    parser.add_argument("--one-core", action="store_true")
    parser.add_argument("--toy", action="store_true", help="toy sizes, kept apart")
    parser.add_argument("--resident", action="store_true", help="measure peak memory")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.repeats = args.repeats or (1 if args.toy else REPEATS)
    return args


def scope(name: str, args: argparse.Namespace) -> dict[str, list[str]]:
    """Families by kind; toys meet all of them in the first row's gradient only."""
    chosen = {kind: list(FAMILIES) for kind in records.KINDS}
    if args.toy:
        chosen = {"gradient": TOY_FAMILIES}
    if args.toy and name == "mlp":
        chosen = {"gradient": list(FAMILIES), "step": ["ordinary", "auto", "optax"]}
    kinds = args.kinds or list(chosen)
    return {kind: args.contestants or chosen.get(kind, TOY_FAMILIES) for kind in kinds}


def report(path: Path, args: argparse.Namespace) -> None:
    """Prints the tables."""
    found = records.read(path, args.label)
    found = {key: v for key, v in found.items() if key[0] in args.rows}
    for kind in args.kinds or records.KINDS:
        print(f"### {kind}\n\n{records.table(found, kind)}\n")


def main() -> None:
    """Measures what is missing, or reports what is there."""
    args = parse()
    if args.child:
        print(resident(args.child))
        return
    path = args.out or records.RESULTS
    if args.toy and not args.out:
        path = Path(tempfile.mkdtemp()) / "step.jsonl"
    if args.table:
        report(path, args)
        return
    if args.toy:
        jax.config.update("jax_disable_most_optimizations", True)
    args.label = args.label or records.default_label()
    absent = {f: contestants.missing(f) for f in args.contestants or FAMILIES}
    for family, why in absent.items():
        if why:
            say(f"left out {family}: {why}")
    for name in args.rows:
        for kind, families in scope(name, args).items():
            families = [f for f in families if not absent.get(f)]
            bench(name, kind, families, path, args)
            if args.resident and kind == "step":
                bench_resident(name, families, path, args)
        jax.clear_caches()


if __name__ == "__main__":
    main()
