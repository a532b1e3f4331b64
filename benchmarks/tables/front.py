"""The table of the first page: a few lines of the others."""

from dp_ilg.experiments.sweeps.statistics import Difference
from tables.lines import TIE, Lines, finals, gap, markdown, or_tie, percent, spread
from tables.steps import timings
from tables.utility import FLIGHTS, IMDB, MNIST, Task

LINEAR = Task(
    "compare_imdb_linear",
    "IMDB, linear on scaled words",
    "8 bands, scores, min_noise_energy",
    "uniform",
)
_WEAKER = IMDB._replace(words="IMDB, a weaker model: embedding in 8 bands")
_GAINS = ((LINEAR, 1.0), (_WEAKER, 1.0), (FLIGHTS, 0.3), (MNIST, 3.0))
_COSTS = {"mnist_cnn": "MNIST CNN", "mlp": "MLP 784-1000-10"}


def why(lines: Lines) -> str:
    """Where importance beats DP-Adam, where it ties, and what a step costs."""
    rows = [_gain(lines, task, epsilon) for task, epsilon in _GAINS]
    rows += [_cost(lines, row, words) for row, words in _COSTS.items()]
    head = ["", "DP-Adam, or Adam", "`dp_ilg`", "difference, 95 % interval"]
    return markdown(head, rows)


def _gain(lines: Lines, task: Task, epsilon: float) -> list[str]:
    found = finals(lines(task.file))
    ours, theirs = (
        percent(found[method, epsilon], "accuracy")
        for method in (task.method, task.reference)
    )
    delta = f"{found[task.reference, epsilon][0]['delta']:.0e}".replace("e-0", "e-")
    return [
        f"{task.words}, epsilon {epsilon:g}, delta {delta}",
        f"{spread(theirs.values())} %",
        f"{spread(ours.values())} %",
        _points(gap(ours, theirs)),
    ]


def _cost(lines: Lines, row: str, words: str) -> list[str]:
    timing = timings(lines("step"), "step")[row]
    ours, best = timing.best("auto"), timing.ordinary()
    assert ours is not None
    return [
        f"time of a step, {words}, batch {timing.batch_size}",
        f"{best['milliseconds']:.1f} ms, not private",
        f"{ours['milliseconds']:.1f} ms, private",
        f"{timing.over_best('auto'):.2f} times",
    ]


def _points(found: Difference) -> str:
    """A difference in points of accuracy, or a tie."""
    words = or_tie(found)
    return words if words == TIE else f"{words} points"
