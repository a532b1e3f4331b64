"""A sweep: tasks x methods x epsilons x seeds x tuning grid, as one TOML file.

Every method gets the same number of learning rates and the same number of values of
its own parameter; a file that favours one is refused.
"""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dp_ilg.experiments.config.fields import required
from dp_ilg.experiments.config.schema import (
    Config,
    config_from_mapping,
    config_to_toml,
    read_config,
)
from dp_ilg.validation import fraction, nearest, positive, whole

_BUNDLED = Config().data.name


@dataclass(frozen=True)
class Tuning:
    """How settings are chosen: on held-out training examples, by other seeds.

    `parameter` and `values` are the own parameter of every method that names none.

    Example:
        >>> Tuning(learning_rates=(0.01, 0.1), values=(0.1, 1.0)).parameter
        'privacy.l2_clip_norm'
    """

    learning_rates: tuple[float, ...] = required((0.01,))
    values: tuple[Any, ...] = required((1.0,))
    parameter: str = "privacy.l2_clip_norm"
    validation: float = 0.2
    seeds: tuple[int, ...] = (1000,)

    def __post_init__(self):
        fraction("tuning.validation", self.validation)


@dataclass(frozen=True)
class Task:
    """A configuration, what is changed in it, and perhaps its own grid.

    `config` is a file, or "digits" for the bundled configuration.

    Example:
        >>> Task(config="digits.toml").label()
        'digits'
    """

    config: str = required("digits.toml")
    name: str | None = None
    overrides: dict = field(default_factory=dict)
    learning_rates: tuple[float, ...] | None = None
    values: tuple[Any, ...] | None = None

    def label(self) -> str:
        """Its name, else that of its file."""
        return self.name or Path(self.config).stem


@dataclass(frozen=True)
class Method:
    """What a method changes in a task's configuration, and its grid.

    Without `learning_rates` it takes the task's, times `learning_rate_factor`; without
    `parameter` its own parameter is the sweep's.

    Example:
        >>> Method("dp_sgd", {"optimizer": {"method": "dp_sgd"}}, 50.0).parameter
    """

    name: str = required("dp_adam")
    overrides: dict = field(default_factory=dict)
    learning_rate_factor: float = 1.0
    learning_rates: tuple[float, ...] | None = None
    parameter: str | None = None
    values: tuple[Any, ...] | None = None

    def __post_init__(self):
        positive("methods.learning_rate_factor", self.learning_rate_factor)
        if self.parameter is not None and self.values is None:
            raise ValueError(
                f"The method {self.name} names {self.parameter} but no values of it; "
                "give values, as many as the other methods have."
            )


class Grid(NamedTuple):
    """The settings one method may choose from on one task.

    Example:
        >>> Grid((0.1, 1.0), "privacy.l2_clip_norm", (1.0,)).points()
        [(0.1, 1.0), (1.0, 1.0)]
    """

    learning_rates: tuple[float, ...]
    parameter: str
    values: tuple[Any, ...]

    def points(self) -> list[tuple[float, Any]]:
        """All pairs of a learning rate and a value."""
        return [(rate, value) for value in self.values for rate in self.learning_rates]


@dataclass(frozen=True)
class Sweep:
    """What is compared. `source` is the file's path, for errors and for its tasks.

    Example:
        >>> Sweep(tasks=(Task(),), methods=(Method(),)).seeds
        (0, 1, 2, 3, 4)
    """

    tasks: tuple[Task, ...] = required(())
    methods: tuple[Method, ...] = required(())
    epsilons: tuple[float, ...] = required((1.0,))
    tuning: Tuning = field(default=Tuning(), metadata={"required": True})
    title: str | None = None
    reference: str = "dp_adam"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    workers: int = 2
    source: str = "sweep"

    def __post_init__(self):
        whole("workers", self.workers)
        for epsilon in self.epsilons:
            positive("epsilons", epsilon)
        for name in ("tasks", "methods", "epsilons", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{self.source} has no {name}; give at least one.")
        for name, seeds in (("seeds", self.seeds), ("tuning.seeds", self.tuning.seeds)):
            for seed in seeds:
                whole(name, seed, 0)
                if seed >= 2**63:
                    raise ValueError(f"{name} has {seed}; give seeds below 2**63.")
        _check_names(self)

    def label(self) -> str:
        """Its title, else the name of its file."""
        return self.title or Path(self.source).stem

    def task(self, name: str) -> Task:
        """The task of a name."""
        return next(task for task in self.tasks if task.label() == name)

    def method(self, name: str) -> Method:
        """The method of a name."""
        return next(method for method in self.methods if method.name == name)

    def grid(self, task: Task, method: Method) -> Grid:
        """What `method` may choose from on `task`.

        Args:
            task: one of the tasks.
            method: one of the methods.

        Returns:
            Learning rates, the own parameter and its values.

        Example:
            >>> sgd = Method("dp_sgd", learning_rate_factor=50.0)
            >>> sweep = Sweep(tasks=(Task(),), methods=(Method(), sgd))
            >>> sweep.grid(sweep.tasks[0], sgd).learning_rates
            (0.5,)
        """
        rates, values = task.learning_rates, task.values
        rates = self.tuning.learning_rates if rates is None else rates
        values = self.tuning.values if values is None else values
        factor = method.learning_rate_factor
        scaled = tuple(r if factor == 1 else float(f"{r * factor:.6g}") for r in rates)
        return Grid(
            scaled if method.learning_rates is None else method.learning_rates,
            method.parameter or self.tuning.parameter,
            values if method.values is None else method.values,
        )

    def config(self, task: Task, method: Method, changes: dict[str, Any]) -> Config:
        """The configuration of one run.

        Args:
            task: one of the tasks.
            method: one of the methods.
            changes: dotted fields to values, laid over both.

        Returns:
            The configuration; it evaluates once, at its end.

        Raises:
            ValueError: for a field that does not exist or does not fit.

        Example:
            >>> sweep = Sweep(tasks=(Task(config="configs/digits.toml"),),
            ...     methods=(Method(),))
            >>> one = sweep.config(*sweep.tasks, *sweep.methods, {"run.seed": 3})
            >>> one.run.seed, one.run.eval_every
            (3, 200)
        """
        found = self._base(task)
        for over in (task.overrides, method.overrides, nested(changes)):
            found = merged(found, over)
        source = f"{self.source}, task {task.label()} with method {method.name}"
        config = config_from_mapping(found, source)
        steps = config.privacy.num_steps
        once = dataclasses.replace(config.run, eval_every=steps, checkpoint_every=steps)
        return dataclasses.replace(config, run=once)

    def _base(self, task: Task) -> dict[str, Any]:
        """What the task's configuration says; "digits" is the bundled one."""
        path = self.config_path(task)
        if task.config == _BUNDLED and not path.exists():
            return tomllib.loads(config_to_toml(Config()))
        read_config(path)
        return tomllib.loads(path.read_text(encoding="utf-8"))

    def config_path(self, task: Task) -> Path:
        """Where the configuration of `task` is: beside the sweep, else as it stands."""
        beside = Path(self.source).parent / task.config
        return beside if beside.exists() else Path(task.config)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lays nested tables over others; lists are replaced, not joined.

    Args:
        base: tables.
        over: what to change in them.

    Returns:
        New tables.

    Example:
        >>> merged({"run": {"seed": 1, "engine": "vmap"}}, {"run": {"seed": 2}})
        {'run': {'seed': 2, 'engine': 'vmap'}}
    """
    found = dict(base)
    for name, value in over.items():
        old = found.get(name)
        both = isinstance(value, dict) and isinstance(old, dict)
        found[name] = merged(old, value) if both else value  # type: ignore[arg-type]
    return found


def nested(changes: dict[str, Any]) -> dict[str, Any]:
    """Dotted names as tables in tables.

    Args:
        changes: dotted names to values.

    Returns:
        Tables.

    Example:
        >>> nested({"run.seed": 1, "run.engine": "vmap"})
        {'run': {'seed': 1, 'engine': 'vmap'}}
    """
    found: dict[str, Any] = {}
    for path, value in changes.items():
        for name in reversed(path.split(".")):
            value = {name: value}
        found = merged(found, value)
    return found


def _check_names(sweep: Sweep) -> None:
    names = {
        "task": [task.label() for task in sweep.tasks],
        "method": [method.name for method in sweep.methods],
        "epsilon": [f"{epsilon:g}" for epsilon in sweep.epsilons],  # as reports show
        "seed": (*sweep.seeds, *sweep.tuning.seeds),
    }
    for kind, found in names.items():
        twice = [name for name in found if list(found).count(name) > 1]
        if twice:
            tunes = kind == "seed" and twice[0] in sweep.tuning.seeds
            why = " (seeds that tune must not report)" if tunes else ""
            raise ValueError(
                f"{sweep.source} has the {kind} {twice[0]} twice{why}; use each once."
            )
    if sweep.reference not in names["method"]:
        raise ValueError(
            f"{sweep.source} has the reference {sweep.reference!r}, which is no method "
            f"of it; {nearest(sweep.reference, names['method'])}"
        )
