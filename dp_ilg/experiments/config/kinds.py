"""What is asked of an example, and how an answer is measured: a row a kind of task.

Everything that shows or compares what a run reached reads it here, so that no page
takes a squared error for a share of right answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """What is measured on test examples.

    Attributes:
        name: its key in results; ``test_`` before it in ``metrics.jsonl``.
        words: its name, for people.
        scale: what it is multiplied with where it is shown.
        unit: the unit it is then shown in, after a space; may be empty.
        digits: how many stand behind the point in a table.
        least: whether the smaller one is the better.
        most: the largest value it can have, None for none.

    Example:
        >>> MEASURES["accuracy"].shown(0.8125), MEASURES["mse"].shown(0.5)
        ('81.25 %', '0.5000')
    """

    name: str
    words: str
    scale: float = 1.0
    unit: str = ""
    digits: int = 4
    least: bool = False
    most: float | None = None

    @property
    def key(self) -> str:
        """Its key in ``metrics.jsonl`` and ``summary.json``."""
        return f"test_{self.name}"

    @property
    def in_units(self) -> str:
        """Its unit in words, for a title.

        Example:
            >>> MEASURES["accuracy"].in_units, MEASURES["mse"].in_units
            (' (%)', '')
        """
        return f" ({self.unit})" if self.unit else ""

    def shown(self, value: float, digits: int | None = None) -> str:
        """A value for people, with its unit.

        Args:
            value: as it stands in results.
            digits: behind the point; by default the measure's own.
        """
        places = self.digits if digits is None else digits
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.scale * value:.{places}f}{unit}"

    def is_sound(self, value: float) -> bool:
        """Whether a value can be one of this measure.

        Example:
            >>> MEASURES["accuracy"].is_sound(1.5), MEASURES["mse"].is_sound(1.5)
            (False, True)
        """
        return 0 <= value <= (float("inf") if self.most is None else self.most)

    def better(self, value: float) -> float:
        """A number that is larger the better the value is.

        Example:
            >>> MEASURES["mse"].better(0.9) > MEASURES["mse"].better(1.2)
            True
        """
        return -value if self.least else value


_ROWS = {
    "accuracy": Measure("accuracy", "accuracy", 100.0, "%", 2, most=1.0),
    "mse": Measure("mse", "MSE", digits=4, least=True),
}
MEASURES: Mapping[str, Measure] = _ROWS
"""Name -> what a task may be measured by."""

# whether the answer is a number -> by what it is measured
_OF_TASK = {False: MEASURES["accuracy"], True: MEASURES["mse"]}


def measure_of_task(is_number: bool) -> Measure:
    """By what a task is measured.

    Args:
        is_number: whether the answer is a number, not a class.

    Returns:
        The row.

    Example:
        >>> measure_of_task(True).name
        'mse'
    """
    return _OF_TASK[is_number]


def measure_in(record: Mapping[str, Any], prefix: str = "") -> Measure:
    """Which measure a record of results holds.

    Args:
        record: a line of results, or of ``metrics.jsonl`` with the prefix "test_".
        prefix: what stands before the measure's name.

    Returns:
        The first row that is in it; accuracy if none is.

    Example:
        >>> measure_in({"test_mse": 1.0}, "test_").name
        'mse'
    """
    found = (row for row in MEASURES.values() if prefix + row.name in record)
    return next(found, MEASURES["accuracy"])
