"""The numbers of a comparison: means, paired differences, and what tuning cost."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dp_ilg.experiments.config.kinds import MEASURES, Measure
from dp_ilg.experiments.sweeps.board import (
    Choice,
    Find,
    choose,
    measure_of_runs,
    reached_by,
)
from dp_ilg.experiments.sweeps.runs import (
    Cell,
    Run,
    cells,
    final_runs,
    grid_of,
    tuning_runs,
)
from dp_ilg.experiments.sweeps.sweep import Sweep

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean paired difference and its confidence interval.

    Attributes:
        mean: of method minus reference.
        low: lower end of the interval; -inf for a single pair.
        high: upper end.
        pairs: number of pairs.

    Example:
        >>> Difference(1.0, 0.5, 1.5, 5).verdict()
        'above'
        >>> Difference(0.1, -0.5, 0.7, 5).verdict()
        'tie'
    """

    mean: float
    low: float
    high: float
    pairs: int

    def verdict(self) -> str:
        """Returns "above" or "below" if the interval excludes 0, else "tie"."""
        if self.low > 0:
            return "above"
        return "below" if self.high < 0 else "tie"


def paired_difference(
    method: Mapping[int, float], reference: Mapping[int, float]
) -> Difference | None:
    """Compares two methods over the seeds they share.

    Args:
        method: seed to accuracy, error or perplexity.
        reference: the same.

    Returns:
        The mean of method minus reference, with Student's 95 % interval for paired
        seeds; None without a shared seed.

    Example:
        >>> reference = {0: 1.0, 1: 1.0, 2: 1.0}
        >>> found = paired_difference({0: 3.0, 1: 4.0, 2: 5.0}, reference)
        >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3)
        (3.0, 0.516, 5.484)
    """
    seeds = sorted(method.keys() & reference.keys())
    if not seeds:
        return None
    ours, theirs = (np.array([of[s] for s in seeds]) for of in (method, reference))
    gaps = ours - theirs
    mean = float(gaps.mean())
    if len(gaps) == 1:
        return Difference(mean, -math.inf, math.inf, 1)
    error = float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
    from scipy.special import stdtrit  # slow to import

    half = float(stdtrit(len(gaps) - 1, (1 + CONFIDENCE) / 2)) * error
    return Difference(mean, mean - half, mean + half, len(gaps))


@dataclass(frozen=True)
class Result:
    """What is known of a cell, in the units in which its measure is shown.

    Attributes:
        cell: which.
        status: "done", "incomplete", "impossible", "failed" or "absent".
        note: a sentence for the last three, else what is missing.
        by_seed: what each seed that has come to an end reached on the test examples.
        mean: of them; None without any.
        deviation: their standard deviation; None for fewer than two.
        difference: against the reference; None for the reference itself.
        perplexity: test perplexity of each seed, where texts are continued.
        perplexity_gap: as `difference`, of perplexity.
        choice: the settings that were chosen.
        validation: the mean on held-out examples at that choice.
        tuned: every point of the grid with its mean on held-out examples.
        lost: tuning runs that reached nothing, impossible or failed.
        seconds: of each run that is reported, training alone.
        measure: what was measured, accuracy in percent by default.

    Example:
        >>> Result(Cell("a", "b", 1.0), "absent", "No data.").mean
    """

    cell: Cell
    status: str
    note: str = ""
    by_seed: Mapping[int, float] | None = None
    mean: float | None = None
    deviation: float | None = None
    difference: Difference | None = None
    perplexity: Mapping[int, float] = dataclasses.field(default_factory=dict)
    perplexity_gap: Difference | None = None
    choice: Choice | None = None
    validation: float | None = None
    tuned: tuple[tuple[Choice, float], ...] = ()
    lost: int = 0
    seconds: tuple[float, ...] = ()
    measure: Measure = MEASURES["accuracy"]


def measure_of_results(results: Sequence[Result]) -> Measure:
    """By what the cells of one task are measured.

    Args:
        results: of one task.

    Returns:
        The measure of the first that reached anything, accuracy if none did.

    Example:
        >>> measure_of_results([]).name
        'accuracy'
    """
    reached = (r.measure for r in results if r.by_seed or r.tuned)
    return next(reached, MEASURES["accuracy"])


def results_of(
    sweep: Sweep, find: Find, absent: Mapping[str, str]
) -> dict[Cell, Result]:
    """Everything the tables show.

    Args:
        sweep: the sweep.
        find: the record of a run, or None.
        absent: tasks without data, and why.

    Returns:
        A result for every cell, in the sweep's order.

    Example:
        >>> from dp_ilg.experiments.sweeps.sweep import Method, Task
        >>> sweep = Sweep(tasks=(Task(config="configs/digits.toml"),),
        ...     methods=(Method(),), seeds=(0, 1))
        >>> found, = results_of(sweep, lambda run: None, {}).values()
        >>> found.status, found.note
        ('incomplete', '0 of 2 runs are there.')
    """
    alone = {cell: _result(sweep, cell, find, absent) for cell in cells(sweep)}
    return {
        cell: found
        if cell.method == sweep.reference
        else _compared(found, alone[cell._replace(method=sweep.reference)])
        for cell, found in alone.items()
    }


def _compared(found: Result, other: Result) -> Result:
    return dataclasses.replace(
        found,
        difference=paired_difference(found.by_seed or {}, other.by_seed or {}),
        perplexity_gap=paired_difference(found.perplexity, other.perplexity),
    )


def _result(sweep: Sweep, cell: Cell, find: Find, absent: Mapping[str, str]) -> Result:
    tuning = tuning_runs(sweep, cell)
    chosen = choose(grid_of(sweep, cell), tuning, find)
    measure = measure_of_runs(tuning, find)
    tuned = tuple(
        (choice, measure.scale * float(np.mean(found)))
        for choice, found in _reached(tuning, find)
        if found
    )
    if chosen is None:
        status, note = _unfinished(tuning, find, sweep, absent.get(cell.task))
        return Result(cell, status, note, tuned=tuned, measure=measure)
    choice, validation = chosen
    runs = final_runs(sweep, cell, choice)
    records = [record for run in runs if (record := find(run))]
    done = [record for record in records if record["status"] == "done"]
    status, note = _unfinished(runs, find, sweep, absent.get(cell.task))
    measure = measure_of_runs([*tuning, *runs], find)
    by_seed = {r["seed"]: measure.scale * r[measure.name] for r in done}
    values = list(by_seed.values())
    return Result(
        cell,
        "done" if len(done) == len(runs) else status,
        "" if len(done) == len(runs) else note,
        by_seed=by_seed,
        mean=float(np.mean(values)) if values else None,
        deviation=float(np.std(values, ddof=1)) if len(values) > 1 else None,
        perplexity={r["seed"]: r["perplexity"] for r in done if "perplexity" in r},
        choice=choice,
        validation=None if validation is None else measure.scale * validation,
        tuned=tuned,
        lost=sum(1 for run in tuning if (find(run) or {}).get("status") != "done"),
        seconds=tuple(record["train_seconds"] for record in done),
        measure=measure,
    )


def _reached(runs: Sequence[Run], find: Find) -> list[tuple[Choice, list[float]]]:
    """As `reached_by`, of the runs that are there."""
    return reached_by([run for run in runs if find(run)], find) or []


def _unfinished(
    runs: Sequence[Run], find: Find, sweep: Sweep, absent: str | None
) -> tuple[str, str]:
    """Why runs are not all done."""
    records = [record for run in runs if (record := find(run))]
    for status in ("impossible", "failed"):
        sentences = [r["error"] for r in records if r["status"] == status]
        if sentences and len(records) == len(runs):
            return status, sentences[0]
    if absent:
        return "absent", absent
    phase = f"{len(records)} of {len(runs)} runs are there."
    tuning = bool(runs) and runs[0].phase == "tuning"
    missing = f"Tuning: {phase} Then {len(sweep.seeds)} more."
    return "incomplete", missing if tuning else phase
