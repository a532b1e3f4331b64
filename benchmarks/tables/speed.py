"""Tables of time and memory."""

from tables.lines import Lines, group, markdown, significant
from tables.steps import CONTESTANTS, MODELS, timings


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def gradients(lines: Lines) -> str:
    """The clipped gradient of every model beside the ordinary one."""
    found = timings(lines("step"), "gradient")
    rows = []
    for row, words in MODELS.items():
        timing = found[row]
        ours, whole, best = timing.best("auto"), timing.whole(), timing.ordinary()
        assert ours is not None
        rows.append(
            [
                f"{words} ({timing.batch_size})",
                _ms(whole["milliseconds"]),
                _ms(best["milliseconds"]),
                _ms(ours["milliseconds"]),
                f"{ours['over_full_batch']:.2f}",
                f"{timing.over_best('auto'):.2f}",
                f"{ours['temporary_mib']:.0f} / {whole['temporary_mib']:.0f}",
            ]
        )
    return markdown(
        [
            "gradient (batch)",
            "ordinary, ms",
            "at its best, ms",
            "clipped, ms",
            "over ordinary",
            "over best",
            "MiB, clipped / ordinary",
        ],
        rows,
    )


def steps(lines: Lines) -> str:
    """The whole private step beside the ordinary Adam step."""
    found = timings(lines("step"), "step")
    rows = []
    for row, words in MODELS.items():
        timing = found[row]
        ours, whole = timing.best("auto"), timing.whole()
        assert ours is not None
        rows.append(
            [
                f"{words} ({timing.batch_size})",
                f"{ours['over_full_batch']:.2f}",
                f"{timing.over_best('auto'):.2f}",
                f"{ours['compile_seconds']:.1f}",
                f"{whole['compile_seconds']:.1f}",
            ]
        )
    return markdown(
        [
            "whole step (batch)",
            "private over Adam",
            "over Adam at its best",
            "compiling, private, s",
            "compiling, Adam, s",
        ],
        rows,
    )


def resident(lines: Lines) -> str:
    """Peak memory of a step's process, where it was measured."""
    found: dict[str, dict[str, float]] = {}
    for record in lines("step"):
        for variant, facts in record["contestants"].items():
            if "resident_mib" in facts:
                own = found.setdefault(record["row"], {})
                own[variant] = facts["resident_mib"]
    rows = [
        [MODELS[row], f"{of['auto/own']:.0f}", f"{of['ordinary/256']:.0f}"]
        for row, of in found.items()
    ]
    return markdown(["whole step (256)", "private, MiB", "Adam, MiB"], rows)


def over_best(lines: Lines, kind: str) -> dict[str, dict[str, float]]:
    """Time over the best ordinary one of model and framework: {row: {family: ratio}}.

    A family that was not timed on a model is left out.
    """
    found: dict[str, dict[str, float]] = {}
    for framework in ("jax", "torch"):
        for row, timing in timings(lines("step"), kind, framework).items():
            ratios = {of: timing.over_best(of) for of in CONTESTANTS}
            known = {of: ratio for of, ratio in ratios.items() if ratio is not None}
            found.setdefault(row, {}).update(known)
    return {row: found[row] for row in MODELS if row in found}


def contestants(lines: Lines) -> str:
    """All libraries on all models, over the best ordinary gradient."""
    found = over_best(lines, "gradient")
    rows = []
    for row, words in MODELS.items():
        own = found[row]
        rows.append([words, *(_times(own.get(of)) for of in CONTESTANTS)])
    return markdown(["model", *CONTESTANTS.values()], rows)


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.2f}"


SERIES = {  # series of growth.jsonl -> what grows
    "depth_lm": "LM, layers",
    "width_lm": "LM, width",
    "width_mlp": "MLP, width",
    "batch_mlp": "MLP, batch",
    "batch_cnn": "MNIST CNN, batch",
}


def points(lines: Lines, series: str, kind: str) -> dict[int, dict[str, dict]]:
    """Facts of ordinary and clipped gradients at every point; later lines count."""
    found: dict[int, dict[str, dict]] = {}
    for record in lines("growth"):
        name, point = record["row"].split("/")
        if (name, record["kind"]) == (series, kind):
            facts = {k.split("/")[0]: v for k, v in record["contestants"].items()}
            found[int(point)] = facts
    return dict(sorted(found.items()))


def growth(lines: Lines) -> str:
    """How time grows, in equal micro-batches."""
    rows = []
    for series, words in SERIES.items():
        for point, facts in points(lines, series, "gradient").items():
            ordinary, ours = facts["ordinary"], facts["bookkeeping"]
            rows.append(
                [
                    words,
                    f"{point:,}",
                    significant(ordinary["milliseconds"]),
                    significant(ours["milliseconds"]),
                    f"{ours['milliseconds'] / ordinary['milliseconds']:.2f}",
                    significant(ours["temporary_mib"], 2)
                    + " / "
                    + significant(ordinary["temporary_mib"], 2),
                ]
            )
    return markdown(
        [
            "what grows",
            "to",
            "ordinary, ms",
            "clipped, ms",
            "ratio",
            "MiB, clipped / ordinary",
        ],
        rows,
    )


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
            f"{r['threefry_ms']:.1f}",
            f"{r['secure_ms']:.1f}",
        ]
        for r in lines("audit_noise_cost")
    ]
    head = ["model", "normal numbers", "threefry, ms", "SHAKE-256, ms"]
    return markdown(head, rows)


def embedding(lines: Lines) -> str:
    """The step of a large embedding."""
    rows = [
        [
            f"{r['rows']:,} x {r['width']}",
            f"{r['batch_size']} texts of {r['words']} words",
            f"{r['touched_rows']:,}",
            f"{r['milliseconds']['clipped']:.0f}",
            f"{r['milliseconds']['step']:.0f}",
            f"{100 * r['noise_share']:.0f} %",
        ]
        for r in lines("embedding")
    ]
    return markdown(
        [
            "embedding",
            "batch",
            "rows drawn",
            "clipped sum, ms",
            "whole step, ms",
            "share of noise",
        ],
        rows,
    )


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
