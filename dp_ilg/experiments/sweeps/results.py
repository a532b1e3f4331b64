"""The results of a sweep as JSON lines, written by one process at a time.

One line a run, synced before it counts. A last line that was cut short by a kill is
dropped; anything else that is damaged is refused, so that nothing is lost silently.
"""

import errno
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dp_ilg.experiments.config.kinds import measure_in
from dp_ilg.experiments.sweeps.runs import Run, config_key

try:
    import fcntl
except ImportError:  # no such locks on this system: then one process is assumed
    fcntl = None

KINDS = ("run", "choice")
_WORDS = ("task", "method", "phase", "status")
_STATUSES = ("done", "failed", "impossible")
_NUMBERS = ("epsilon", "learning_rate", "seed")
_REACHED = ("epsilon_spent", "delta", "seconds", "train_seconds")


class Results:
    """What a sweep has found so far.

    Attributes:
        folder: where it is.
        records: every line, oldest first.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Results(Path(folder), "[sweep]") as results:
        ...         results.add({"kind": "choice", "task": "digits"})
        ...     len(read_results(Path(folder)))
        1
    """

    def __init__(self, folder: Path, text: str, *, extend: bool = False):
        """Takes the folder, or says why not.

        Args:
            folder: made if it does not exist.
            text: what the sweep is; kept in the folder.
            extend: whether a folder begun with another text is taken all the same.

        Raises:
            ValueError: if another process is at work in it, another sweep has begun
                it, or its results are damaged before their last line.
            OSError: if it cannot be written.
        """
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._lock()
            self._claim(text, extend)
            self.records = self._repair()
        except BaseException:
            os.close(self._lock_file)
            raise
        self._by_key = index(self.records)

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        os.close(self._lock_file)

    def find(self, run: Run) -> Mapping[str, Any] | None:
        """Returns the last record of a run, or None.

        Args:
            run: the run.
        """
        return self._by_key.get(run.key())

    def add(self, record: Mapping[str, Any]) -> None:
        """Writes one record; once this returns it is on the disk.

        Args:
            record: JSON values, with a `kind`.

        Raises:
            OSError: if it cannot be written.
        """
        line = (json.dumps(record) + "\n").encode()
        with open(self._path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.records.append(dict(record))
        if record["kind"] == "run":
            self._by_key[record_key(record)] = dict(record)

    @property
    def _path(self) -> Path:
        return self.folder / "results.jsonl"

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise ValueError(
                f"Another process is at work on a sweep in {self.folder}; wait for it, "
                "give another --out, or look at it with --report-only."
            ) from None

    def _claim(self, text: str, extend: bool) -> None:
        path = self.folder / "sweep.toml"
        there = path.read_text(encoding="utf-8") if path.exists() else None
        begun = there is not None or self._path.exists()
        if begun and there != text and not extend:
            raise ValueError(
                f"The folder {self.folder} holds another sweep, or this one before it "
                "was changed; give another --out, or pass --extend to keep its runs "
                "and go on with the new file."
            )
        if there != text:
            draft = path.with_name(".sweep.toml")
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, path)

    def _repair(self) -> list[dict[str, Any]]:
        """Cuts off a line that was being written when its process died."""
        if not self._path.exists():
            return []
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        records = _parse(self._path, whole)
        if whole != content:
            os.truncate(self._path, len(whole))
        return records


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Reads the results of a sweep, which may be running.

    Args:
        folder: of the sweep.

    Returns:
        The records, without a last line that is not whole; none for no such file.

    Raises:
        ValueError: for a line that is no record.

    Example:
        >>> read_results(Path("no/such/folder"))
        []
    """
    path = Path(folder) / "results.jsonl"
    content = path.read_bytes() if path.exists() else b""
    return _parse(path, content[: content.rfind(b"\n") + 1])


def index(records: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The runs among records, by what names them.

    Args:
        records: lines of results.

    Returns:
        The last record of each run, by `record_key`.

    Example:
        >>> index([{"kind": "choice"}])
        {}
    """
    return {record_key(r): r for r in records if r["kind"] == "run"}


def record_key(record: Mapping[str, Any]) -> str:
    """What names the run of a record, as `Run.key` does.

    Args:
        record: the line of a run.

    Returns:
        16 hexadecimal digits.

    Example:
        >>> record_key({"config": {}}) == config_key({})
        True
    """
    return config_key(record["config"], record.get("sources"))


def _parse(path: Path, content: bytes) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            record = json.loads(line)
            sound = record["kind"] in KINDS
            sound = sound and (record["kind"] != "run" or _is_run(record))
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise ValueError(
                f"Line {number} of {path} is no record of a sweep; mend or remove that "
                "line and start again: the other lines are kept."
            )
        records.append(record)
    return records


def _is_run(record: dict[str, Any]) -> bool:
    """Whether a run has what every report reads."""
    is_done = record["status"] == "done"
    words = [*_WORDS, "plan" if is_done else "error"]
    numbers = [record[name] for name in (*_NUMBERS, *(_REACHED if is_done else ()))]
    measure = measure_in(record)
    numbers += [record[measure.name]] if is_done else []
    numbers.append(record.get("perplexity", 1.0))
    return (
        all(isinstance(record[name], str) for name in words)
        and record["status"] in _STATUSES
        and isinstance(record.get("versions", {}), dict)
        and all(map(_finite, numbers))
        and _is_of(record["config"], record)
        and (not is_done or measure.is_sound(record[measure.name]))
        and (not is_done or isinstance(json.loads(record["plan"]), dict))
    )


def _is_of(config: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether a run is labelled with its own settings."""
    return (
        config["run"]["seed"] == record["seed"]
        and config["privacy"]["epsilon"] == record["epsilon"]
        and config["optimizer"]["learning_rate"] == record["learning_rate"]
    )


def _finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)
