"""The best private result of every task, and what importance adds to it by source.

`RECORDS` has one row a task. A task whose lines are not there is left out.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tables.lines import (
    Lines,
    Record,
    finals,
    gap,
    markdown,
    or_tie,
    spread,
    with_interval,
)
from tables.utility import BALANCED, ILG

_NONE = "none"
_NOT_RUN = "not run"


class Measure(NamedTuple):
    """What is compared: a field of the lines, its factor, which way is better."""

    field: str
    factor: float
    sign: int
    digits: int


ACCURACY = Measure("accuracy", 100.0, 1, 2)
ERROR = Measure("mse", 1.0, -1, 4)


class Best(NamedTuple):
    """A task: its lines, its name in words, and what was best before.

    `before` is a file of older lines and the methods of it that were importance's.
    """

    file: str
    words: str
    measure: Measure = ACCURACY
    before: tuple[str, tuple[str, ...]] | None = None


RECORDS = (
    Best("compare_imdb_linear", "IMDB", before=("compare_imdb", (BALANCED,))),
    Best("compare_movielens", "MovieLens-100K, squared error", ERROR),
    Best("compare_insteval", "InstEval, squared error", ERROR),
    Best("compare_flights_prior", "Flights", before=("compare_flights", (ILG,))),
    Best(
        "compare_cifar_roots",
        "CIFAR-10, fixed features",
        before=("compare_cifar_scattering", (ILG,)),
    ),
    Best("compare_cifar_features", "CIFAR-10, the same without square roots"),
    Best("compare_cifar_conv", "CIFAR-10, CNN", before=("compare_cifar_cnn", (ILG,))),
    Best("compare_digits_sources", "Digits, MLP"),
    Best(
        "compare_mnist_probe", "MNIST, tanh CNN", before=("compare_mnist_cnn", (ILG,))
    ),
    Best(
        "compare_fashion_probe",
        "Fashion-MNIST, tanh CNN",
        before=("compare_fashion_cnn", (ILG,)),
    ),
)
Cells = Mapping[tuple[str, float], dict[int, float]]


class Method(NamedTuple):
    """A method of a cell: its name, where its importance comes from, its results."""

    name: str
    source: str
    by_seed: dict[int, float]

    def mean(self) -> float:
        """Over its seeds."""
        return sum(self.by_seed.values()) / len(self.by_seed)


def source_of(config: Mapping[str, Any]) -> str:
    """Where a run's importance comes from, in a word; empty for a uniform run."""
    chosen = config["optimizer"]
    method, source = chosen["method"], chosen["source"]
    if not method.startswith(("dp_adam_ilg", "dp_sgd_ilg")):
        return ""
    section = config.get(source) or {}
    if source in ("prior", "probe"):
        charged = section.get("groups") == "scores"
        return f"{source} and scores" if charged else source
    return "" if chosen["importance"] == "uniform" else source


def methods(lines: Lines, row: Best, epsilon: float) -> list[Method]:
    """The methods of a cell, in the order of their lines."""
    return [
        Method(name, source_of(runs[0]["config"]), _by_seed(runs, row.measure))
        for (name, e), runs in _finals(lines, row).items()
        if e == epsilon
    ]


def _finals(lines: Lines, row: Best) -> dict[tuple[str, float], list[Record]]:
    return finals(lines(row.file), row.measure.field)


def _by_seed(runs: list[Record], measure: Measure) -> dict[int, float]:
    return {run["seed"]: measure.factor * run[measure.field] for run in runs}


def _present(lines: Lines) -> list[tuple[Best, float]]:
    """The cells that have lines."""
    found = []
    for row in RECORDS:
        try:
            epsilons = sorted({epsilon for _, epsilon in _finals(lines, row)})
        except FileNotFoundError:
            continue
        found += [(row, epsilon) for epsilon in epsilons]
    return found


def _best(found: list[Method], row: Best) -> Method | None:
    return max(found, key=lambda m: row.measure.sign * m.mean(), default=None)


def _before(lines: Lines, row: Best, epsilon: float) -> str:
    """The best of the older lines at this epsilon."""
    if row.before is None:
        return _NONE
    file, names = row.before
    old = finals(lines(file), row.measure.field)
    at = [_by_seed(old[n, epsilon], row.measure) for n in names if (n, epsilon) in old]
    return spread(at[0].values(), row.measure.digits) if at else _NONE


def best(lines: Lines) -> str:
    """Before, the strongest uniform run, and the best with importance."""
    head = [
        "task",
        "epsilon",
        "before",
        "strongest uniform run",
        "best with importance",
        "its source",
        "difference, 95 % interval",
    ]
    rows = []
    for row, epsilon in _present(lines):
        found = methods(lines, row, epsilon)
        plain = _best([m for m in found if not m.source], row)
        shaped = _best([m for m in found if m.source], row)
        cells = [row.words, f"{epsilon:g}", _before(lines, row, epsilon)]
        digits = row.measure.digits
        cells += [_told(method, digits) for method in (plain, shaped)]
        cells += [f"{shaped.source}: {shaped.name}" if shaped else _NOT_RUN]
        rows.append([*cells, _won(shaped, plain, digits)])
    return markdown(head, rows)


def _told(method: Method | None, digits: int) -> str:
    """Mean and spread over its seeds, and where there are fewer than five how many."""
    if method is None:
        return _NOT_RUN
    found, count = spread(method.by_seed.values(), digits), len(method.by_seed)
    few = {1: " (one seed)"}.get(count, f" ({count} seeds)")
    return found + few * (count < 5)


def _won(shaped: Method | None, plain: Method | None, digits: int) -> str:
    """What the best with importance is better by than the best without."""
    if shaped is None or plain is None:
        return _NOT_RUN
    found = gap(shaped.by_seed, plain.by_seed)
    return "one seed" if found.pairs == 1 else or_tie(found, digits)


def by_source(lines: Lines) -> str:
    """Every method against the strongest uniform run of its cell."""
    head = ["task", "epsilon", "method", "source", "test", "against uniform, 95 %"]
    rows = []
    for row, epsilon in _present(lines):
        found = methods(lines, row, epsilon)
        plain = _best([m for m in found if not m.source], row)
        for one in found:
            digits = row.measure.digits
            versus = "base"
            if plain is not None and one is not plain:
                versus = _gap(one, plain, digits)
            cells = [row.words, f"{epsilon:g}", one.name, one.source or _NONE]
            rows.append([*cells, spread(one.by_seed.values(), digits), versus])
    return markdown(head, rows)


def _gap(one: Method, plain: Method, digits: int) -> str:
    found = gap(one.by_seed, plain.by_seed)
    return "one seed" if found.pairs == 1 else with_interval(found, digits)
