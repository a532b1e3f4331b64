"""The runs of a sweep: which there are, and what makes two of them the same.

A cell is a task, a method and an epsilon. Its tuning runs hold examples out of the
training part and never see the test part; the runs that are reported train on all of
it, with other seeds, at the settings that tuning chose.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dp_ilg.experiments.config.schema import Config
from dp_ilg.experiments.runs.outside.parts import sources
from dp_ilg.experiments.sweeps.idle import idle_because
from dp_ilg.experiments.sweeps.sweep import Grid, Method, Sweep, Task, merged


class Cell(NamedTuple):
    """One place in the tables: names of a task and a method, and an epsilon.

    Example:
        >>> str(Cell("digits", "dp_adam", 2.0))
        'digits, dp_adam, epsilon 2'
    """

    task: str
    method: str
    epsilon: float

    def __str__(self) -> str:
        return f"{self.task}, {self.method}, epsilon {self.epsilon:g}"


class Choice(NamedTuple):
    """The settings of a run: a learning rate and a value of the own parameter.

    Example:
        >>> Choice(0.1, "privacy.l2_clip_norm", 1.0).value
        1.0
    """

    learning_rate: float
    parameter: str
    value: Any


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        cell: where it belongs.
        phase: "tuning" or "final".
        choice: its settings.
        seed: its seed.
        config: all of it.
        sources: which code its parts from outside are.

    Example:
        >>> run = Run(Cell("a", "b", 1.0), "final", Choice(0.1, "", 0), 0, Config())
        >>> run.key() == config_key(dataclasses.asdict(Config()))
        True
    """

    cell: Cell
    phase: str
    choice: Choice
    seed: int
    config: Config
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def key(self) -> str:
        """What names the run: a digest of its configuration and its code."""
        return self._key

    @functools.cached_property
    def _key(self) -> str:
        return config_key(dataclasses.asdict(self.config), self.sources)

    def group(self) -> str:
        """What runs share that differ in learning rate and seed only: what compiles."""
        shared = self.described() | {"seed": None, "learning_rate": None}
        return json.dumps(shared)

    def described(self) -> dict[str, Any]:
        """The fields that say which run this is, for its record."""
        return {
            **self.cell._asdict(),
            "phase": self.phase,
            **self.choice._asdict(),
            "seed": self.seed,
        }


def config_key(
    config: Mapping[str, Any], sources: Mapping[str, str] | None = None
) -> str:
    """A digest of a configuration, as it is or as an old record has it.

    A field that did not exist when the record was written counts as its default, so
    that new fields do not make every run run again; a default that changed does.

    Args:
        config: sections to fields, those that are None included.
        sources: which code its parts from outside are: other code, other runs.

    Returns:
        16 hexadecimal digits.

    Example:
        >>> old = json.loads(json.dumps(dataclasses.asdict(Config())))
        >>> del old["run"]["engine"]
        >>> config_key(old) == config_key(dataclasses.asdict(Config()))
        True
    """
    whole = merged(dataclasses.asdict(Config()), dict(config))
    if sources:
        whole["sources"] = dict(sources)
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def cells(sweep: Sweep) -> list[Cell]:
    """Every cell of a sweep, task by task.

    Args:
        sweep: the sweep.

    Returns:
        The cells; methods of one task and epsilon stand together.

    Example:
        >>> from dp_ilg.experiments.sweeps.sweep import Method, Task
        >>> cells(Sweep(tasks=(Task(),), methods=(Method(),)))
        [Cell(task='digits', method='dp_adam', epsilon=1.0)]
    """
    return [
        Cell(task.label(), method.name, epsilon)
        for task in sweep.tasks
        for epsilon in sweep.epsilons
        for method in sweep.methods
    ]


def grid_of(sweep: Sweep, cell: Cell) -> Grid:
    """What may be chosen from in a cell.

    Args:
        sweep: the sweep.
        cell: one of its cells.

    Returns:
        Its grid, with one value of a parameter that does nothing there.

    Example:
        >>> from dp_ilg.experiments.sweeps.sweep import Method, Task
        >>> sweep = Sweep(tasks=(Task(),), methods=(Method(),))  # one value: one column
        >>> grid_of(sweep, cells(sweep)[0]).learning_rates
        (0.01,)
    """
    task, method = sweep.task(cell.task), sweep.method(cell.method)
    grid = sweep.grid(task, method)
    one_column = len(grid.values) > 1 and idle_in(sweep, task, method)
    return grid._replace(values=grid.values[:1]) if one_column else grid


def idle_in(sweep: Sweep, task: Task, method: Method) -> str:
    """Why a method's own parameter does nothing on a task, see `idle.idle_because`.

    Args:
        sweep: the sweep.
        task: one of its tasks.
        method: one of its methods.

    Returns:
        The end of a sentence, or nothing; nothing for what cannot be configured.

    Example:
        >>> sweep = Sweep(tasks=(Task(config="configs/digits.toml"),),
        ...     methods=(Method(),))
        >>> idle_in(sweep, *sweep.tasks, *sweep.methods)
        ''
    """
    grid = sweep.grid(task, method)
    changes = {grid.parameter: grid.values[0]} if grid.values else {}
    try:
        return idle_because(sweep.config(task, method, changes), grid.parameter)
    except (ValueError, OSError):  # `check` says what is wrong with it
        return ""


def tuning_runs(sweep: Sweep, cell: Cell) -> list[Run]:
    """The runs that choose a cell's settings; none if there is nothing to choose.

    Args:
        sweep: the sweep.
        cell: one of its cells.

    Returns:
        One run for each point of the grid and each tuning seed.

    Privacy:
        They look at private data, and their accuracies are computed from held-out
        private examples: no run's epsilon covers the choice.

    Example:
        >>> from dp_ilg.experiments.sweeps.sweep import Method, Task, Tuning
        >>> sweep = Sweep(tasks=(Task(config="configs/digits.toml"),),
        ...     methods=(Method(),), tuning=Tuning(learning_rates=(0.01, 0.1)))
        >>> [run.choice.learning_rate for run in tuning_runs(sweep, cells(sweep)[0])]
        [0.01, 0.1]
    """
    grid = grid_of(sweep, cell)
    points = [Choice(rate, grid.parameter, value) for rate, value in grid.points()]
    if len(points) == 1:
        return []
    held = {"data.validation": sweep.tuning.validation}
    return [
        _run(sweep, cell, point, ("tuning", seed), held)
        for point in points
        for seed in sweep.tuning.seeds
    ]


def final_runs(sweep: Sweep, cell: Cell, choice: Choice) -> list[Run]:
    """The runs that are reported.

    Args:
        sweep: the sweep.
        cell: one of its cells.
        choice: what tuning chose.

    Returns:
        One run for each seed, on the whole training part.

    Example:
        >>> from dp_ilg.experiments.sweeps.sweep import Method, Task
        >>> sweep = Sweep(tasks=(Task(config="configs/digits.toml"),),
        ...     methods=(Method(),), seeds=(7,))
        >>> choice = Choice(0.1, "privacy.l2_clip_norm", 0.5)
        >>> run, = final_runs(sweep, cells(sweep)[0], choice)
        >>> run.config.data.validation, run.config.run.seed
        (None, 7)
    """
    return [_run(sweep, cell, choice, ("final", seed), {}) for seed in sweep.seeds]


def _run(
    sweep: Sweep,
    cell: Cell,
    choice: Choice,
    part: tuple[str, int],
    changes: dict[str, Any],
) -> Run:
    phase, seed = part
    changes = changes | {
        "privacy.epsilon": cell.epsilon,
        "optimizer.learning_rate": choice.learning_rate,
        choice.parameter: choice.value,
        "run.seed": seed,
    }
    task, method = sweep.task(cell.task), sweep.method(cell.method)
    config = sweep.config(task, method, changes)
    return Run(cell, phase, choice, seed, config, sources(config))
