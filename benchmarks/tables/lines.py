"""Result lines as they were measured, and the pieces of which tables are made.

A table is a function of `Lines`, which maps the name of a file in benchmarks/results to
its records, so that a test can hand in others.
"""

import functools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from common import RESULTS
from dp_ilg.experiments.sweeps.statistics import Difference, paired_difference

Record = dict[str, Any]
Lines = Callable[[str], Sequence[Record]]
Table = Callable[[Lines], str]
BySeed = Mapping[int, float]
TIE = "tie"
_NBSP = "\N{NO-BREAK SPACE}"  # so that a narrow column breaks in the right places


@functools.cache
def measured(name: str) -> tuple[Record, ...]:
    """The records of one file of results, in the order they were written."""
    text = (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in text.splitlines())


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; a row that is short or long is refused."""
    rows = [list(row) for row in rows]
    if any(len(row) != len(head) for row in rows):
        raise ValueError(f"Rows of {head[0]!r} must have {len(head)} cells.")
    lines = [list(head), ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(
    records: Iterable[Record], field: str = "test_accuracy"
) -> dict[int, float]:
    """Accuracy in percent by seed."""
    return {record["seed"]: 100 * record[field] for record in records}


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean and standard deviation; of one value the value."""
    found = list(values)
    mean = f"{statistics.mean(found):.{digits}f}"
    return (
        mean
        if len(found) == 1
        else f"{mean}{_NBSP}±{_NBSP}{statistics.stdev(found):.{digits}f}"
    )


def gap(ours: BySeed, theirs: BySeed) -> Difference:
    """The paired difference; without a shared seed there is none."""
    found = paired_difference(ours, theirs)
    if found is None:
        raise ValueError("No seed was run with both methods.")
    return found


def with_interval(found: Difference, digits: int = 2) -> str:
    """A difference and its interval, with a sign."""
    mean, low, high = (f"{x:+.{digits}f}" for x in (found.mean, found.low, found.high))
    return f"{mean} [{low},{_NBSP}{high}]"


def or_tie(found: Difference, digits: int = 2) -> str:
    """A difference with its interval, or that the interval includes zero."""
    return TIE if found.verdict() == TIE else with_interval(found, digits)


def finals(
    records: Iterable[Record], field: str = "accuracy"
) -> dict[tuple[str, float], list[Record]]:
    """The reported runs of a sweep by (method, epsilon).

    Where a sweep was extended by a larger grid, the last recorded choice counts.
    """
    records = list(records)
    chosen = {
        (r["method"], r["epsilon"]): _setting(r)
        for r in records
        if r["kind"] == "choice"
    }
    found: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        cell = (record["method"], record["epsilon"])
        reported = record["kind"] == "run" and record["phase"] == "final"
        if reported and field in record and _setting(record) == chosen[cell]:
            found.setdefault(cell, []).append(record)
    return found


def _setting(record: Record) -> tuple[float, str, Any]:
    return record["learning_rate"], record["parameter"], record["value"]


def accuracies(records: Iterable[Record]) -> dict[tuple[str, float], dict[int, float]]:
    """Test accuracy in percent by (method, epsilon) and seed."""
    return {cell: percent(runs, "accuracy") for cell, runs in finals(records).items()}


def group(records: Iterable[Record], *fields: str) -> dict[Any, list[Record]]:
    """Records by the values of some fields, in the order they come."""
    found: dict[Any, list[Record]] = {}
    for record in records:
        key = tuple(record[field] for field in fields)
        found.setdefault(key[0] if len(fields) == 1 else key, []).append(record)
    return found


def significant(value: float, digits: int = 3) -> str:
    """A number with so many digits and no exponent."""
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{max(places, 0)}f}"
