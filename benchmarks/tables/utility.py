"""Tables of test accuracy: importance against DP-Adam on every task."""

from collections.abc import Sequence
from typing import NamedTuple

from tables.lines import (
    Lines,
    Record,
    accuracies,
    finals,
    gap,
    group,
    markdown,
    or_tie,
    percent,
    spread,
    with_interval,
)

REFERENCE = "dp_adam"
BALANCED = "dp_adam_ilg, 8 bands, balanced"
ILG = "dp_adam_ilg"


class Task(NamedTuple):
    """A task of a sweep: its file, its name in words, its method and the other."""

    file: str
    words: str
    method: str = ILG
    reference: str = REFERENCE


IMDB = Task("compare_imdb", "IMDB, embedding in 8 bands", BALANCED)
TRANSFORMER = Task(
    "compare_imdb_transformer", "IMDB, transformer in 8 bands", "dp_adam_ilg, 8 bands"
)
FLIGHTS = Task("compare_flights", "Flights, MLP on embedded categories")
ADULT = Task("compare_adult", "Adult, MLP on embedded categories")
MNIST = Task("compare_mnist_cnn", "MNIST, tanh CNN")
CNNS = (
    MNIST,
    Task("compare_fashion_cnn", "Fashion-MNIST, tanh CNN"),
    Task("compare_cifar_cnn", "CIFAR-10, CNN with GroupNorm"),
)
SCATTERING = (
    Task("compare_mnist_scattering", "MNIST"),
    Task("compare_fashion_scattering", "Fashion-MNIST"),
    Task("compare_cifar_scattering", "CIFAR-10"),
)
NEXT_WORDS = (
    Task("compare_text_lm", "Groups: single leaves", "dp_adam_ilg, leaves"),
    Task("compare_text_lm", "Groups: 8 bands of words", "dp_adam_ilg, 8 bands"),
)
HEAD = (
    "task",
    "epsilon",
    "importance, test %",
    "DP-Adam, test %",
    "difference, 95 % interval",
)


def _rows(lines: Lines, tasks: Sequence[Task]) -> list[list[str]]:
    rows = []
    for task in tasks:
        found = accuracies(lines(task.file))
        for epsilon in sorted(e for m, e in found if m == task.method):
            ours = found[task.method, epsilon]
            theirs = found[task.reference, epsilon]
            rows.append(
                [
                    task.words,
                    f"{epsilon:g}",
                    spread(ours.values()),
                    spread(theirs.values()),
                    or_tie(gap(ours, theirs)),
                ]
            )
    return rows


def imdb(lines: Lines) -> str:
    """IMDB's embedding in bands, and with plain Adam."""
    found = accuracies(lines(IMDB.file))
    rows = []
    for _, epsilon, ours, theirs, difference in _rows(lines, [IMDB]):
        plain = found["dp_adam_ilg, 8 bands", float(epsilon)]
        balanced = gap(found[BALANCED, float(epsilon)], plain)
        cells = [spread(plain.values()), or_tie(balanced)]
        rows.append([epsilon, ours, theirs, difference, *cells])
    head = (*HEAD[1:], "importance, plain Adam, test %", "balancing is worth")
    return markdown(head, rows)


def embeddings(lines: Lines) -> str:
    """Other tasks in which groups differ in size and signal."""
    return markdown(HEAD, _rows(lines, [FLIGHTS, TRANSFORMER]))


def scattering(lines: Lines) -> str:
    """Linear models on scattering features, in bands of inputs."""
    return markdown(HEAD, _rows(lines, SCATTERING))


def cnns(lines: Lines) -> str:
    """Convolutional networks, whose layers are alike."""
    return markdown(HEAD, _rows(lines, CNNS))


def small(lines: Lines) -> str:
    """Adult, and the bundled digits."""
    digits = Task("compare_digits", "Digits, MLP", "dp_adam_ilg, min_noise_energy")
    return markdown(HEAD, _rows(lines, [ADULT, digits]))


def next_words(lines: Lines) -> str:
    """The language model: accuracy and perplexity."""
    rows = []
    records = lines("compare_text_lm")
    found = finals(records, "perplexity")
    for task in NEXT_WORDS:
        for row in _rows(lines, [task]):
            of = {
                method: {
                    r["seed"]: r["perplexity"] for r in found[method, float(row[1])]
                }
                for method in (task.method, REFERENCE)
            }
            difference = gap(of[task.method], of[REFERENCE])
            rows.append([*row, with_interval(difference)])
    return markdown((*HEAD, "perplexity, difference"), rows)


def flight_rules(lines: Lines) -> str:
    """Flights under other rules and groups."""
    found = accuracies(lines(FLIGHTS.file))
    named = {
        "`min_noise_energy`, groups: modules": ILG,
        "`min_noise_energy`, groups: single leaves": "dp_adam_ilg, leaf",
        "`equal_snr`, groups: modules": "dp_adam_ilg, equal_snr",
    }
    epsilons = sorted({epsilon for _, epsilon in found})
    rows = [
        [words] + [or_tie(gap(found[method, e], found[REFERENCE, e])) for e in epsilons]
        for words, method in named.items()
    ]
    return markdown(["against DP-Adam", *(f"epsilon {e:g}" for e in epsilons)], rows)


def digits_methods(lines: Lines) -> str:
    """All methods of the bundled sweep."""
    found = accuracies(lines("compare_digits"))
    epsilons = sorted({epsilon for _, epsilon in found})
    methods = list(dict.fromkeys(method for method, _ in found))
    rows = [
        [f"`{method}`"] + [spread(found[method, e].values()) for e in epsilons]
        for method in methods
    ]
    return markdown(["method", *(f"epsilon {e:g}, test %" for e in epsilons)], rows)


def encoders(lines: Lines) -> str:
    """Private heads on public text encoders beside what has no public weights."""
    trained = accuracies(lines(IMDB.file))
    heads = group(
        [r for r in lines("sentence_classifier") if r["validation"] is None],
        "features",
        "asked",
    )
    epsilons = sorted({epsilon for _, epsilon in heads})
    plain = "dp_adam_ilg, 8 bands"
    rows = [
        ["trained embedding in bands, plain Adam, no public weights"]
        + [spread(trained[plain, e].values()) for e in epsilons]
    ]
    scaled = accuracies(lines("compare_imdb_linear"))
    rows.append(
        ["linear model on scaled words, uniform noise, no public weights"]
        + [spread(scaled["uniform", e].values()) for e in epsilons]
    )
    named = {
        "word_vectors": "public word vectors, private linear head",
        "sentence_encoder": "public sentence encoder, private linear head",
    }
    for features, words in named.items():
        found = [percent(heads[features, e]) for e in epsilons]
        rows.append([words] + [spread(of.values()) for of in found])
    rows += [
        [f"linear model, {method}", *_present(cells, epsilons)]
        for method, cells in by_method(lines("compare_imdb_public")).items()
    ]
    return markdown(["IMDB, test %", *(f"epsilon {e:g}" for e in epsilons)], rows)


def by_method(records: Sequence[Record]) -> dict[str, dict[float, str]]:
    """Test accuracy in percent by method and epsilon, as words."""
    found: dict[str, dict[float, str]] = {}
    for (method, epsilon), runs in accuracies(records).items():
        found.setdefault(method, {})[epsilon] = spread(runs.values())
    return found


def _present(cells: dict[float, str], epsilons: Sequence[float]) -> list[str]:
    return [cells.get(epsilon, "not run") for epsilon in epsilons]


def frozen(lines: Lines) -> str:
    """Convolutions learnt on public images."""
    records: Sequence[Record] = lines("frozen_layers")
    rows = [[r["row"], spread([100 * r["test_accuracy"]])] for r in records]
    words = f"CIFAR-10's classes 5 to 9, epsilon {records[0]['job']['epsilon']:g}"
    return markdown([words, "test %, one seed"], rows)


def metric_band(lines: Lines) -> str:
    """How often the truth was within the band of released metrics."""
    records: Sequence[Record] = [
        r for r in lines("metric_band") if r["kind"] == "count"
    ]
    head = [
        "metric",
        "standard error, one step",
        "25 steps",
        "steps",
        "inside 95 %",
        "25 steps",
    ]
    rows = [
        [
            r["metric"],
            f"{r['stderr']:.4f}",
            f"{r['smoothed_stderr']:.4f}",
            f"{r['steps']:,}",
            f"{100 * r['inside']:.1f} %",
            f"{100 * r['smoothed_inside']:.1f} %",
        ]
        for r in records
    ]
    return markdown(head, rows)
