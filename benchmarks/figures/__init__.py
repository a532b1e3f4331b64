"""Figures of the documentation, made from benchmarks/results by docs_figures.py."""

from figures.audit import AUDIT
from figures.growth import GROWTH
from figures.imdb import IMDB_FIGURE
from figures.layers import LAYERS
from figures.look import Drawing
from figures.metrics import METRICS
from figures.speed import SPEED

FIGURES: dict[str, Drawing] = {  # the name of the file in docs/assets
    "speed": SPEED,
    "imdb": IMDB_FIGURE,
    "layers": LAYERS,
    "growth": GROWTH,
    "audit": AUDIT,
    "metrics": METRICS,
}
