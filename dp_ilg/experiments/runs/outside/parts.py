"""The parts of a run that come from outside the package, and which code they are.

A configuration names them; every process that carries out the run loads them itself. A
digest of their source belongs to what a run is (`keys.identity`): with other code it is
not resumed, its keys are others, and processes that do not agree do not start.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dp_ilg.accounting.schedules import SCHEDULES
from dp_ilg.baselines.table import BASELINES
from dp_ilg.clipping.scores.table import SCORES
from dp_ilg.experiments.config.schema import Config
from dp_ilg.experiments.data.datasets import LOADERS
from dp_ilg.experiments.data.features import FEATURE_ROWS
from dp_ilg.experiments.data.own.named import is_data_path
from dp_ilg.experiments.models.networks import MODELS
from dp_ilg.geometry.rules import RULES, inner_name
from dp_ilg.optimizers.public.generators import GENERATORS
from dp_ilg.registry.lookup import find, is_of_this_process, resolve


class Part(NamedTuple):
    """A field of a configuration that names a part.

    Attributes:
        field: dotted.
        kind: a key of `dp_ilg.registry.lookup.KINDS`.
        rows: our own table.

    Example:
        >>> [part.kind for part in PARTS][:3]
        ['dataset', 'features', 'model']
    """

    field: str
    kind: str
    rows: Mapping[str, Any]


PARTS = (
    Part("data.name", "dataset", LOADERS),
    Part("data.features", "features", FEATURE_ROWS),
    Part("model.name", "model", MODELS),
    Part("privacy.schedule.name", "schedule", SCHEDULES),
    Part("optimizer.method", "method", BASELINES),
    Part("optimizer.importance", "rule", RULES),
    Part("optimizer.score", "score", SCORES),
    Part("probe.batch", "generator", GENERATORS),
)


def named(config: Config) -> Iterator[tuple[Part, str]]:
    """The parts that a configuration names, but for data that are files.

    Of a rule such as ``top_k:4:NAME`` it is the rule inside.

    Args:
        config: a run.

    Yields:
        Parts and names.

    Example:
        >>> [name for _, name in named(Config())][:3]
        ['digits', 'raw', 'mlp']
    """
    for part in PARTS:
        value: Any = config
        for name in part.field.split("."):
            value = getattr(value, name)
        if part.kind == "rule":
            value = inner_name(value)
        if not (part.kind == "dataset" and is_data_path(value)):
            yield part, value


def check_parts(config: Config) -> None:
    """Raises unless every name in a configuration stands for a part of its kind.

    Args:
        config: a run.

    Raises:
        ValueError: in one sentence, naming the field.

    Example:
        >>> from dp_ilg.experiments.config.schema import DataConfig
        >>> check_parts(Config(data=DataConfig("minst")))
        Traceback (most recent call last):
        ValueError: data.name is 'minst', which is unknown; did you mean mnist? (one \
of your own: ./file.py:name or package.module:name)
    """
    for part, name in named(config):
        if part.kind == "dataset" and name not in part.rows and Path(name).exists():
            raise ValueError(
                f"data.name is {name!r}, which is no data set; a file or folder is "
                f"given with a slash, as ./{name}."
            )
        resolve(part.kind, name, part.rows, part.field)


def check_for_workers(config: Config) -> None:
    """Raises for a part that another process would not find.

    Args:
        config: a run of a sweep.

    Raises:
        ValueError: for a row that was added to a table of ours in memory.

    Example:
        >>> check_for_workers(Config())
    """
    for part, name in named(config):
        if is_of_this_process(part.kind, name, part.rows):
            raise ValueError(
                f"{part.field} is {name!r}, which was added to a table in this process "
                "alone, but runs are processes of their own; give ./file.py:name or "
                "package.module:name."
            )


def sources(config: Config) -> dict[str, str]:
    """Which code the parts from outside are.

    Args:
        config: a run, whose names are those of parts.

    Returns:
        ``"source of NAME"`` to 16 hexadecimal digits; empty without such parts.

    Raises:
        ValueError: if one cannot be loaded.

    Example:
        >>> sources(Config())
        {}
    """
    found = {}
    for part, name in named(config):
        if name not in part.rows:
            loaded = find(part.kind, name, part.field)
            if loaded is not None:
                found[f"source of {name}"] = loaded.digest
    return found
