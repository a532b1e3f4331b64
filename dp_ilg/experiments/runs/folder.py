"""The folder of a run: begun whole or not at all, resumed only where it fits."""

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dp_ilg.accounting.ledger import PrivacyLedger
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.accounting.sealing import sync_folder
from dp_ilg.experiments.config.schema import Config, config_to_toml, read_config
from dp_ilg.experiments.data.locks import locked
from dp_ilg.experiments.runs import projection
from dp_ilg.experiments.runs.job import Job
from dp_ilg.experiments.runs.keys import SCHEME, identity, noise_secret
from dp_ilg.experiments.runs.trainer import Position
from dp_ilg.geometry.layers import paths
from dp_ilg.projection.factor_pca import FactorPca
from dp_ilg.training.checkpoints import save_checkpoint
from dp_ilg.training.environment import code_digest, environment

_DRAFT = re.compile(r"\..+\.[0-9a-f]{8}|\.report-.*")


def write_atomically(path: Path, text: str | bytes) -> None:
    """Writes a file so that a reader sees the old one or the whole new one.

    Args:
        path: the file.
        text: its content; text is encoded as UTF-8.

    Raises:
        OSError: if it cannot be written; nothing is left behind.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> write_atomically(path, "one")
        >>> path.read_text(), len(list(path.parent.iterdir()))
        ('one', 1)
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(draft, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


class RunFolder:
    """Paths and files of one run.

    The folder is for its owner only (mode 0700): the checkpoints hold the keys. The
    report and the summary hold nothing private and may be copied out.

    Attributes:
        path: the folder.
        layout: how devices share the work, which checkpoints say.

    Privacy:
        `config.toml` leaves the seed out. Who knows the seed or reads the keys in a
        checkpoint can subtract the noise.

    Example:
        >>> RunFolder(Path("runs/one")).ledger.name
        'ledger.jsonl'
    """

    def __init__(self, path: Path, layout: str = "one device"):
        """Names the files; touches nothing."""
        self.path, self.layout = Path(path), layout
        self.config = self.path / "config.toml"
        self.plan = self.path / "plan.json"
        self.ledger = self.path / "ledger.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.projection = self.path / projection.FILE
        self.certificate = self.path / "certificate.json"

    def check_absent(self) -> None:
        """Raises if something is there already.

        Raises:
            ValueError: naming the two ways out.

        Example:
            >>> RunFolder(Path("/")).check_absent()
            Traceback (most recent call last):
            ValueError: The run folder / exists; choose another one, or pass --resume \
to go on with it.
        """
        if os.path.lexists(self.path):
            raise ValueError(
                f"The run folder {self.path} exists; choose another one, or pass "
                "--resume to go on with it."
            )

    def begin(self, job: Job, position: Position, seed_fixed: bool) -> None:
        """Makes the folder with everything in it, the first checkpoint included.

        It is built under another name and renamed, so that a start that fails leaves
        nothing, and no step is taken whose keys are not on disk.

        Args:
            job: the run.
            position: its start.
            seed_fixed: whether the keys come from a seed that somebody chose.

        Raises:
            ValueError: if the folder exists.
            OSError: if it cannot be written.
        """
        self.check_absent()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._remove_drafts()
        name = f".{self.path.name}.{secrets.token_hex(4)}"
        draft = RunFolder(self.path.with_name(name), self.layout)
        try:
            draft.path.mkdir(mode=0o700)
            with locked(draft.path):
                draft._fill(job, position, seed_fixed)
                self.check_absent()
                os.rename(draft.path, self.path)
            sync_folder(self.path.parent)
        except BaseException as error:
            shutil.rmtree(draft.path, ignore_errors=True)
            if isinstance(error, OSError) and error.filename == str(draft.path):
                error.filename = str(self.path)  # the name that was asked for
            raise

    def _fill(self, job: Job, position: Position, seed_fixed: bool) -> None:
        write_atomically(self.config, config_to_toml(job.config))
        write_atomically(self.plan, job.plan.to_json() + "\n")
        self.metrics.touch()
        PrivacyLedger(self.ledger, job.plan, key=position.sampler_key).close()
        facts: dict[str, Any] = dict(identity(job), seed_fixed=seed_fixed)
        facts["keys"] = {"of": SCHEME, "code": code_digest()}
        if job.plan.exact_noise:
            facts["noise_secret"] = noise_secret(job, job.config.run.seed)
        if job.raw is not None:
            chosen = job.config.data.projection
            basis = projection.fit(job.raw, chosen, position.sampler_key)
            content = projection.to_bytes(basis)
            write_atomically(self.projection, content)
            facts["projection"] = hashlib.sha256(content).hexdigest()
        self.saver(facts)(position)

    def _remove_drafts(self) -> None:
        """Removes what starts that were killed left beside the folder, keys and all."""
        for path in self.path.parent.glob(f".{glob.escape(self.path.name)}.*"):
            if path.is_dir() and _DRAFT.fullmatch(path.name):
                try:
                    with locked(path):
                        shutil.rmtree(path, ignore_errors=True)
                except (ValueError, OSError):
                    continue  # somebody is at it, or it is gone

    def tidy(self) -> None:
        """Removes files that a killed run had not finished writing.

        Raises:
            OSError: if one cannot be removed.
        """
        for path in self.path.iterdir():
            if path.is_file() and _DRAFT.fullmatch(path.name):
                path.unlink()

    def add_certificate(self, job: Job, position: Position) -> None:
        """Writes which bounds hold for the run, and why, unless that is there.

        Args:
            job: the run, ready to train.
            position: of the run, for shapes.

        Raises:
            OSError: if it cannot be written.
        """
        if not self.certificate.exists():
            found = job.certificate(position.params).as_dict()
            write_atomically(self.certificate, json.dumps(found, indent=1) + "\n")

    def saver(self, facts: Mapping[str, Any]) -> Callable[[Position], None]:
        """Returns a function that writes a position as a checkpoint.

        Args:
            facts: what `identity` returns, and `seed_fixed`, whether the keys come
                from a seed that somebody chose.

        Returns:
            The function; it raises OSError if the disk does not take it.
        """
        known = dict(facts, environment=environment(self.layout))

        def save(position: Position) -> None:
            names = [("/".join(p), np.shape(x)) for p, x in paths(position.params)]
            tree = (position.params, position.state, position.sampler_key)
            averaged = position.kept is not position.params
            first = len(jax.tree.leaves(position.state)) if averaged else 0
            found = dict(known, parameters=names, parameters_from=first)
            leaves = jax.tree_util.tree_leaves_with_path(position.params)
            found["parameter_keys"] = [jax.tree_util.keystr(p) for p, _ in leaves]
            found |= {"seconds": position.seconds, "trail": position.trail}
            save_checkpoint(self.checkpoints, position.step, tree, found)

        return save

    def read_projection(self, facts: Mapping[str, Any]) -> FactorPca | None:
        """Reads the projection that was released when the run began.

        Args:
            facts: of a checkpoint, which knows the digest of the projection.

        Returns:
            The projection, or None if the run has none.

        Raises:
            ValueError: if it is not the one of the checkpoint, or absent.
        """
        known = facts.get("projection")
        if known is None:
            return None
        with contextlib.suppress(OSError):
            content = self.projection.read_bytes()
            if hashlib.sha256(content).hexdigest() == known:
                return projection.from_bytes(content)
        raise ValueError(
            f"{self.projection} is missing or not what this run released; restore it "
            "from a copy."
        )

    def read_plan(self) -> PrivacyPlan:
        """Reads the plan the run was begun with.

        Returns:
            The plan.

        Raises:
            ValueError: if it is not there or damaged.
        """
        try:
            return PrivacyPlan.from_json(self.plan.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self.plan} cannot be read ({error}); give a complete run folder."
            ) from None

    def read_config(self) -> Config:
        """Reads the configuration the run was begun with, without its seed.

        Returns:
            The configuration.

        Raises:
            ValueError: if it is not there or damaged.
        """
        return read_config(self.config)

    def restate(self, config: Config) -> None:
        """Takes over what the report of a resumed run shall say.

        Args:
            config: of the resumed run, the same otherwise.

        Raises:
            ValueError: if the folder's configuration is damaged.
            OSError: if it cannot be written.
        """
        known = self.read_config()
        if known.report != config.report:
            changed = dataclasses.replace(known, report=config.report)
            write_atomically(self.config, config_to_toml(changed))

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        """Appends one evaluation.

        Args:
            record: JSON values.

        Raises:
            OSError: if it cannot be written.
        """
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Drops evaluations after a step, and a last line that was cut short.

        Args:
            step: the step a run is resumed from.

        Raises:
            OSError: if it cannot be written.
        """
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        write_atomically(self.metrics, "".join(kept))


def differing_field(one: Config, other: Config) -> str | None:
    """Names the first field in which two runs differ, the seed apart.

    Args:
        one: a configuration.
        other: another one.

    Returns:
        A line like ``run.eval_every is 25, not 10``, or None.

    Example:
        >>> from dp_ilg.experiments.config.schema import DataConfig
        >>> differing_field(Config(), Config(data=DataConfig("mnist")))
        "data.name is 'digits', not 'mnist'"
    """
    for section in ("data", "model", "privacy", "optimizer", "run", "metrics"):
        a, b = getattr(one, section), getattr(other, section)
        for name in a.__dataclass_fields__:
            if (section, name) == ("run", "seed"):
                continue
            if getattr(a, name) != getattr(b, name):
                values = f"{getattr(a, name)!r}, not {getattr(b, name)!r}"
                return f"{section}.{name} is {values}"
    return None
