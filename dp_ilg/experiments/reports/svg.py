"""The look of every figure, and how a figure becomes a file or part of a page.

The caller's rcParams and pyplot's global figures are neither read nor changed, and
the same figure gives the same bytes.
"""

import io
import os.path
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib import style
from matplotlib.figure import Figure

# The colours of the light theme; `inline_svg` replaces each by the page's variable.
INK, MUTED, GRID = "#1f2328", "#656d76", "#d5dae0"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # Okabe and Ito (2008)
CSS_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
}
_STYLE: dict[str, Any] = {
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "dp_ilg",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.color": GRID,
    "ytick.labelcolor": MUTED,
}
styled = style.context(_STYLE, after_reset=True)


def printable(text: str) -> str:
    """Returns `text` with every unprintable character shown as a replacement mark.

    Args:
        text: any text; control characters and lone surrogates break SVG and UTF-8.

    Returns:
        The printable text.

    Example:
        >>> printable("dense" + chr(0))
        'dense�'
    """
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def short_names(names: Sequence[str], width: int) -> list[str]:
    """Returns names as printable labels that fit: one line, no twins, no mathematics.

    What all names begin with goes first, then the middle of a name that is still
    too long; labels that became equal get their row's number.

    Args:
        names: paths of layers, for example.
        width: the largest number of characters, a row's number apart.

    Returns:
        One label a name.

    Example:
        >>> short_names(["encoder/block_0/query", "encoder/block_1/query"], 20)
        ['…/block_0/query', '…/block_1/query']
        >>> short_names(["encoder_block_0/query", "encoder_block_1/query"], 9)
        ['enco…uery #1', 'enco…uery #2']
    """
    names = [printable(name) for name in names]
    common = os.path.commonprefix(names) if len(names) > 1 else ""
    common = common[: common.rfind("/") + 1]
    if common and max(map(len, names)) > width:
        names = [f"…/{name[len(common) :]}" for name in names]
    labels = [_cut_middle(name, width) for name in names]
    if len(set(labels)) < len(labels):
        labels = [f"{label} #{row}" for row, label in enumerate(labels, 1)]
    return labels


def _cut_middle(text: str, width: int) -> str:
    tail = width // 2
    return text if len(text) <= width else f"{text[: width - 1 - tail]}…{text[-tail:]}"


def save_figure(figure: Figure, path: Path) -> None:
    """Writes `figure` as the file type of `path`, on white, the same bytes each time.

    Args:
        figure: one of this module's figures.
        path: where to; the ending decides between PNG, SVG and PDF.

    Raises:
        ValueError: for an ending Matplotlib does not know.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "empty.png"
        >>> save_figure(Figure(figsize=(2, 1)), path)
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    _save(figure, path, path.suffix.lstrip("."), facecolor="white", transparent=False)


@styled
def _save(figure: Figure, target: Any, kind: str, **options: Any) -> None:
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(
            target, format=kind, dpi=200, metadata=undated.get(kind), **options
        )


def inline_svg(figure: Figure, prefix: str, description: str) -> str:
    """Returns `figure` as an SVG element that follows the page's fonts and colours.

    Args:
        figure: one of this module's figures.
        prefix: makes the element's ids unique in the page.
        description: what a screen reader says instead.

    Returns:
        Well-formed markup without scripts, addresses or a name space.

    Example:
        >>> figure = Figure(figsize=(2, 1))
        >>> _ = figure.text(0.5, 0.5, "hello", color=BLUE)
        >>> svg = inline_svg(figure, "a", "A greeting")
        >>> svg[:4], "var(--blue)" in svg, "http" in svg
        ('<svg', True, False)
    """
    buffer = io.BytesIO()
    _save(figure, buffer, "svg")
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {
            name.rpartition("}")[2]: _page_value(name, value, prefix)
            for name, value in element.attrib.items()
        }
    width, height = figure.get_size_inches()
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": printable(description),
        "style": f"width:{96 * width:.0f}px;aspect-ratio:{width:.3f}/{height:.3f}",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _page_value(name: str, value: str, prefix: str) -> str:
    """Returns an SVG attribute with the page's ids, colours and font."""
    if name == "id":
        return f"{prefix}-{value}"
    if name.endswith("href") and value.startswith("#"):
        return f"#{prefix}-{value[1:]}"
    value = value.replace("url(#", f"url(#{prefix}-")
    for colour, variable in CSS_VARIABLES.items():
        value = value.replace(colour, f"var({variable})")
    return re.sub(r"font: ([^;]*?)([\d.]+px) [^;]*", _font, value)


def _font(match: re.Match[str]) -> str:
    weight = "font-weight: 600; " if "bold" in match[1] or "700" in match[1] else ""
    return f"{weight}font-size: {match[2]}"
