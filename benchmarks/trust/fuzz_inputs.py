"""Feeds rubbish to everything that reads files, flags or arguments; counts it.

    python benchmarks/trust/fuzz_inputs.py --inputs 100000
    python benchmarks/trust/fuzz_inputs.py --inputs 300 --out /tmp/fuzz.jsonl
    python benchmarks/trust/fuzz_inputs.py --atheris npz --inputs 20000

The first failure ends the program and leaves the input in a file. A line of
benchmarks/results/fuzz_inputs.jsonl says how many inputs a reader accepted and refused;
readers that have theirs are not fed again. With --atheris (`pip install atheris`) the
inputs follow the coverage of the reader's code instead of chance.
"""

import argparse
import collections
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).parents[n]) for n in (1, 2)]
from common import RESULTS, commit, machine  # noqa: E402
from tests.helpers import fuzz_arguments, fuzz_inputs  # noqa: E402

LINES = RESULTS / "fuzz_inputs.jsonl"
READERS = (  # whose code atheris follows
    "dp_ilg.experiments.data.files",
    "dp_ilg.experiments.data.tabular.adult",
    "dp_ilg.experiments.config.fields",
    "dp_ilg.experiments.reports.record",
    "dp_ilg.accounting.plan",
    "dp_ilg.accounting.sealing",
    "numpy.lib._format_impl",
    "tomllib._parser",
    "json.decoder",
    "zipfile",
    "gzip",
)
PATIENCE = 20  # seconds for one input
SHARES = {"train CONFIG": 0.01, "train FLAGS": 0.01, "run folder": 0.06}
SHARES |= {"public functions": 0.1}
ARGUMENTS = "public functions"
MEMORY = Path("/dev/shm")  # the ledger syncs; a disk would be all there is to see


def hung(number: int, frame: Any) -> None:
    """What an alarm raises."""
    raise TimeoutError(f"no answer after {PATIENCE} s")


def feed(name: str, count: int, folder: Path, seed: int) -> dict[str, int]:
    """Feeds one reader; returns how many inputs were accepted and refused."""
    if name == ARGUMENTS:
        return feed_arguments(count, seed)
    target, counts = fuzz_inputs.TARGETS[name], collections.Counter()
    seeds, dice = target.seeds(), random.Random(f"{name} {seed}")
    for content in seeds:
        if target.check(content, fuzz_inputs.fresh(folder)) != "accepted":
            raise SystemExit(f"{name} refuses a good input")
    for _ in range(count):
        content = fuzz_inputs.mutate(seeds, dice)
        signal.alarm(PATIENCE)
        try:
            counts[target.check(content, folder)] += 1
        except BaseException:
            Path(f"fuzz-failure-{name.replace(' ', '-')}").write_bytes(content)
            raise
        finally:
            signal.alarm(0)
    return dict(counts)


def feed_arguments(count: int, seed: int) -> dict[str, int]:
    """Calls public functions with values at random."""
    dice, counts = random.Random(f"arguments {seed}"), collections.Counter()
    fuzz_arguments.call(random.Random(0))  # builds the good arguments
    for _ in range(count):
        signal.alarm(PATIENCE)
        counts[fuzz_arguments.call(dice)] += 1
        signal.alarm(0)
    return dict(counts)


def plan(inputs: int) -> dict[str, int]:
    """How many inputs each reader gets."""
    few = {name: max(1, int(inputs * share)) for name, share in SHARES.items()}
    rest = inputs - sum(few.values())
    names = [name for name in fuzz_inputs.TARGETS if name not in SHARES]
    many = {name: rest // len(names) for name in names}
    many[names[0]] += rest - sum(many.values())
    return many | few


def run_atheris(name: str, count: int, folder: Path) -> None:
    """Lets libFuzzer look for inputs that reach new code; it ends the process."""
    atheris: Any = importlib.import_module("atheris")
    for reader in READERS:
        module = importlib.import_module(reader)
        for key, fn in list(vars(module).items()):
            if isinstance(fn, types.FunctionType) and fn.__module__ == reader:
                setattr(module, key, atheris.instrument_func(fn))
    target = fuzz_inputs.TARGETS[name]
    corpus = folder / "corpus"
    for index, content in enumerate(target.seeds()):
        fuzz_inputs.fresh(corpus / str(index))
        (corpus / str(index) / "seed").write_bytes(content)
    place = fuzz_inputs.fresh(folder / "place")
    flags = [f"-runs={count}", f"-timeout={PATIENCE}", "-max_len=4096", str(corpus)]
    atheris.Setup(
        [sys.argv[0], *flags], lambda data: target.check(data, place) and None
    )
    atheris.Fuzz()


def guided(args: argparse.Namespace, place: Path) -> None:
    """Runs atheris in a child, since libFuzzer ends its process; writes a line."""
    began, child = time.perf_counter(), os.fork()
    if not child:
        run_atheris(args.atheris, args.inputs, place)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise SystemExit(f"atheris found a failure of {args.atheris} (code {code})")
    record = {"atheris": args.atheris, "inputs": args.inputs, "failures": 0}
    write(args.out, record | {"seconds": round(time.perf_counter() - began, 1)})


def write(out: Path, record: dict[str, Any]) -> None:
    """Adds a line with machine and versions."""
    with out.open("a") as file:
        file.write(json.dumps(record | machine() | {"commit": commit()}) + "\n")


def main() -> None:
    """Reads the arguments and feeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=LINES)
    parser.add_argument("--only", nargs="*", choices=[*fuzz_inputs.TARGETS, ARGUMENTS])
    parser.add_argument("--atheris", choices=[*fuzz_inputs.TARGETS])
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, hung)
    base = MEMORY if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=base) as place:
        if args.atheris:
            guided(args, Path(place))
            return
        for name, count in plan(args.inputs).items():
            if name in known(args) or args.only and name not in args.only:
                continue
            began = time.perf_counter()
            counts = feed(name, count, Path(place) / "x", args.seed)
            record: dict[str, Any] = {"reader": name, "inputs": count, "failures": 0}
            record |= counts | {"seed": args.seed, "of": args.inputs}
            write(args.out, record | {"seconds": round(time.perf_counter() - began, 1)})
            print(f"{name}: {counts}", flush=True)


def known(args: argparse.Namespace) -> set[str]:
    """Readers that have had their share already."""
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    records = [json.loads(line) for line in lines]
    return {r["reader"] for r in records if r.get("of") == args.inputs}


if __name__ == "__main__":
    main()
