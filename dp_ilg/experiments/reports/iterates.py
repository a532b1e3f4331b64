"""An error bar that costs nothing: how much the last iterates of a run differ."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dp_ilg.experiments.config.kinds import MEASURES, Measure

MOST = 5
"""Evaluations that are looked at, from the last one backwards."""
LEAST = 3
"""With fewer there is no spread to speak of."""


class Iterates(NamedTuple):
    """Test results of the last iterates of a run.

    Attributes:
        evaluations: how many.
        first_step: steps taken at the first of them.
        last_step: steps taken at the last of them.
        mean: of the results.
        std: their standard deviation, with ``evaluations - 1`` below.

    Privacy: parameters of every step are released, and so is the average of them, if
    one is kept; what is computed from them and a public test set costs nothing.

    Example:
        >>> found = last_iterates([10, 20, 30, 40], [0.5, 0.8, 0.7, 0.9])
        >>> found.evaluations, round(found.mean, 3), round(found.std, 3)
        (3, 0.8, 0.1)
    """

    evaluations: int
    first_step: int
    last_step: int
    mean: float
    std: float

    def in_words(self, measure: Measure = MEASURES["accuracy"]) -> str:
        """One sentence, in the measure's units.

        Args:
            measure: what the results are.

        Example:
            >>> Iterates(3, 20, 40, 0.8, 0.1).in_words()
            '80.00 % ± 10.00 (mean and standard deviation of 3 evaluations, steps 20 \
to 40): how much the iterates vary, not how much another seed would'
        """
        spread = f"{measure.scale * self.std:.{measure.digits}f}"
        return (
            f"{measure.shown(self.mean)} ± {spread} (mean and standard "
            f"deviation of {self.evaluations} evaluations, steps {self.first_step:,} "
            f"to {self.last_step:,}): how much the iterates vary, not how much another "
            "seed would"
        )


def last_iterates(steps: Any, results: Any) -> Iterates | None:
    """Mean and spread of a run's last evaluations.

    The last `MOST` of those in the second half of the run: before, the model still
    improves, and that is no error bar.

    Args:
        steps: numbers of steps taken at each evaluation, increasing.
        results: of the evaluations, as many.

    Returns:
        None where there are fewer than `LEAST`, or a result is not finite.

    Example:
        >>> last_iterates([10, 20], [0.5, 0.6]) is None
        True
    """
    if not len(steps):
        return None
    late = [i for i, step in enumerate(steps) if 2 * step >= steps[-1]][-MOST:]
    found = np.array([results[i] for i in late], np.float64)
    if len(late) < LEAST or not np.all(np.isfinite(found)):
        return None
    ends = int(steps[late[0]]), int(steps[late[-1]])
    return Iterates(len(late), *ends, float(found.mean()), float(found.std(ddof=1)))


def of_metrics(path: Path, name: str = "test_accuracy") -> Iterates | None:
    """The same, from the evaluations that a run has written.

    Args:
        path: its ``metrics.jsonl``.
        name: which result of an evaluation.

    Returns:
        None where too few evaluations have it. Damaged lines are left out: the report
        says what is wrong with them.

    Raises:
        OSError: if the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "metrics.jsonl")
        ...     _ = path.write_text('{"step": 1, "test_accuracy": 0.5}')
        ...     of_metrics(path) is None
        True
    """
    rows: dict[int, float] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line: Mapping[str, Any] = json.loads(text)
            rows[int(line["step"])] = float(line.get(name, math.nan))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    steps = sorted(rows)
    return last_iterates(steps, [rows[step] for step in steps])


def error_bar(path: Path) -> dict[str, Any]:
    """What a run's summary says of its last iterates.

    Args:
        path: its ``metrics.jsonl``.

    Returns:
        ``iterates``, the numbers, and ``iterates_in_words``; nothing where there are
        too few.

    Raises:
        OSError: if the file cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "metrics.jsonl")
        ...     _ = path.write_text("")
        ...     error_bar(path)
        {}
    """
    for measure in MEASURES.values():
        found = of_metrics(path, measure.key)
        if found is not None:
            words = found.in_words(measure)
            return {"iterates": found._asdict(), "iterates_in_words": words}
    return {}
