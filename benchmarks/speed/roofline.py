"""What a step computes and moves, and what that would take on an accelerator.

    python benchmarks/speed/roofline.py --rows mlp mnist_cnn
    python benchmarks/speed/roofline.py --time --out /tmp/roofline.jsonl
    python benchmarks/speed/roofline.py --table

FLOPs and bytes are those that XLA counts in the program it compiled for the device at
hand (`cost_analysis`), whole batch at once, as loops may be counted once. The expected
times are arithmetic, no measurements: the larger of FLOPs over the peak rate and bytes
over the memory bandwidth that the makers publish. A compiler for another device fuses
otherwise, so that its bytes differ. With --time the step also runs here, and the record
has seconds, achieved FLOP/s and the memory that the device reports.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))
import step_contestants as contestants  # noqa: E402
import step_records as records  # noqa: E402
from common import RESULTS, machine  # noqa: E402
from step_models import ROWS, build  # noqa: E402

LINES = RESULTS / "roofline.jsonl"
FAMILIES = ("ordinary", "auto")
# Published peaks: dense float32 (TF32 and bfloat16 units are faster) in FLOP/s, and
# bytes/s of memory. TPUs publish bfloat16 alone.
ACCELERATORS = {
    "A100 80 GB SXM, float32": (19.5e12, 2.039e12),
    "H100 SXM, float32": (67e12, 3.35e12),
    "TPU v4, bfloat16": (275e12, 1.2e12),
}


def count(name: str, family: str, *, toy: bool, timed: bool) -> dict[str, Any]:
    """The record of one whole step."""
    row = build(name, toy=toy)
    contestant = contestants.FAMILIES[family](row, row.batch_size)
    arguments = (row.params, contestant.tx.init(row.params), row.batch)
    lowered = jax.jit(contestants.function(contestant, "step")).lower(*arguments)
    call = lowered.compile()
    cost, memory = analysis(call), call.memory_analysis()
    flops, moved = float(cost.get("flops", 0)), float(cost.get("bytes accessed", 0))
    record = {
        "row": name,
        "family": family,
        "batch_size": row.batch_size,
        "toy": toy,
        "flops": flops,
        "bytes": moved,
        "flops_per_byte": flops / moved if moved else None,
        "temporary_mib": getattr(memory, "temp_size_in_bytes", 0) / 2**20,
        "expected_seconds": {
            label: max(flops / peak, moved / bandwidth)
            for label, (peak, bandwidth) in ACCELERATORS.items()
        },
        "bound_by": {
            label: "compute" if flops / peak > moved / bandwidth else "memory"
            for label, (peak, bandwidth) in ACCELERATORS.items()
        },
    }
    return record | (measured(call, arguments, flops) if timed else {})


def analysis(call: Any) -> dict[str, Any]:
    """XLA's counts; older releases of JAX wrap them in a list."""
    found = call.cost_analysis() or {}
    return found[0] if isinstance(found, list) else found


def measured(call: Any, arguments: Any, flops: float, repeats: int = 5) -> dict:
    """Seconds of the step here, and the device's own account of its memory."""
    jax.block_until_ready(call(*arguments))
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call(*arguments))
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "seconds": seconds,
        "range_seconds": [min(times), max(times)],
        "achieved_flops_per_second": flops / seconds,
        "device_memory": {k: v for k, v in stats.items() if "bytes" in k} or None,
    }


def table(found: list[dict[str, Any]]) -> str:
    """The last record of every row and family, as Markdown."""
    out = [
        "| step (batch) | GFLOP | MB moved | FLOP/byte | expected on "
        + ", ms | ".join(ACCELERATORS)
        + ", ms |",
        "|---|---|---|---|" + "---|" * len(ACCELERATORS),
    ]
    last = {(r["row"], r["family"]): r for r in found}
    for (name, family), r in last.items():
        expected = " | ".join(
            f"{1e3 * r['expected_seconds'][a]:.3f} ({r['bound_by'][a]})"
            for a in ACCELERATORS
        )
        what = "private" if family == "auto" else "Adam"
        out.append(
            f"| {name}, {what} ({r['batch_size']}) | {r['flops'] / 1e9:.3f} | "
            f"{r['bytes'] / 1e6:.1f} | {r['flops_per_byte'] or 0:.1f} | {expected} |"
        )
    return "\n".join(out)


def main() -> None:
    """Counts what is asked for and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", default=[*ROWS], choices=[*ROWS])
    parser.add_argument("--out", type=Path, default=LINES)
    parser.add_argument("--time", action="store_true", help="also run the step here")
    parser.add_argument("--toy", action="store_true", help="tiny models")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    about = machine() | records.run_facts() | {"platform": jax.default_backend()}
    for name in [] if args.table else args.rows:
        for family in FAMILIES:
            record = count(name, family, toy=args.toy, timed=args.time)
            records.append(args.out, record | about)
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    print(table([json.loads(line) for line in lines]))


if __name__ == "__main__":
    main()
