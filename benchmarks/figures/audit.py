"""Lower bounds on epsilon that attacks on a trainer found."""

from matplotlib.figure import Figure

from dp_ilg.experiments.audits.plot import bounds_figure
from figures.look import WIDTH, Drawing, Numbers, title
from tables.lines import Lines

_FIELDS = ("canary", "adversary", "lower_bound", "if_gaussian")


def numbers(lines: Lines) -> Numbers:
    """The bounds and the claim."""
    (audit,) = lines("audit_trainer")
    rows = [{name: row[name] for name in _FIELDS} for row in audit["rows"]]
    return {"claim": audit["claim"], "rows": rows}


def draw(found: Numbers) -> Figure:
    """The figure of `dp-ilg audit`, as narrow as the others."""
    figure = bounds_figure(found["rows"], found["claim"])
    figure.set_size_inches(WIDTH, 0.34 * len(found["rows"]) + 2.0)
    (axes,) = figure.axes
    axes.set_axisbelow(True)
    for line in axes.lines:
        line.set_clip_on(False)  # a bound of zero is a whole dot
    title(figure, "What attacks on a trainer found")
    return figure


AUDIT = Drawing(numbers, draw)
