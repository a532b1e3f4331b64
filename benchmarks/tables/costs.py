"""Tables of what large batches, noise, data and devices cost, and a roofline."""

from statistics import median

from tables.lines import (
    Lines,
    gap,
    group,
    markdown,
    percent,
    significant,
    spread,
    with_interval,
)
from tables.steps import MODELS


def lots(lines: Lines) -> str:
    """One step on a batch of any size."""
    rows = [
        [
            f"{r['batch_size']:,}",
            f"{r['drawn']:,}",
            str(r["chunks"]),
            str(r["microbatch"]),
            f"{r['above_mib']:.0f}",
            f"{r['seconds']:.0f}",
        ]
        for r in lines("memory")
    ]
    return markdown(
        [
            "CIFAR CNN, expected batch",
            "drawn",
            f"chunks of {lines('memory')[0]['chunk_size']:,}",
            "micro-batch",
            "peak above the model, MiB",
            "seconds, compiling included",
        ],
        rows,
    )


def fine_tuning(lines: Lines) -> str:
    """A network of GPT-2 small's shape."""
    named = {"lora": "adapters, rank 8", "bias": "biases", "all": "all parameters"}
    rows = []
    for r in lines("fine_tune"):
        work = r["work"]
        rows.append(
            [
                named[r["row"]],
                f"{r['trained_parameters']:,}",
                str(r["batch_size"]),
                f"{r['median_seconds']:.1f}",
                f"{r['peak_mib'] / 1024:.1f}",
                f"{work['flops_per_example'] / 1e9:.0f}",
                f"{work['ordinary_flops_per_example'] / 1e9:.0f}",
            ]
        )
    return markdown(
        [
            "trained",
            "parameters",
            "texts of 64 tokens",
            "private step, s",
            "peak memory, GiB",
            "GFLOP a text, counted",
            "ordinary, all parameters",
        ],
        rows,
    )


def noise_cost(lines: Lines) -> str:
    """Normal draws, and their share of an embedding's step."""
    rows = [
        [
            r["model"],
            f"{r['draws']:,}",
            f"{r['short_tailed_ms']:.2f}",
            f"{r['threefry_ms']:.2f}",
            f"{r['ratio']:.2f}",
            f"{r['secure_ms']:.1f}",
            f"{r['exact_ms']:.0f}",
        ]
        for r in lines("audit_noise_cost")
    ]
    head = ["model", "numbers", "23 bits, ms", "default, ms"]
    return markdown([*head, "ratio", "SHAKE-256, ms", "exact, ms"], rows)


def maps(lines: Lines) -> str:
    """The clipped gradient in mapped coordinates, beside the same without."""
    rows = [
        [
            r["model"],
            f"{r['none_ms']:.1f}",
            f"{r['scales_ms']:.1f}",
            f"{r['scales_ratio']:.2f}",
            f"{r['matrices_ms']:.1f}",
            f"{r['matrices_ratio']:.2f}",
        ]
        for r in lines("maps")
    ]
    head = ["model", "no maps, ms", "scales, ms", "ratio", "matrices, ms", "ratio"]
    return markdown(head, rows)


def noise_density(lines: Lines) -> str:
    """How far a draw's density is from a Gaussian's, by enumeration."""
    rows = [
        [f"{r['stddevs']}", f"{r['relative_error']:.1e}", r["float32"]]
        for r in lines("noise_density")
    ]
    head = ["standard deviations", "largest relative error", "23 bits"]
    return markdown(head, rows)


def exactness_time(lines: Lines) -> str:
    """The private step before and after norms, sums and noise had their proofs."""
    rows = [
        [
            MODELS[r["row"]],
            f"{r['before_ms']:,.1f}",
            f"{r['after_ms']:,.1f}",
            f"{r['ratio']:.2f}",
            f"{r['before_mib']:.0f} / {r['after_mib']:.0f}",
        ]
        for r in lines("two_codes_step")
    ]
    head = ["step", "before, ms", "after, ms", "ratio", "MiB, before / after"]
    return markdown(head, rows)


def exactness_accuracy(lines: Lines) -> str:
    """Accuracy before and after, over the same seeds."""
    rows = []
    for task, own in group(lines("two_codes"), "task").items():
        before, after = (
            percent(r for r in own if r["code"] == code) for code in ("before", "after")
        )
        rows.append(
            [
                task.replace("_", " "),
                spread(before.values()),
                spread(after.values()),
                with_interval(gap(after, before)),
                str(len(before.keys() & after.keys())),
            ]
        )
    head = ["configuration", "before, %", "after, %"]
    return markdown([*head, "after - before, 95 %", "seeds"], rows)


def embedding(lines: Lines) -> str:
    """The step of a large embedding, on all rows and on kept ones; medians of runs."""
    rows = []
    for own in group(lines("embedding"), "rows", "kept").values():
        r = own[-1]
        shares = [x["noise_share"] for x in own if "noise_share" in x]
        times = [[x["milliseconds"][name] for x in own] for name in ("clipped", "step")]
        rows.append(
            [
                f"{r['rows']:,} x {r['width']}",
                f"{r['kept']:,}" if r["kept"] else "all",
                f"{r['touched_rows']:,}",
                *[f"{median(x):.0f} ({min(x):.0f} to {max(x):.0f})" for x in times],
                f"{100 * median(shares):.0f} %" if shares else "not measured",
            ]
        )
    return markdown(
        [
            "embedding",
            "rows in the step",
            "rows drawn",
            "clipped sum, ms",
            "whole step, ms",
            "share of noise",
        ],
        rows,
    )


def kept_rows(lines: Lines) -> str:
    """Accuracy and time of a step with noise on all rows, and on kept ones."""
    rows = []
    names = {"clicks": "made-up clicks, 200,000 rows", "imdb": "IMDB, 10,000 rows"}
    for cell, own in group(lines("kept_rows"), "task", "epsilon").items():
        by = group(own, "method")
        found = {name: percent(runs, "accuracy") for name, runs in by.items()}
        times = {
            name: median(r["milliseconds_a_step"] for r in runs)
            for name, runs in by.items()
        }
        shared = sorted(found["all"].keys() & found["kept"].keys())
        pair = [{s: found[name][s] for s in shared} for name in ("kept", "all")]
        rows.append(
            [
                names[cell[0]],
                f"{cell[1]:g}",
                spread(pair[1].values()),
                spread(pair[0].values()),
                with_interval(gap(*pair)) if len(shared) > 1 else "one seed",
                str(len(shared)),
                f"{times['all']:.0f} and {times['kept']:.0f}",
            ]
        )
    head = ["task", "epsilon", "all rows, %", "kept rows, %", "kept - all, 95 %"]
    return markdown([*head, "seeds", "ms a step"], rows)


def waiting(lines: Lines) -> str:
    """Share of the loop's time in which it waited for rows."""
    named = {
        "memory": "memory",
        "shards": "shards, not in the system's cache",
        "python": "a list read row by row in Python",
        "grain": "Grain's `MapDataset` over that list",
    }
    found = group(lines("input"), "source")
    rows = []
    for source, words in named.items():
        share = {r["ahead"]: 100 * r["waited_share"] for r in found[source]}
        rows.append([words, f"{share[0]:.1f} %", f"{share[2]:.2g} %"])
    first = lines("input")[0]
    head = f"{first['batch_size']:,} of {first['rows']:,} images a step, from"
    return markdown([head, "waiting, without a thread", "waiting, with it"], rows)


def scaling(lines: Lines) -> str:
    """Time and bytes of a step over devices."""
    rows = [
        [
            r["kind"],
            f"{r['batch']:,}",
            str(r["processes"]),
            str(r["devices"]),
            str(r["shards"]),
            f"{r['step_ms']:.0f}",
            _sent(r["sent_bytes"]),
            _sent(r["ordinary_sent_bytes"]),
        ]
        for r in lines("scaling")
    ]
    return markdown(
        [
            "MLP 784-1000-10, scaling",
            "batch",
            "processes",
            "devices",
            "pieces of a copy",
            "private step, ms",
            "sent a step, MB",
            "ordinary step, MB",
        ],
        rows,
    )


def _sent(by_kind: dict[str, int]) -> str:
    return f"{sum(by_kind.values()) / 1e6:.2f}"


def roofline(lines: Lines) -> str:
    """Counted work of the whole step, and times expected from published peaks."""
    found = group(lines("roofline"), "row")
    rows = []
    for row, words in MODELS.items():
        own = {r["family"]: r for r in found[row]}
        pair = [own["auto"], own["ordinary"]]
        rows.append(
            [
                f"{words} ({pair[0]['batch_size']})",
                _pair(pair, lambda r: r["flops"] / 1e9),
                _pair(pair, lambda r: r["bytes"] / 1e6),
                _pair(pair, lambda r: r["flops_per_byte"]),
                _pair(pair, lambda r: 1e3 * _expected(r, "A100")),
                _pair(pair, lambda r: 1e3 * _expected(r, "H100")),
            ]
        )
    return markdown(
        [
            "whole step (batch), private / Adam",
            "GFLOP",
            "MB moved",
            "FLOP per byte",
            "A100, expected ms",
            "H100, expected ms",
        ],
        rows,
    )


def _pair(records: list[dict], of) -> str:
    return " / ".join(significant(of(record)) for record in records)


def _expected(record: dict, chip: str) -> float:
    times = record["expected_seconds"]
    return next(v for name, v in times.items() if name.startswith(chip))


def front_door(lines: Lines) -> str:
    """The front door beside the loop by hand: a step, and the loop around it."""
    rows = [
        [
            f"{r['model']}, {r['what']}",
            f"{significant(r['by_hand_ms'])} ms",
            f"{significant(r['front_door_ms'])} ms",
            f"{r['ratio']:.3f}",
            str(r["repeats"]),
        ]
        for r in lines("front_door")
    ]
    return markdown(
        ["what, batch 256", "by hand", "`private_training`", "ratio", "repeats"], rows
    )
