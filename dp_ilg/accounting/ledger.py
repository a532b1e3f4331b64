"""The privacy ledger: which steps of a plan may have been released, on disk.

A step is charged from the moment its release could be seen, so it is written and synced
*before* the release is used. After a crash the file then holds at least the steps whose
results got out, never fewer. One line of JSON a step, each closed by a CRC-32.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.accounting.sealing import SealedLog, cut_from, seal, unseal
from dp_ilg.accounting.statements.statement import Statement
from dp_ilg.accounting.step_lines import (
    DIGEST_BYTES,
    step_forms,
    step_line,
    why_refused,
)

FORMAT_VERSION = 2  # 1 had no released_from, and is read as well
_TWO_WAYS = (
    "pass resume=True to go on with that very run (same parameters, program, data and "
    "keys), or choose another path and new keys for another run"
)


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

    Opening a file that has steps needs ``resume=True``: a second run under the same key
    is either the same run, or it gives data away. A last line that was cut while it was
    being written is dropped, since `record` had not returned and nothing had been
    released; one that lacks its line end alone counts.
    The file is locked against a second writer until `close`.

    Attributes:
        path: where the file is.
        plan: the plan whose steps are counted.

    Privacy:
        The ledger counts what this process was told of, for the unit and neighbouring
        relation of the plan. A repeated step is charged once, which is right only if it
        repeats the same release bit for bit (law: keyed by step). `released_from` holds
        a step to that: the same parameters, program and data, or it is refused; a step
        that was recorded without cannot be repeated. Whoever can edit or delete the
        file can hide steps: the CRC guards against accidents, not against people.

    Example:
        >>> import tempfile
        >>> plan = PrivacyPlan(
        ...     num_examples=100, batch_size=10, num_steps=2, delta=1e-5,
        ...     l2_clip_norm=1.0, score_budget=0.0, stages=((2, 1.0),))
        >>> folder = tempfile.TemporaryDirectory()
        >>> with PrivacyLedger(f"{folder.name}/ledger.jsonl", plan) as ledger:
        ...     ledger.record(0, released_from="digest of parameters, program, data")
        ...     ledger.steps
        1
        >>> with PrivacyLedger(
        ...     f"{folder.name}/ledger.jsonl", plan, resume=True) as ledger:
        ...     # a resumed run repeats the step it was cut off in, as it was
        ...     ledger.record(0, released_from="digest of parameters, program, data")
        ...     ledger.record(1)
        ...     ledger.record(2)
        Traceback (most recent call last):
        dp_ilg.accounting.ledger.BudgetExhausted: step is 2, but the plan has 2 ...
        >>> folder.cleanup()
    """

    def __init__(
        self, path: Any, plan: PrivacyPlan, *, key: Any = None, resume: bool = False
    ):
        """Creates the file, or resumes it.

        Args:
            path: the file, text or `os.PathLike`; its folder must exist.
            plan: the plan of the run.
            key: the run's noise key, of which a hash is kept, so that a second run
                with another key cannot pass for a replay of the first. It also keys the
                hashes of `released_from`, which then tell nothing to whoever guesses.
            resume: whether to go on with a run whose steps are in the file; a file
                that is not there yet is begun all the same.

        Raises:
            ValueError: if the file has steps and `resume` is False, is no ledger,
                belongs to another plan or key, or is damaged; it is left as it is.
            OSError: if the file cannot be created, read or written, or another process
                (or another ledger in this one) has it open.
        """
        self.path = Path(path)
        self.plan = plan
        self._words = b""
        self._facts = _describe(plan)
        if key is not None:
            self._words = validation.key_words("key", key).tobytes()
            self._facts["key"] = _fingerprint(self._words)
        self._recorded_here, self._may_resume = -1, bool(resume)
        self._origins: dict[int, str | None] = {}
        self._log = SealedLog(self.path)
        try:
            self._resume()
        except BaseException:
            self.close()
            raise

    @property
    def steps(self) -> int:
        """The number of steps recorded, which is also the next new step."""
        return max(0, self._log.count - 1)

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
            ...         ledger.epsilon(), ledger.statement().as_dict()["steps"]
            (0.0, 0)
        """
        return self.plan.epsilon(self.steps)

    def statement(self) -> Statement:
        """Returns the guarantee of the steps recorded so far, in words and as JSON.

        Returns:
            What `dp_ilg.PrivacyPlan.statement` says of that many steps.

        Privacy: as `epsilon`, and as the statement of some steps.
        """
        return self.plan.statement(self.steps)

    def record(self, step: SupportsIndex, *, released_from: Any = None) -> None:
        """Charges one step; call it before the step's release is used.

        Returns once the line is on the disk. Steps come in order; a run that was
        resumed may repeat steps on file, which costs nothing (see Privacy above).

        Args:
            step: which step, from 0; a Python, NumPy or JAX integer.
            released_from: a digest of all that decides the release besides key and
                step, such as `dp_ilg.release_digest` makes of the parameters and of a
                name for the program. A hash of it is kept with the step.

        Raises:
            BudgetExhausted: for a step past the plan.
            ValueError: for a step that is no whole number, one that leaves a gap or
                was recorded since the file was opened, a repeated step that was
                released from something else or without saying what, or a closed
                ledger.
            TypeError: for a `released_from` that is no text.
            OSError: if the line could not be written and synced. The step then counts
                as not recorded, and may be tried again.

        Privacy:
            Use the release only after this has returned. A repeat that would differ is
            refused rather than charged: two releases under one noise give the
            difference of their sums away, which no charge of a second step covers.

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
        origin = self._origin(released_from)
        if self._log.closed:
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
            self._origins[step] = origin
            self._log.append(step_line(step, origin))
        elif origin is None or origin != self._origins[step]:
            raise ValueError(why_refused(step, origin, self._origins[step]))
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
        self._log.close()

    def __enter__(self) -> "PrivacyLedger":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def _resume(self) -> None:
        """Counts the steps on file, after dropping a line that was cut."""
        lines, tail = self._log.read()
        if lines:
            self._check_header(lines[0])
        elif not any(h.startswith(tail) for h in map(self._header, (1, 2))):
            self._log.refuse("is not a privacy ledger", "choose another path")
        for count, line in enumerate(lines[1:]):
            self._origins[count] = self._read_step(count, line)
        steps = max(0, len(lines) - 1)
        if lines and (steps or tail) and not self._may_resume:
            self._log.refuse(f"holds a run of {steps} steps already", _TWO_WAYS)
        if steps > self.plan.num_steps:
            self._log.refuse("has more steps than its plan", "count it as overspent")
        self._log.accept(lines, tail)
        if not lines:
            self._log.append(self._header(FORMAT_VERSION))
        elif tail:
            self._mend(tail.rstrip(b"\0"), steps)  # zeros are a power cut's
        self._log.sync()

    def _mend(self, tail: bytes, steps: int) -> None:
        """Counts a last line that lacks its end alone; refuses one that was changed."""
        text = tail.decode("latin-1")
        fits = [form for form in step_forms(steps) if cut_from(form, text)]
        if not fits:
            self._refuse_line(steps)
        if len(tail) == len(fits[0]) - 1:
            self._origins[steps] = self._read_step(steps, tail)
            if steps < self.plan.num_steps:
                self._log.append(tail + b"\n")

    def _read_step(self, count: int, line: bytes) -> str | None:
        """What the step of a line was released from, if it says."""
        found = unseal(line) or {}
        origin = found.get("released_from")
        if line + b"\n" != step_line(count, origin):
            self._refuse_line(count)
        return origin

    def _refuse_line(self, step: int) -> NoReturn:
        self._log.refuse(
            f"is damaged in line {step + 2}",
            "restore it from a copy, or count its plan as spent in full",
        )

    def _header(self, version: int) -> bytes:
        return seal({"dp_ilg_ledger": version, **self._facts})

    def _check_header(self, line: bytes) -> None:
        refuse = self._log.refuse
        header = unseal(line)
        if header is None and not line.startswith(b'{"dp_ilg_ledger"'):
            refuse("is not a privacy ledger", "choose another path")
        if header is None:
            refuse("is damaged in line 1", "restore it from a copy")
        if header.get("dp_ilg_ledger") not in (1, 2):
            refuse("has an unknown format", f"use version {FORMAT_VERSION}")
        if header.get("plan_digest") != self.plan.digest():
            refuse(
                f"belongs to the plan {header.get('plan_digest')}, not to "
                f"{self.plan.digest()}",
                "resume with that plan, or choose another path",
            )
        if self._words and header.get("key") != self._facts["key"]:
            refuse(
                "belongs to a run with another key",
                "resume with that key, or choose another path",
            )

    def _origin(self, released_from: Any) -> str | None:
        """A hash of what a step is released from, under the run's key."""
        if released_from is None:
            return None
        if not isinstance(released_from, str):
            raise TypeError(
                f"released_from is {type(released_from).__name__}, but must be text; "
                "pass what dp_ilg.release_digest returns."
            )
        digest = hashlib.blake2b(
            released_from.encode(),
            digest_size=DIGEST_BYTES,
            key=self._words,
            person=b"released_from",
        )
        return digest.hexdigest()


def _fingerprint(words: bytes) -> str:
    """A hash of a key; whoever could invert it could guess the key anyway."""
    digest = hashlib.blake2b(words, digest_size=DIGEST_BYTES, person=b"ledger")
    return digest.hexdigest()


def _describe(plan: PrivacyPlan) -> dict[str, Any]:
    return {"plan_digest": plan.digest(), "plan": json.loads(plan.to_json())}
