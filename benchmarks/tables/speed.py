"""Tables of the time and memory of gradients and steps."""

from tables.lines import Lines, markdown, significant
from tables.steps import CONTESTANTS, MODELS, timings


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


_GRADIENTS = (
    "gradient (batch)",
    "ordinary, ms",
    "at its best, ms",
    "clipped, ms",
    "over ordinary",
    "over best",
    "MiB, clipped / ordinary",
)


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
    return markdown(_GRADIENTS, rows)


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
