"""Tables of audits, of accounting, and of what was broken on purpose."""

import collections
import statistics
from collections.abc import Callable

from tables.lines import Lines, Record, group, markdown, significant


def trainer_bounds(lines: Lines) -> str:
    """Lower bounds on epsilon of a whole trainer."""
    (audit,) = lines("audit_trainer")
    rows = [
        [
            r["canary"],
            r["adversary"],
            f"{r['lower_bound']:.2f}",
            "-" if r["if_gaussian"] is None else f"{r['if_gaussian']:.2f}",
            f"{r['claim']:.2f}",
            r["verdict"],
        ]
        for r in audit["rows"]
    ]
    return markdown(
        [
            "canary",
            "who sees",
            "lower bound, 95 % confidence",
            "if scores were normal",
            "claim",
            "verdict",
        ],
        rows,
    )


def trainer_checks(lines: Lines) -> str:
    """The promises a trainer was checked for."""
    (audit,) = lines("audit_trainer")
    rows = [
        [c["check"], c["found"], c["limit"], "holds" if c["holds"] else "**broken**"]
        for c in audit["checks"]
    ]
    return markdown(["promise", "found", "limit", "verdict"], rows)


def sensitivity(lines: Lines) -> str:
    """The search for a batch whose clipped sum moves by more than C."""
    (found,) = lines("audit_sensitivity")
    rows = [
        [name, f"{found['cases_by_strategy'][name]:,}", f"{ratio:.7f}"]
        for name, ratio in found["by_strategy"].items()
    ]
    rows.append(["all", f"{found['cases']:,}", f"{found['largest_ratio']:.7f}"])
    return markdown(["family of examples", "cases", "largest change / C"], rows)


def oracle(lines: Lines) -> str:
    """The default accountant against an oracle, over random runs."""
    judged = [r for r in lines("accountant") if r.get("above") is not None]
    rows = []
    for low, high in ((1e-30, 1e-16), (1e-16, 1e-8), (1e-8, 1.0)):
        own = [r for r in judged if low <= r["delta"] < high]
        if own:
            rows.append(
                [
                    f"{low:.0e} to {high:.0e}",
                    f"{len(own):,}",
                    f"{max(r['above'] for r in own):.4f}",
                    f"{sum(r['within'] >= 1 for r in own):,}",
                    significant(statistics.median(r["seconds"] for r in own)),
                ]
            )
    head = ["delta", "runs", "largest true delta / delta", "within 0.1 %"]
    return markdown([*head, "median time, s"], rows)


def kills(lines: Lines) -> str:
    """Runs killed at any moment and resumed."""
    named = {
        "random": "at random moments",
        "operation": "at a file operation, half a write among them",
        "saving": "while a checkpoint was written",
    }
    found = group(lines("kill_resume"), "kind")
    rows = [[words, str(len(found[kind]))] for kind, words in named.items()]
    rows.append(["all", str(len(lines("kill_resume")))])
    return markdown(["SIGKILL", "runs, each resumed to the same bits"], rows)


def fuzz(lines: Lines) -> str:
    """Damaged files, flags and arguments."""
    count: dict[str, collections.Counter] = {}
    for r in lines("fuzz_inputs"):
        name = r.get("reader") or f"{r['atheris']}, coverage-guided"
        own = count.setdefault(name, collections.Counter())
        own.update({k: r.get(k, 0) for k in ("inputs", "refused", "failures")})
    rows = [
        [name, f"{of['inputs']:,}", str(of["failures"])] for name, of in count.items()
    ]
    total = sum(count.values(), collections.Counter())
    rows.append(["all", f"{total['inputs']:,}", str(total["failures"])])
    head = ["reader", "inputs", "that ended in neither an answer nor one sentence"]
    return markdown(head, rows)


def accounting(lines: Lines) -> str:
    """Epsilon and noise of very long and very varied plans."""
    rows = [
        [
            _question(r),
            f"{r['steps']:,}",
            f"{r['stages']:,}",
            significant(r["seconds"], 2),
            f"{r['peak_gib']:.2f}",
            significant(r["cached_seconds"], 2),
        ]
        for r in sorted(lines("accounting"), key=_order)
        if r["steps"] != _TRUNCATED_STEPS
    ]
    return markdown(
        [
            "question",
            "steps",
            "stages",
            "processor seconds",
            "peak memory, GiB",
            "again, from disk, s",
        ],
        rows,
    )


_TRUNCATED_STEPS = 10_000
_order: Callable[[Record], tuple] = lambda r: (r["given"], r["stages"], r["steps"])  # noqa: E731


def _question(record: Record) -> str:
    name, value = record["given"].split("=")
    if name == "epsilon":
        return f"noise for epsilon {float(value):g}"
    return f"epsilon of noise multiplier {float(value):g}"


def truncation(lines: Lines) -> str:
    """What cutting large Poisson draws costs."""
    rows = []
    cut = [r for r in lines("accounting") if r["steps"] == _TRUNCATED_STEPS]
    for r in sorted(cut, key=lambda r: -(r["max_batch_size"] or 1e9)):
        largest = r["max_batch_size"]
        words = f"{largest:,}" if largest else "not cut"
        rows.append([words, f"{r['noise_multiplier']:.4f}"])
    head = [
        "1,000 of 1,000,000 a step, 10,000 steps: draws cut to",
        "noise multiplier for epsilon 4",
    ]
    return markdown(head, rows)
