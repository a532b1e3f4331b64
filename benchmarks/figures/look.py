"""One look for every figure of the documentation, and the numbers inside its file.

A figure is two functions: the numbers that the lines give, and a drawing of numbers.
The file carries the numbers as a comment, so that a test can compare it with the lines
without comparing drawings. Figures are narrow, because a phone shows them whole.
"""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common import ROOT
from dp_ilg.experiments.reports.svg import INK, MUTED, styled
from tables.lines import Lines

ASSETS = ROOT / "docs" / "assets"
WIDTH = 5.4  # inches
PLAIN = "#a9b1ba"  # bars of others
ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind a text
Numbers = dict[str, Any]
_COMMENT = re.compile(r"<!-- numbers: (.*?) -->")
# Whoever has no DejaVu sees another font without serifs, never one with them.
_FONTS = "'DejaVu Sans', Verdana, 'Segoe UI', Roboto, sans-serif"
_TEXT: Any = {"font.size": 11, "legend.fontsize": 11}


class Drawing(NamedTuple):
    """What a figure shows, and how."""

    numbers: Callable[[Lines], Numbers]
    draw: Callable[[Numbers], Figure]


def rounded(value: Any) -> Any:
    """Numbers with four digits, all the way down: what a reader can see."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {str(key): rounded(of) for key, of in value.items()}
    return [rounded(of) for of in value] if isinstance(value, list | tuple) else value


def path_of(name: str) -> Path:
    """Where a figure is."""
    return ASSETS / f"{name}.svg"


def shown(path: Path) -> Numbers:
    """The numbers that a file carries.

    Raises:
        ValueError: for a file without any.
    """
    found = _COMMENT.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{path.name} carries no numbers; run docs_figures.py.")
    return json.loads(found[1])


def svg(drawing: Drawing, lines: Lines) -> str:
    """The file of a figure."""
    numbers = rounded(drawing.numbers(lines))
    buffer = io.BytesIO()
    _save(drawing.draw, numbers, buffer)
    text = buffer.getvalue().decode().replace("'DejaVu Sans'", _FONTS)
    text = re.sub(r"\n <metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    note = f"<!-- numbers: {json.dumps(numbers, ensure_ascii=False)} -->"
    if "--" in note[4:-3]:
        raise ValueError("Two hyphens would end the comment; choose other words.")
    return text.replace("\n<svg ", f"\n{note}\n<svg ", 1)


@styled
def _save(draw: Callable[[Numbers], Figure], numbers: Numbers, target: Any) -> None:
    with rc_context(_TEXT):
        figure = draw(numbers)
        figure.savefig(
            target,
            format="svg",
            facecolor="white",
            transparent=False,
            metadata={"Date": None},
        )


def title(figure: Figure, text: str) -> None:
    """What the figure is about, above its panels."""
    figure.suptitle(text, fontsize=13, fontweight="bold")


def bare(axes: Axes) -> None:
    """No frame and no ticks at the side of names."""
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="both", length=0)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.tick_params(axis="x", labelcolor=MUTED)
