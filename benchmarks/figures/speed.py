"""The time of one clipped gradient, library by library."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dp_ilg.experiments.reports.svg import BLUE, GRID, INK, MUTED
from figures.look import ON_WHITE, PLAIN, WIDTH, Drawing, Numbers, bare, title
from tables.lines import Lines
from tables.speed import over_best
from tables.steps import MODELS

_SHOWN = {  # what is drawn -> the families of the benchmark it is the best of
    "dp_ilg": ("auto",),
    "Opacus": ("opacus_ghost", "opacus_hooks"),
    "plain vmap": ("vmap",),
    "jax-privacy": ("jax_privacy",),
}
_NAMES = {
    "mlp": "MLP 784-1000-10",
    "cifar_cnn": "CIFAR CNN, GroupNorm",
    "lm_d128": "Language model, 1,000 words",
    "lm_v10k": "Language model, 10,000 words",
    "no_fast_path": "Weight norm: no fast path",
}
_END, _ROW, _GAP, _HEAD = 6.0, 1.0, 0.55, 1.0  # end of the axis; heights


def numbers(lines: Lines) -> Numbers:
    """Ratios by model and library; models on which others were not timed left out."""
    found = {}
    for row, ratios in over_best(lines, "gradient").items():
        best = {
            words: min(ratios[of] for of in families if of in ratios)
            for words, families in _SHOWN.items()
            if any(of in ratios for of in families)
        }
        if len(best) > 1:
            found[_NAMES.get(row, MODELS[row])] = best
    return found


def draw(found: Numbers) -> Figure:
    """Bars in groups, one group a model."""
    height = sum(_HEAD + _GAP + _ROW * len(of) for of in found.values())
    figure = Figure(figsize=(WIDTH, 0.235 * height + 1.75))
    axes = figure.add_subplot()
    place, ticks, names = 0.0, [], []
    for model, ratios in found.items():
        _name(axes, place, model)
        place += _HEAD
        for words, ratio in ratios.items():
            _bar(axes, place, words, ratio)
            ticks.append(place)
            names.append(words)
            place += _ROW
        place += _GAP
    axes.set_yticks(ticks, names)
    axes.set_ylim(place - _GAP, -1.6)
    _base(axes)
    title(figure, "Time of one private (clipped) gradient")
    return figure


def _base(axes: Axes) -> None:
    """The one base of all bars, and the axis."""
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.set_xlim(0, _END * 1.17)
    axes.set_xticks(range(int(_END) + 1))
    bare(axes)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.text(1.08, -1.15, "1 = ordinary, not private", va="center", bbox=ON_WHITE)
    axes.set_xlabel(
        "time over that of the best ordinary gradient\n"
        "of the same model (Opacus: in PyTorch)"
    )


def _name(axes: Axes, place: float, model: str) -> None:
    axes.text(
        -0.33,
        place,
        model,
        transform=axes.get_yaxis_transform(),
        va="center",
        fontweight="bold",
        bbox=ON_WHITE,
    )


def _bar(axes: Axes, place: float, words: str, ratio: float) -> None:
    ours = words == "dp_ilg"
    colour = BLUE if ours else PLAIN
    axes.barh(place, min(ratio, _END), 0.74, color=colour)
    end = min(ratio, _END)
    if ratio > _END:  # cut: two white strokes through the bar, and its number
        for shift in (0.28, 0.42):
            axes.plot(
                [_END - shift - 0.06, _END - shift + 0.06],
                [place + 0.5, place - 0.5],
                color="white",
                linewidth=2.2,
            )
    axes.text(
        end + 0.1,
        place,
        label(ratio),
        va="center",
        color=INK if ours else MUTED,
        fontweight="bold" if ours else "normal",
        bbox=ON_WHITE,
    )


def label(ratio: float) -> str:
    """The number at the end of a bar."""
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2f}"


SPEED = Drawing(numbers, draw)
