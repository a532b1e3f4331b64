"""Times torch's ordinary step and Opacus' private ones on the rows of step.py.

    python3 -m venv torchvenv
    torchvenv/bin/pip install torch==2.13.0 numpy scipy opt-einsum
    torchvenv/bin/pip install --no-deps opacus==1.6.0
    torchvenv/bin/python benchmarks/speed/step_torch.py   # --one-core, --resident
    torchvenv/bin/python benchmarks/speed/step_torch.py --toy

Where plain torch would come with gigabytes of CUDA, take a CPU build of it. torch is no
dependency of dp_ilg: this file runs in an environment of its own, takes nothing from
JAX, and appends lines of the same shape to benchmarks/results/step.jsonl, which
`step.py --table` prints with the others. Contestants are the ordinary step,
Opacus with per-example gradients from hooks, and its ghost clipping, each over the
whole batch and in micro-batches. Eager mode throughout, so nothing is compiled. The
LSTM and the weight-normalised rows are left out: Opacus runs both by other means.
"""

import argparse
import functools
import gc
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import step_records as records

if "--one-core" in sys.argv:
    records.pin_to_one_core()

import torch  # noqa: E402
from opacus.grad_sample import (  # noqa: E402
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
)
from opacus.optimizers import (  # noqa: E402
    DPOptimizer,
    DPOptimizerFastGradientClipping,
)
from opacus.utils.fast_gradient_clipping_utils import (  # noqa: E402
    DPLossFastGradientClipping,
)
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from step_torch_models import ROWS, Task, task  # noqa: E402

REPEATS = 10
NORM = dict(max_grad_norm=1.0)


def ordinary(own: Task, size: int, chunk: int, kind: str) -> Callable[[], Any]:
    """Adam without privacy."""
    optimizer = torch.optim.Adam(own.model.parameters(), 1e-3)

    def run() -> None:
        optimizer.zero_grad()
        for x, y in own.pieces(chunk):
            logits = own.model(x).flatten(0, -2)
            (functional.cross_entropy(logits, y.flatten()) * (chunk / size)).backward()
        if kind == "step":
            optimizer.step()

    return run


def hooks(own: Task, size: int, chunk: int, kind: str) -> Callable[[], Any]:
    """Opacus with the gradient of every example, as its memory manager drives it."""
    model = GradSampleModule(own.model)
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    facts: dict[str, Any] = dict(noise_multiplier=1.0, expected_batch_size=size)
    optimizer = DPOptimizer(adam, **facts, **NORM)
    criterion = functools.partial(token_mean, model)
    return functools.partial(_private, own, criterion, optimizer, chunk, kind)


def ghost(own: Task, size: int, chunk: int, kind: str) -> Callable[[], Any]:
    """Opacus with ghost clipping: norms in one backward, the sum in a second."""
    model = GradSampleModuleFastGradientClipping(own.model, **NORM)
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    facts: dict[str, Any] = dict(noise_multiplier=1.0, expected_batch_size=size)
    optimizer = DPOptimizerFastGradientClipping(adam, **facts, **NORM)
    wrapped = DPLossFastGradientClipping(model, optimizer, nn.CrossEntropyLoss())

    def criterion(x: torch.Tensor, y: torch.Tensor) -> Any:
        logits = model(x)
        shape = logits.shape if logits.ndim == 3 else None
        return wrapped(logits.flatten(0, -2), y.flatten(), shape=shape)

    return functools.partial(_private, own, criterion, optimizer, chunk, kind)


def token_mean(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean loss over examples and tokens."""
    return functional.cross_entropy(model(x).flatten(0, -2), y.flatten())


def _private(own: Task, criterion: Any, optimizer: Any, chunk: int, kind: str) -> None:
    """One step; every micro-batch but the last only adds to the clipped sum."""
    optimizer.zero_grad()
    pieces = own.pieces(chunk)
    for i, (x, y) in enumerate(pieces):
        criterion(x, y).backward()
        last = i == len(pieces) - 1
        optimizer.signal_skip_step(kind == "gradient" or not last)
        optimizer.step()
        if not last:
            optimizer.zero_grad()
    optimizer._is_last_step_skipped = False


FAMILIES: dict[str, Callable[[Task, int, int, str], Callable[[], Any]]] = {
    "torch_ordinary": ordinary,
    "opacus_hooks": hooks,
    "opacus_ghost": ghost,
}


def contestant(row: str, family: str, chunk: int, kind: str, toy: bool) -> Any:
    """The call of a contestant, with a model of its own."""
    own, size, _ = task(row, toy)
    return FAMILIES[family](own, size, chunk, kind), own.model


def clipped_norm(model: nn.Module) -> float:
    """Norm of what a gradient left behind, clipped and summed or not."""
    leaves = [getattr(p, "summed_grad", None) for p in model.parameters()]
    leaves = [
        p.grad if g is None else g
        for g, p in zip(leaves, model.parameters(), strict=True)
    ]
    return math.hypot(*[float(g.norm()) for g in leaves if g is not None])


def bench(row: str, kind: str, repeats: int, toy: bool) -> dict[str, Any]:
    """Facts of every contestant of a row."""
    _, size, chunks = task(row, toy)
    runs, facts = {}, {}
    for family, chunk in [(f, c) for f in FAMILIES for c in chunks]:
        name = f"{family}/{chunk}"
        runs[name], model = contestant(row, family, chunk, kind, toy)
        facts[name] = {"micro_batch": chunk, "whole": chunk == size}
        if kind == "gradient":
            runs[name]()
            facts[name]["gradient_norm"] = clipped_norm(model)
    reference = f"torch_ordinary/{size}"
    times = records.interleave(runs, repeats, reference)
    for name, timing in records.summary(times, reference).items():
        facts[name] |= timing
    return {"batch_size": size, "contestants": facts}


def bench_resident(row: str, facts: dict[str, dict], args: argparse.Namespace) -> None:
    """Adds peak memory, each from a process of its own."""
    for name in records.shown(records.timed(facts)):
        family, chunk = name.split("/")
        job = json.dumps([row, family, int(chunk), "step", args.toy])
        command = [sys.executable, __file__, "--child", job]
        command += ["--one-core"] if args.one_core else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        facts[name]["resident_mib"] = float(done.stdout)


def machine() -> dict[str, Any]:
    """What the numbers depend on, as bench_core.machine has it for JAX."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [x.split(":")[1].strip() for x in lines if "model name" in x]
    return {
        "machine": platform.machine(),
        "processor": f"{len(models)} x {models[0]}",
        "device": "cpu",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "opacus", "numpy")},
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--label", help="name of the run; by default dp_ilg's commit")
    parser.add_argument("--force", action="store_true", help="measure again")
    parser.add_argument("--one-core", action="store_true")
    parser.add_argument("--toy", action="store_true", help="toy sizes, kept apart")
    parser.add_argument("--resident", action="store_true", help="measure peak memory")
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures what is missing and appends it."""
    args = parse()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(records.run_facts()["cores"])
    if args.child:
        run, _ = contestant(*args.child)
        print(records.resident_peak(run))
        return
    toy_path = Path(tempfile.gettempdir()) / "step_torch_toy.jsonl"
    path = args.out or (toy_path if args.toy else records.RESULTS)
    label = args.label or records.default_label()
    repeats = args.repeats or (1 if args.toy else REPEATS)
    for row, kind in [(r, k) for r in args.rows for k in records.KINDS]:
        if (row, kind, "torch") in records.read(path, label) and not args.force:
            continue
        print(f"{row}, {kind}", file=sys.stderr, flush=True)
        head = {"row": row, "kind": kind, "framework": "torch", "label": label}
        body = bench(row, kind, repeats, args.toy)
        if args.resident and kind == "step":
            bench_resident(row, body["contestants"], args)
        records.append(path, head | body | machine() | records.run_facts())
        gc.collect()


if __name__ == "__main__":
    main()
