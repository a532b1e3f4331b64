"""The privacy ledger: which steps of a plan may have been released, on disk.

A step is charged from the moment its release could be seen, so it is written and synced
*before* the release is used. After a crash the file then holds at least the steps whose
results got out, never fewer. One line of JSON a step, each closed by a CRC-32.
"""

import errno
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.accounting.sealing import seal, sync_folder, unseal

try:
    import fcntl
except ImportError:  # no such locks on this system: then one process is assumed
    fcntl = None

FORMAT_VERSION = 1


class BudgetExhausted(ValueError):
    """Raised for a step past the plan; nothing of it may be released.

    Indexing past the last step clamps silently in JAX, so the refusal has to happen on
    the host (law: never past the plan).

    Example:
        >>> issubclass(BudgetExhausted, ValueError)
        True
    """


class PrivacyLedger:
    """Append-only record of the steps taken under one plan.

    Opening a file that exists resumes it. A last line that was cut while it was being
    written is dropped, since `record` had not returned and nothing had been released;
    one that lacks its line end alone counts.
    The file is locked against a second writer until `close`.

    Attributes:
        path: where the file is.
        plan: the plan whose steps are counted.

    Privacy:
        The ledger counts what this process was told of, for the unit and neighbouring
        relation of the plan. A repeated step is charged once, which is right only if it
        repeats the same batch and noise bit for bit (law: keyed by step). Whoever can
        edit or delete the file can hide steps: the CRC guards against accidents, not
        against people.

    Example:
        >>> import tempfile
        >>> plan = PrivacyPlan(
        ...     num_examples=100, batch_size=10, num_steps=2, delta=1e-5,
        ...     l2_clip_norm=1.0, score_budget=0.0, stages=((2, 1.0),))
        >>> folder = tempfile.TemporaryDirectory()
        >>> with PrivacyLedger(f"{folder.name}/ledger.jsonl", plan) as ledger:
        ...     ledger.record(0)
        ...     ledger.steps
        1
        >>> with PrivacyLedger(f"{folder.name}/ledger.jsonl", plan) as ledger:
        ...     ledger.record(0)  # a resumed run repeats the step it was cut off in
        ...     ledger.record(1)
        ...     ledger.record(2)
        Traceback (most recent call last):
        dp_ilg.accounting.ledger.BudgetExhausted: step is 2, but the plan has 2 ...
        >>> folder.cleanup()
    """

    def __init__(
        self, path: str | os.PathLike[str], plan: PrivacyPlan, *, key: Any = None
    ):
        """Creates the file, or resumes it.

        Args:
            path: the file; its folder must exist.
            plan: the plan of the run.
            key: the run's noise key, of which a hash is kept, so that a second run
                with another key cannot pass for a replay of the first.

        Raises:
            ValueError: if the file is no ledger, belongs to another plan or key, or is
                damaged; it is left as it is.
            OSError: if the file cannot be created, read or written, or another process
                (or another ledger in this one) has it open.
        """
        self.path = Path(path)
        self.plan = plan
        facts = {"dp_ilg_ledger": FORMAT_VERSION, **_describe(plan)}
        self._key = None if key is None else _fingerprint(key)
        if self._key:
            facts["key"] = self._key
        self._header = seal(facts)
        self._recorded_here = -1
        self._file = self._open()
        try:
            self._lock()
            self._resume()
        except BaseException:
            self.close()
            raise

    @property
    def steps(self) -> int:
        """The number of steps recorded, which is also the next new step."""
        return self._tip[0]

    def epsilon(self) -> float:
        """Returns epsilon for the steps recorded so far, at the plan's delta.

        Returns:
            What the plan's accountant says of that many steps and the plan's prior
            releases: 0.0 for neither.

        Privacy:
            Under the plan's neighbouring relation, if each recorded step was the plan's
            own: its Poisson batch, its clip norm and its noise.

        Example:
            >>> import tempfile
            >>> plan = PrivacyPlan(
            ...     num_examples=100, batch_size=10, num_steps=2, delta=1e-5,
            ...     l2_clip_norm=1.0, score_budget=0.0, stages=((2, 1.0),))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     with PrivacyLedger(f"{folder}/ledger.jsonl", plan) as ledger:
            ...         ledger.epsilon()
            0.0
        """
        return self.plan.epsilon(self.steps)

    def record(self, step: SupportsIndex) -> None:
        """Charges one step; call it before the step's release is used.

        Returns once the line is on the disk. Steps come in order; a run that was
        resumed may repeat steps on file, which costs nothing (see Privacy above).

        Args:
            step: which step, from 0; a Python, NumPy or JAX integer.

        Raises:
            BudgetExhausted: for a step past the plan.
            ValueError: for a step that is no whole number, one that leaves a gap or
                was recorded since the file was opened, or a closed ledger.
            OSError: if the line could not be written and synced. The step then counts
                as not recorded, and may be tried again.

        Privacy:
            Use the release only after this has returned.

        Example:
            >>> import tempfile
            >>> plan = PrivacyPlan(
            ...     num_examples=100, batch_size=10, num_steps=9, delta=1e-5,
            ...     l2_clip_norm=1.0, score_budget=0.0, stages=((9, 1.0),))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     with PrivacyLedger(f"{folder}/ledger.jsonl", plan) as ledger:
            ...         ledger.record(1)
            Traceback (most recent call last):
            ValueError: step is 1, but 0 steps are recorded: record step 0 first.
        """
        step = validation.count("step", step)
        if self._file < 0:
            raise ValueError(f"The ledger {self.path} is closed; open it again.")
        if step >= self.plan.num_steps:
            raise BudgetExhausted(
                f"step is {step}, but the plan has {self.plan.num_steps} steps: "
                "stop here, or plan a new run with its own budget."
            )
        if step > self.steps:
            raise ValueError(
                f"step is {step}, but {self.steps} steps are recorded: "
                f"record step {self.steps} first."
            )
        if step <= self._recorded_here:
            raise ValueError(
                f"step is {step}, but this run has recorded step {self._recorded_here} "
                "already; only a resumed run may repeat steps."
            )
        if step == self.steps:
            self._append(seal({"step": step}), steps=self.steps + 1)
        self._recorded_here = step

    def close(self) -> None:
        """Closes the file and lets go of the lock; closing twice is harmless.

        Example:
            >>> import tempfile
            >>> plan = PrivacyPlan(
            ...     num_examples=100, batch_size=10, num_steps=2, delta=1e-5,
            ...     l2_clip_norm=1.0, score_budget=0.0, stages=((2, 1.0),))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     ledger = PrivacyLedger(f"{folder}/ledger.jsonl", plan)
            ...     ledger.close()
            ...     ledger.record(0)  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ValueError: The ledger ... is closed; open it again.
        """
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> "PrivacyLedger":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
        try:
            return os.open(self.path, flags | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            self._fail(error, "opened", "choose a folder that exists and is writable")

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            busy = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            why = "opened, since another run holds it" if busy else "locked"
            self._fail(error, why, "wait for that run, or use another run folder")

    def _resume(self) -> None:
        """Counts the steps on file, after dropping a line that was cut."""
        content = self._read()
        *lines, tail = content.split(b"\n")
        if lines:
            self._check_header(lines[0])
        elif not self._header.startswith(tail):
            self._refuse("is not a privacy ledger", "choose another path")
        for count, line in enumerate(lines[1:]):
            if unseal(line) != {"step": count}:
                self._refuse(
                    f"is damaged in line {count + 2}",
                    "restore it from a copy, or count its plan as spent in full",
                )
        steps = max(0, len(lines) - 1)
        if steps > self.plan.num_steps:
            self._refuse("has more steps than its plan", "count its plan as overspent")
        self._tip = (steps, len(content) - len(tail))  # steps, bytes: one value
        self._has_tail = bool(tail)
        if not lines:
            self._append(self._header, steps=0)
        elif tail:
            self._mend(tail.rstrip(b"\0"), steps)  # zeros are a power cut's
        self._sync()

    def _mend(self, tail: bytes, steps: int) -> None:
        """Counts a last line that lacks its end alone; refuses one that was changed."""
        expected = seal({"step": steps})
        if not expected.startswith(tail):
            self._refuse(
                f"is damaged in line {steps + 2}",
                "restore it from a copy, or count its plan as spent in full",
            )
        if tail == expected[:-1] and steps < self.plan.num_steps:
            self._append(expected, steps=steps + 1)

    def _read(self) -> bytes:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            self._refuse("is not a regular file", "choose another path")
        try:
            with open(self._file, "rb", closefd=False) as file:
                return file.read()
        except OSError as error:
            self._fail(error, "read", "check the disk")

    def _check_header(self, line: bytes) -> None:
        header = unseal(line)
        if header is None and not line.startswith(b'{"dp_ilg_ledger"'):
            self._refuse("is not a privacy ledger", "choose another path")
        if header is None:
            self._refuse("is damaged in line 1", "restore it from a copy")
        if header.get("dp_ilg_ledger") != FORMAT_VERSION:
            self._refuse("has an unknown format", f"use version {FORMAT_VERSION}")
        if header.get("plan_digest") != self.plan.digest():
            self._refuse(
                f"belongs to the plan {header.get('plan_digest')}, not to "
                f"{self.plan.digest()}",
                "resume with that plan, or choose another path",
            )
        if self._key and header.get("key") != self._key:
            self._refuse(
                "belongs to a run with another key",
                "resume with that key, or choose another path",
            )

    def _append(self, line: bytes, *, steps: int) -> None:
        """Writes one line and syncs it, or takes back what was written."""
        try:
            if self._has_tail:
                self._trim()
            self._has_tail = True  # until the line is safe, whatever interrupts
            left = line
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            self._try_to_trim()
            self._fail(error, "written", "free some space or mend the disk, then retry")
        self._tip = (steps, self._tip[1] + len(line))
        self._has_tail = False

    def _trim(self) -> None:
        """Cuts the file back to its last whole, acknowledged line."""
        os.ftruncate(self._file, self._tip[1])
        os.fsync(self._file)
        self._has_tail = False

    def _try_to_trim(self) -> None:
        try:
            self._trim()
        except OSError:
            pass  # the tail is remembered, and the next record trims it first

    def _sync(self) -> None:
        """Makes everything that was found, and the file's name, durable."""
        try:
            self._trim()
            sync_folder(self.path.parent)
        except OSError as error:
            self._fail(error, "synced to the disk", "check the disk")

    def _refuse(self, fault: str, remedy: str) -> NoReturn:
        raise ValueError(f"The file {self.path} {fault}; {remedy}.")

    def _fail(self, error: OSError, verb: str, remedy: str) -> NoReturn:
        reason = error.strerror or str(error)
        message = f"The ledger {self.path} could not be {verb} ({reason}); {remedy}."
        raise type(error)(error.errno, message) from error


def _fingerprint(key: Any) -> str:
    """A hash of a key; whoever could invert it could guess the key anyway."""
    data = validation.key_words("key", key)
    return hashlib.blake2b(data.tobytes(), digest_size=16, person=b"ledger").hexdigest()


def _describe(plan: PrivacyPlan) -> dict[str, Any]:
    return {"plan_digest": plan.digest(), "plan": json.loads(plan.to_json())}
