"""Reads a sweep and checks every configuration in it before anything runs."""

import tomllib
from pathlib import Path

from dp_ilg.experiments.config.fields import from_mapping
from dp_ilg.experiments.config.schema import Config
from dp_ilg.experiments.models.sizes import SIZES, check_sizes
from dp_ilg.experiments.runs.outside.parts import check_for_workers, check_parts
from dp_ilg.experiments.runs.recipe import build_schedule, method_options
from dp_ilg.experiments.sweeps.runs import idle_in
from dp_ilg.experiments.sweeps.sweep import Grid, Method, Sweep, Task, nested

# What the sweep sets itself, and where it says so.
OWNED = {
    "privacy.epsilon": "epsilons",
    "optimizer.learning_rate": "learning_rates",
    "run.seed": "seeds",
    "data.validation": "tuning.validation",
}


def read_sweep(path: Path) -> Sweep:
    """Reads and checks a sweep, every configuration in it included.

    Args:
        path: a TOML file.

    Returns:
        The sweep.

    Raises:
        ValueError: in one sentence, for a file that cannot be read, unknown fields,
            tasks, methods or data sets, seeds used twice, or unequal grids.

    Example:
        >>> read_sweep(Path("configs/sweeps/digits.toml")).reference
        'dp_adam'
    """
    try:
        mapping = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"The sweep {path} cannot be read: {reason}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"The sweep {path} is not valid TOML: {error}.") from None
    if "source" in mapping:
        raise ValueError(f"{path}: unknown field source; remove it.")
    mapping["source"] = str(path)
    sweep = from_mapping(Sweep, mapping, source=str(path))
    check_sweep(sweep)
    return sweep


def check_sweep(sweep: Sweep) -> None:
    """Raises unless every cell can be configured and all grids are equal.

    Args:
        sweep: what was read.

    Raises:
        ValueError: in one sentence.

    Example:
        >>> check_sweep(Sweep(tasks=(Task(config="digit.toml"),), methods=(Method(),)))
        Traceback (most recent call last):
        ValueError: The config digit.toml cannot be read: No such file or directory.
    """
    for task in sweep.tasks:
        for owner in (task, *sweep.methods):
            _check_owned(sweep, owner.overrides)
        grids = [(method, sweep.grid(task, method)) for method in sweep.methods]
        _check_equal(sweep, task, grids)
        for method, grid in grids:
            _check_tuned(sweep, method, grid)
            for rate, value in grid.points():
                _check_owned(sweep, nested({grid.parameter: value}))
                changes = {"optimizer.learning_rate": rate, grid.parameter: value}
                _check_config(sweep.config(task, method, changes), task, method)


def _check_tuned(sweep: Sweep, method: Method, grid: Grid) -> None:
    if not sweep.tuning.seeds and len(grid.points()) > 1:
        raise ValueError(
            f"{sweep.source} has no tuning.seeds, but {method.name} has "
            f"{len(grid.points())} settings to choose from; give a seed or one setting."
        )


def _check_owned(sweep: Sweep, overrides: dict) -> None:
    for path, instead in OWNED.items():
        section, name = path.split(".")
        inside = overrides.get(section)
        if isinstance(inside, dict) and name in inside:
            raise ValueError(
                f"{sweep.source} sets {path} in overrides or as a parameter, but the "
                f"sweep itself does so; use {instead}."
            )


def _check_equal(sweep: Sweep, task: Task, grids: list[tuple[Method, Grid]]) -> None:
    """A single value of a parameter that does nothing is as many as there are."""
    alone = [m for m, g in grids if len(g.values) == 1 and idle_in(sweep, task, m)]
    several = [(m, g) for m, g in grids if m not in alone] or grids
    first, usual = several[0]
    for method, grid in grids:
        if method in alone:
            grid = grid._replace(values=usual.values)
        for words, own, other in (
            ("learning rates", grid.learning_rates, usual.learning_rates),
            (f"values of {grid.parameter}", grid.values, usual.values),
        ):
            if len(own) != len(other):
                raise ValueError(
                    f"On {task.label()} the method {method.name} has {len(own)} {words}"
                    f" but {first.name} has {len(other)} to choose from; give every "
                    "method equally many."
                )
            if any(own.count(value) > 1 for value in own) or not own:
                raise ValueError(
                    f"On {task.label()} the {words} of {method.name} are {list(own)}; "
                    "give at least one, each once."
                )


def _check_config(config: Config, task: Task, method: Method) -> None:
    try:
        check_parts(config)
        check_for_workers(config)
        if config.model.name in SIZES:
            check_sizes(config.model.name, config.model.options())
        method_options(config)
        build_schedule(config.privacy.schedule)
    except ValueError as error:
        where = f"Task {task.label()} with method {method.name}"
        raise ValueError(f"{where}: {error}") from None
