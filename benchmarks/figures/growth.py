"""How time grows with batch, depth and width."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dp_ilg.experiments.reports.svg import BLUE, MUTED
from figures.look import WIDTH, Drawing, Numbers, title
from tables.lines import Lines
from tables.speed import SERIES, points

_LINES = (("ordinary", MUTED, "s", "not private"), ("bookkeeping", BLUE, "o", "dp_ilg"))


def numbers(lines: Lines) -> Numbers:
    """Milliseconds by series, family and point; an example's where the batch grows."""
    found: Numbers = {}
    for series, words in SERIES.items():
        each = words.endswith("batch")
        for point, facts in points(lines, series, "gradient").items():
            for family, *_ in _LINES:
                time = facts[family]["milliseconds"] / (point if each else 1)
                found.setdefault(words, {}).setdefault(family, {})[f"{point}"] = time
    return found


def draw(found: Numbers) -> Figure:
    """One panel a series."""
    rows = -(-len(found) // 2)
    figure = Figure(figsize=(WIDTH, 2.35 * rows + 0.4))
    panels = figure.subplots(rows, 2).flatten()
    for axes, (words, families) in zip(panels, found.items(), strict=False):
        _panel(axes, words, families)
    handles, labels = panels[0].get_legend_handles_labels()
    for axes in panels[len(found) :]:
        axes.set_axis_off()
        axes.legend(handles, labels, loc="center")
    title(figure, "Time of one gradient, equal micro-batches")
    return figure


def _panel(axes: Axes, words: str, families: Numbers) -> None:
    for family, colour, marker, label in _LINES:
        own = {int(point): value for point, value in families[family].items()}
        axes.plot(
            list(own),
            list(own.values()),
            color=colour,
            marker=marker,
            linewidth=2,
            label=label,
        )
    ticks = list(own)[:: 1 if len(own) < 5 else 2]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    highest = max(max(of.values()) for of in families.values())
    axes.set_ylim(0, 1.12 * highest)
    unit = "ms an example" if words.endswith("batch") else "ms"
    model, _, changed = words.partition(", ")
    model = model.replace("LM", "Language model")
    axes.set_title(f"{model}, {unit}", loc="left", fontsize=11)
    axes.set_xlabel(changed)
    axes.grid(axis="y")


GROWTH = Drawing(numbers, draw)
