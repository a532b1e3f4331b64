"""How much noise the rule saves, task by task."""

from matplotlib.figure import Figure

from dp_ilg.experiments.reports.svg import BLUE, GRID, INK, MUTED
from figures.look import ON_WHITE, WIDTH, Drawing, Numbers, bare, title
from tables.lines import Lines
from tables.studies import TASKS


def numbers(lines: Lines) -> Numbers:
    """Noise energy of `min_noise_energy` over that of `uniform`, by falling value."""
    last = {record["task"]: record for record in lines("layer_study")}
    found = {words: last[task]["noise_energy_ratio"] for task, words in TASKS.items()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def draw(found: Numbers) -> Figure:
    """One bar a task."""
    figure = Figure(figsize=(WIDTH, 0.34 * len(found) + 1.5))
    axes, places = figure.add_subplot(), range(len(found))
    axes.barh(places, list(found.values()), 0.7, color=BLUE)
    for place, value in zip(places, found.values(), strict=True):
        text = f"{value:.2f}"
        axes.text(value + 0.02, place, text, va="center", color=MUTED, bbox=ON_WHITE)
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set_yticks(places, list(found))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1)
    bare(axes)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.set_xlabel("noise energy at the same privacy")
    title(figure, "Noise with importance, DP-Adam = 1")
    return figure


LAYERS = Drawing(numbers, draw)
