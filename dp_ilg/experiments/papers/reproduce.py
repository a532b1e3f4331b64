"""The table of reproductions: what papers report, beside what is measured here.

A reproduction is a function of `ReproduceOptions` that returns something JSON can hold:
title, notes, and rows that all have the same columns. Each is imported when it is
asked for. Progress goes to standard error; a long one writes every finished run to the
file ``out`` through a `RunLog` and skips what is there.
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NamedTuple

from dp_ilg import validation
from dp_ilg.validation import nearest


@dataclass(frozen=True)
class ReproduceOptions:
    """What a reproduction may be told.

    Attributes:
        data_dir: a folder of data files, as for
            `dp_ilg.experiments.data.datasets.load_dataset`.
        seeds: runs of each row, seeds 0 to seeds - 1.
        quick: a small form that shows that everything works; its numbers mean nothing.
        max_minutes: start no further run, and end a running one, after this long;
            None for no limit.
        out: a file of JSON lines, one for each finished run; None keeps nothing.
        only: do only these parts of the table; empty for all.

    Raises:
        ValueError: for fewer than 1 seed or minutes that are not above 0.

    Example:
        >>> ReproduceOptions(seeds=0)
        Traceback (most recent call last):
        ValueError: seeds is 0, but must be a whole number of at least 1.
    """

    data_dir: Path | None = None
    seeds: int = 3
    quick: bool = False
    max_minutes: float | None = None
    out: Path | None = None
    only: tuple[str, ...] = ()

    def __post_init__(self):
        validation.whole("seeds", self.seeds)
        if self.max_minutes is not None:
            validation.positive("max_minutes", self.max_minutes)


Reproduction = Callable[[ReproduceOptions], dict[str, Any]]


class Row(NamedTuple):
    """One reproduction: where its function is, and the parts that may be left out."""

    module: str
    function: str
    parts: tuple[str, ...] = ()


_PUBLISHED = ("mnist", "fashion_mnist", "svhn", "cifar10", "cifar100")
REPRODUCTIONS: dict[str, Row] = {
    "table2": Row("dp_ilg.experiments.papers.ilg_epsilons", "table2", _PUBLISHED),
    "table3": Row(
        "dp_ilg.experiments.papers.ilg_accuracies",
        "table3",
        ("mnist", "fashion_mnist", "cifar10"),
    ),
    "abadi": Row("dp_ilg.experiments.papers.abadi", "abadi", ("0.5", "2", "8")),
}


def reproduction(name: str, only: Sequence[str] = ()) -> Reproduction:
    """Looks a reproduction up and imports it.

    Args:
        name: a row of `REPRODUCTIONS`.
        only: parts of it, to be checked.

    Returns:
        ``(options) -> {"title": str, "notes": [str], "rows": [dict]}``; every value
        is one that JSON can hold.

    Raises:
        ValueError: for a name that is no row, or a part it does not have.

    Example:
        >>> reproduction("table4")
        Traceback (most recent call last):
        ValueError: There is no table 'table4' to reproduce; did you mean table3?
        >>> reproduction("table3", ["cifar"])
        Traceback (most recent call last):
        ValueError: table3 has no part 'cifar'; did you mean cifar10?
    """
    if name not in REPRODUCTIONS:
        advice = nearest(name, REPRODUCTIONS)
        raise ValueError(f"There is no table {name!r} to reproduce; {advice}")
    row = REPRODUCTIONS[name]
    for part in only:
        if part not in row.parts:
            advice = nearest(part, row.parts) if row.parts else "leave out --only."
            raise ValueError(f"{name} has no part {part!r}; {advice}")
    return getattr(import_module(row.module), row.function)


class RunLog:
    """Finished runs as JSON lines, looked up by the fields that name a run.

    Example:
        >>> log = RunLog(None)
        >>> log.add({"row": "mnist", "seed": 0}, {"test_accuracy": 0.5})["seed"]
        0
        >>> log.find({"row": "mnist", "seed": 0})["test_accuracy"]
        0.5
        >>> log.find({"row": "mnist", "seed": 1}) is None
        True
    """

    def __init__(self, path: Path | None):
        """Reads what is there.

        Args:
            path: the file, made when the first run is added; None keeps the runs in
                memory only.

        Raises:
            ValueError: for a line that is no JSON object.
        """
        self.path = path
        self.records: list[dict[str, Any]] = []
        if path is not None and path.exists():
            lines = path.read_text().splitlines()
            self.records = [_record(path, i, line) for i, line in enumerate(lines)]

    def find(self, name: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns the record with these fields, or None.

        Args:
            name: the fields that tell one run from the others.
        """
        named = (r for r in self.records if name.items() <= r.items())
        return next(named, None)

    def add(self, name: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
        """Writes one finished run, with machine, versions and command.

        Args:
            name: the fields that tell it from the others.
            found: what was measured.

        Returns:
            The record.
        """
        record = {**name, **found, **machine()}
        self.records.append(record)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return record


def machine() -> dict[str, Any]:
    """What measured numbers depend on: machine, versions, command line and date.

    Example:
        >>> sorted(machine())
        ['command', 'date', 'machine', 'processor', 'python', 'versions']
    """
    names = ("jax", "optax", "numpy", "dp-accounting")
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
        "command": "dp-ilg " + " ".join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
    }


def tell(sentence: str) -> None:
    """Prints a line of progress to standard error.

    Args:
        sentence: what has been done.

    Example:
        >>> tell("mnist, seed 0: 97.2 %")
    """
    print(f"dp-ilg: {sentence}", file=sys.stderr, flush=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    return f"{len(models)} x {models[0]}" if models else platform.processor()


def _record(path: Path, index: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(
            f"Line {index + 1} of {path} is no JSON object; remove it or give another "
            "--out."
        )
    return record
