"""Records of the step benchmarks: timing, files and table.

No JAX in here, because step_torch.py uses it in an environment of its own.
"""

import json
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "step.jsonl"
FEW = 3
SLOW_RATIO, SLOW_SECONDS = 15.0, 20.0
KINDS = ("gradient", "step")
REFERENCE = {"jax": "ordinary", "torch": "torch_ordinary"}
ORDINARY = ("ordinary", "ordinary_unrolled", "torch_ordinary")


def pin_to_one_core() -> None:
    """Leaves this process its first core; call it before importing a framework."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def clock(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def interleave(
    runs: dict[str, Callable[[], Any]], repeats: int, reference: str
) -> dict[str, list[float]]:
    """Seconds of every run, in rounds that take them in random order.

    What takes over 20 s, or over 15 times the reference, gets three repeats.
    """
    clock(runs[reference])
    limit = min(SLOW_SECONDS, SLOW_RATIO * clock(runs[reference]))
    warm = {}
    for name, run in runs.items():
        warm[name] = clock(run)
        if warm[name] <= limit:
            warm[name] = clock(run)
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, dice = list(runs), random.Random(0)
    for turn in range(repeats):
        dice.shuffle(order)
        for name in order:
            if turn < FEW or warm[name] <= limit:
                times[name].append(clock(runs[name]))
    return times


def summary(times: dict[str, list[float]], reference: str) -> dict[str, dict[str, Any]]:
    """Median, range and ratio to the reference of the same rounds."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        name: {
            "milliseconds": 1e3 * medians[name],
            "range_ms": [1e3 * min(values), 1e3 * max(values)],
            "repeats": len(values),
            "over_full_batch": medians[name] / medians[reference],
        }
        for name, values in times.items()
    }


def resident_peak(run: Callable[[], Any]) -> float:
    """MiB that two calls take at most beyond what is there before them.

    Linux keeps a peak that can be set back, so that compiling does not count. Call it
    in a fresh process.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field + ":"))


def git(*words: str) -> str:
    """What git answers in this checkout, or an empty string outside one."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def default_label() -> str:
    """The last commit of what is measured, with + where it was changed since."""
    measured = ["--", "dp_ilg", "benchmarks/speed/step_models.py"]
    changed = git("status", "--porcelain", *measured)
    return git("log", "-1", "--format=%h", *measured) + ("+" if changed else "")


def run_facts() -> dict[str, Any]:
    """What every record says of its run beside the machine."""
    return {
        "commit": git("describe", "--always", "--dirty"),
        "cores": len(os.sched_getaffinity(0)),
    }


def append(path: Path, record: dict[str, Any]) -> None:
    """Adds one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path, label: str | None = None) -> dict[tuple, dict[str, dict]]:
    """Contestants by (row, kind, framework), later lines over earlier ones.

    Of every row and framework only the lines of one label count: the one asked for,
    or the newest there.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines]
    newest = {(r["row"], r["framework"]): label or r["label"] for r in records}
    found: dict[tuple, dict[str, dict]] = {}
    for record in records:
        if record["label"] != newest[record["row"], record["framework"]]:
            continue
        key = (record["row"], record["kind"], record["framework"])
        for name, facts in record["contestants"].items():
            own = found.setdefault(key, {}).setdefault(name, {})
            if "error" not in facts:
                own.pop("error", None)
            own.update(facts)
    return found


def timed(contestants: dict[str, dict]) -> dict[str, dict]:
    """Those that ran."""
    return {
        k: v for k, v in contestants.items() if "milliseconds" in v and "error" not in v
    }


def best_of(contestants: dict[str, dict]) -> dict[str, str]:
    """The fastest variant of every family."""
    best: dict[str, str] = {}
    ratio = {name: facts["over_full_batch"] for name, facts in contestants.items()}
    for name in contestants:
        family = name.split("/")[0]
        if family not in best or ratio[name] < ratio[best[family]]:
            best[family] = name
    return best


def over_best(contestants: dict[str, dict]) -> float:
    """The smallest ratio of an ordinary step to the one over the whole batch."""
    own = [v for k, v in contestants.items() if k.split("/")[0] in ORDINARY]
    return min(facts["over_full_batch"] for facts in own)


def shown(contestants: dict[str, dict]) -> list[str]:
    """Every family's variant over the whole batch and its best one."""
    whole = {k.split("/")[0]: k for k, v in contestants.items() if v.get("whole")}
    best = best_of(contestants)
    names = [n for f in best for n in (whole.get(f), best[f]) if n]
    return list(dict.fromkeys(names))


def table(found: dict[tuple, dict[str, dict]], kind: str) -> str:
    """One kind of measurement as Markdown."""
    out = [
        "| row | contestant / micro-batch | ms | / full batch | / best ordinary "
        "| compile s | temporary MiB | resident MiB | n |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = list(dict.fromkeys(row for row, _, _ in found))
    for row, framework in [(r, f) for r in rows for f in REFERENCE]:
        own = timed(found.get((row, kind, framework), {}))
        if not own:
            continue
        base = over_best(own)
        out += [_line(row, name, own[name], base) for name in shown(own)]
    return "\n".join(out)


def _line(row: str, name: str, facts: dict[str, Any], base: float) -> str:
    def number(key: str, digits: int) -> str:
        return f"{facts[key]:.{digits}f}" if facts.get(key) is not None else "-"

    ratio = facts["over_full_batch"]
    digits = 1 if facts["milliseconds"] < 1000 else 0
    return (
        f"| {row} | {name} | {number('milliseconds', digits)} | {ratio:.2f} | "
        f"{ratio / base:.2f} | {number('compile_seconds', 1)} | "
        f"{number('temporary_mib', 0)} | {number('resident_mib', 0)} | "
        f"{facts['repeats']} |"
    )
