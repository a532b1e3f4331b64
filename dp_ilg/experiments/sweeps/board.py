"""What is to be done next in a sweep: grids first, then the seeds they lead to."""

import dataclasses
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dp_ilg.experiments.config.kinds import Measure, measure_in
from dp_ilg.experiments.papers.reproduce import machine, tell
from dp_ilg.experiments.sweeps.results import Results, record_key
from dp_ilg.experiments.sweeps.runs import (
    Cell,
    Choice,
    Run,
    cells,
    final_runs,
    grid_of,
    tuning_runs,
)
from dp_ilg.experiments.sweeps.sweep import Grid, Sweep

Chosen = tuple[Choice, float | None]  # and what it reached, if it had rivals


class Board:
    """Hands out runs to threads and writes down what they found.

    Attributes:
        absent: tasks whose data is not there, with the sentence.
        total: number of runs of the whole sweep.

    Example:
        >>> import inspect
        >>> list(inspect.signature(Board).parameters)
        ['sweep', 'results', 'retry_failed']
    """

    def __init__(self, sweep: Sweep, results: Results, retry_failed: bool = False):
        """Looks at what is there.

        Args:
            sweep: what is to be done.
            results: what has been done.
            retry_failed: whether runs on file as failed are to be run again.
        """
        self.absent: dict[str, str] = {}
        self._sweep, self._results = sweep, results
        self._again = {
            record_key(record)  # as old records, too, are found by
            for record in results.records
            if retry_failed and record.get("status") == "failed"
        }
        self._tuning = {cell: tuning_runs(sweep, cell) for cell in cells(sweep)}
        self._final: dict[Cell, list[Run]] = {}
        self._taken: dict[str, Run] = {}
        self._stopped = False
        self._changed = threading.Condition()
        self._common = machine() | {"commit": _commit()}
        every = [run for runs in self._tuning.values() for run in runs]
        self.total = len(every) + len(self._tuning) * len(sweep.seeds)

    def take(self, last: Run | None) -> Run | None:
        """Gives a thread its next run, once there is one.

        Args:
            last: what the thread ran before; it can go on with what that left ready.

        Returns:
            The run, or None when nothing will come any more.
        """
        with self._changed:
            while not self._stopped:
                ready = self._ready()
                if ready:
                    run = min(ready, key=lambda run: self._distance(run, last))
                    self._taken[run.key()] = run
                    return run
                if not self._taken:
                    break
                self._changed.wait()
            return None

    def finish(self, run: Run, found: Mapping[str, Any]) -> None:
        """Writes down what a run found and wakes who waits for it.

        Args:
            run: what `take` gave.
            found: what `Bench.run` returned.

        Raises:
            OSError: if it cannot be written.
        """
        with self._changed:
            try:
                if found["status"] == "absent":
                    self._miss(run.cell.task, found["error"])
                else:
                    record = run_record(run, found) | self._common
                    self._results.add(record)
                    self._again.discard(run.key())
                    tell(f"{self._done()} {run.cell}: {_progress(run, found)}")
            finally:
                del self._taken[run.key()]
                self._changed.notify_all()

    def stop(self) -> None:
        """Gives out nothing more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _done(self) -> str:
        """How many runs of this sweep are on file, of how many."""
        runs = [run for runs in self._tuning.values() for run in runs]
        runs += [run for runs in self._final.values() for run in runs]
        count = sum(self._found(run) is not None for run in runs)
        return f"{count}/{self.total}"

    def _miss(self, task: str, sentence: str) -> None:
        if task not in self.absent:
            tell(f"{task} is left out: {sentence}")
        self.absent[task] = sentence

    def _ready(self) -> list[Run]:
        """Runs that nobody has and that depend on nothing unfinished."""
        found = []
        for cell, runs in self._tuning.items():
            if cell.task in self.absent:
                continue
            missing = [run for run in runs if self._found(run) is None]
            missing = missing or self._missing_final(cell)
            found += [run for run in missing if run.key() not in self._taken]
        return found

    def _missing_final(self, cell: Cell) -> list[Run]:
        if cell not in self._final or self._again:
            grid = grid_of(self._sweep, cell)
            chosen = choose(grid, self._tuning[cell], self._found)
            self._final[cell] = []
            if chosen is not None:
                self._note(cell, *chosen)
                self._final[cell] = final_runs(self._sweep, cell, chosen[0])
        return [run for run in self._final[cell] if self._found(run) is None]

    def _found(self, run: Run) -> Mapping[str, Any] | None:
        return None if run.key() in self._again else self._results.find(run)

    def _note(self, cell: Cell, choice: Choice, accuracy: float | None) -> None:
        """States a choice in the results, once."""
        facts = {**cell._asdict(), **choice._asdict()}
        of = len(self._tuning[cell])
        facts |= {"validation_accuracy": accuracy, "tuning_runs": of}
        record = {"kind": "choice", **facts}
        if record not in self._results.records:
            self._results.add(record)

    def _distance(self, run: Run, last: Run | None) -> tuple[int, int]:
        """Little for a run that fits what a thread has ready and no other has."""
        if last is not None and run.group() == last.group():
            return 0, 0
        shared = any(run.group() == other.group() for other in self._taken.values())
        same = last is not None and run.cell.task == last.cell.task
        return 1 + shared, 0 if same else 1


Find = Callable[[Run], Mapping[str, Any] | None]


def choose(grid: Grid, runs: Sequence[Run], find: Find) -> Chosen | None:
    """The settings that tuning found best.

    Args:
        grid: what was to be chosen from.
        runs: the tuning runs of the cell; none if there is nothing to choose.
        find: the record of a run, or None.

    Returns:
        The point with the best mean on held-out examples, the highest accuracy or the
        least error, the first of several; None while runs are missing, or if none came
        to an end.

    Example:
        >>> choose(Grid((0.1,), "privacy.l2_clip_norm", (1.0,)), [], lambda run: None)
        (Choice(learning_rate=0.1, parameter='privacy.l2_clip_norm', value=1.0), None)
    """
    if not runs:
        return Choice(grid.learning_rates[0], grid.parameter, grid.values[0]), None
    reached = reached_by(runs, find)
    if reached is None or not any(found for _, found in reached):
        return None
    measure = measure_of_runs(runs, find)
    best, found = max(
        ((choice, found) for choice, found in reached if found),
        key=lambda point: measure.better(fmean(point[1])),
    )
    return best, fmean(found)


def measure_of_runs(runs: Sequence[Run], find: Find) -> Measure:
    """By what runs of one task are measured.

    Args:
        runs: of one cell.
        find: the record of a run, or None.

    Returns:
        The measure of the first that is done; accuracy if none is.

    Example:
        >>> measure_of_runs([], lambda run: None).name
        'accuracy'
    """
    records = (find(run) for run in runs)
    done = (record for record in records if record and record["status"] == "done")
    return measure_in(next(done, {}))


def reached_by(
    runs: Sequence[Run], find: Find
) -> list[tuple[Choice, list[float]]] | None:
    """What each point of a grid reached.

    Args:
        runs: the tuning runs of a cell.
        find: the record of a run, or None.

    Returns:
        Points in the grid's order with what they reached, none for those that failed;
        None while runs are missing.

    Example:
        >>> reached_by([], lambda run: None)
        []
    """
    reached: list[tuple[Choice, list[float]]] = []
    for run in runs:
        record = find(run)
        if record is None:
            return None
        if not reached or reached[-1][0] != run.choice:
            reached.append((run.choice, []))
        if record["status"] == "done":
            reached[-1][1].append(record[measure_in(record).name])
    return reached


def run_record(run: Run, found: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a run in the results.

    Args:
        run: the run.
        found: what it found.

    Returns:
        JSON values; "accuracy_on" or "mse_on" says which examples it was measured on.

    Example:
        >>> from dp_ilg.experiments.config.schema import Config
        >>> run = Run(Cell("a", "b", 1.0), "tuning", Choice(0.1, "", 0), 0, Config())
        >>> run_record(run, {"status": "done", "accuracy": 0.5})["accuracy_on"]
        'held-out training examples'
    """
    held, measure = "held-out training examples", measure_in(found).name
    return {
        "kind": "run",
        **run.described(),
        **found,
        f"{measure}_on": held if run.phase == "tuning" else "test examples",
        "digest": run.key(),
        "config": dataclasses.asdict(run.config),
        **({"sources": dict(run.sources)} if run.sources else {}),
    }


def _commit() -> str:
    """The checked-out commit of this package, or an empty string outside git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _progress(run: Run, found: Mapping[str, Any]) -> str:
    rate, name, value = run.choice
    place = f"{run.phase}, learning rate {rate:g}, {name} {value}, seed {run.seed}"
    if found["status"] != "done":
        return f"{place}: {found['status']}: {found['error']}"
    measure = measure_in(found)
    shown = measure.shown(found[measure.name])
    return f"{place}: {measure.words} {shown} ({found['seconds']:.1f} s)"
