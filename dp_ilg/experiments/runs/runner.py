"""A run from a configuration to a finished folder, or on from where it stopped."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from dp_ilg.accounting.ledger import PrivacyLedger
from dp_ilg.experiments.config.schema import Config
from dp_ilg.experiments.data.locks import locked
from dp_ilg.experiments.reports.event_files import event_file
from dp_ilg.experiments.reports.iterates import error_bar
from dp_ilg.experiments.reports.page import write_report
from dp_ilg.experiments.runs.distributed import (
    Team,
    deaf_to_interrupts,
    stop_requests,
)
from dp_ilg.experiments.runs.evaluation import summary_of
from dp_ilg.experiments.runs.folder import (
    RunFolder,
    differing_field,
    write_atomically,
)
from dp_ilg.experiments.runs.hosts import Devices, joined
from dp_ilg.experiments.runs.job import Job, build_job, ready
from dp_ilg.experiments.runs.keys import check_keys, derived_keys, identity, run_keys
from dp_ilg.experiments.runs.trainer import (
    Position,
    Watch,
    start,
    train,
    with_exact_noise,
)
from dp_ilg.training.checkpoints import load_checkpoint
from dp_ilg.training.environment import check_repeatable
from dp_ilg.training.memory_limits import memory_advice

_ONE_DEVICE = Devices()


class Interrupted(Exception):
    """The run was asked to stop and can be resumed.

    Example:
        >>> str(Interrupted("Stopped."))
        'Stopped.'
    """


def run_training(
    config: Config,
    run_dir: Path,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    progress: Callable[[Job, int], Any] | None = None,
    devices: Devices = _ONE_DEVICE,
) -> dict[str, Any]:
    """Trains a model and leaves a complete run folder.

    Args:
        config: the run.
        run_dir: where to; must not exist, unless resumed.
        data_dir: where data files are.
        resume: go on with the folder, or start it if it does not exist.
        progress: (job, first step) -> context manager that gives an object with
            ``stepped(step)`` and ``evaluated(record)``.
        devices: where; of several processes only number 0 touches the folder.

    Returns:
        The summary, as in ``summary.json``; nothing in processes other than 0.

    Raises:
        ValueError: in one sentence, before anything is written, for a configuration,
            data, model, folder or devices that do not fit; later, if another process
            is lost.
        Interrupted: after Ctrl-C; everything is saved.
        OSError: if the disk takes no more.

    Privacy:
        Everything in the folder but ``checkpoints/`` is released by the plan's
        mechanism or public; the checkpoints hold the keys.

    Example:
        >>> import inspect
        >>> list(inspect.signature(run_training).parameters)[:2]
        ['config', 'run_dir']
    """
    if config.privacy.noise == "exact" and devices != _ONE_DEVICE:
        raise ValueError(
            "privacy.noise is 'exact', which needs one device; leave --noise out."
        )
    stopped = None
    with joined(devices) as hosts:
        try:
            team = Team(hosts, devices)
            if not hosts.leads:
                return _follow(build_job(config, data_dir), team)
            folder = RunFolder(run_dir, team.layout)
            return _lead(config, folder, data_dir, resume, team, progress)
        except Interrupted as stop:  # no failure: all processes leave together
            stopped = stop
    raise stopped


def _lead(
    config: Config,
    folder: RunFolder,
    data_dir: Path | None,
    resume: bool,
    team: Team,
    progress: Callable[[Job, int], Any] | None,
) -> dict[str, Any]:
    """The run as process 0 sees it, which has the folder."""
    known = resume and folder.path.exists()
    if known:
        _check_same(folder, config)
    else:
        folder.check_absent()
    job = build_job(config, data_dir, folder.read_plan() if known else None)
    team.agree(job)
    if not known:
        seed = config.run.seed
        position = start(job, run_keys(job, seed))
        if job.raw is None and config.run.memory_mib is not None:  # refused before
            job.grad_fn.microbatch(position.params, job.batch_shapes())
        folder.begin(job, position, seed is not None)
    with locked(folder.path):
        folder.restate(config)
        return _go_on(folder, job, progress, team)


def _follow(job: Job, team: Team) -> dict[str, Any]:
    """The run as processes other than 0 see it: steps, and nothing written."""
    team.agree(job)
    position = team.begin(start(job, derived_keys(0, {})))  # process 0's comes in it
    if position.step >= 0:
        with deaf_to_interrupts(team.hosts.process):
            ready_job = ready(job, position.sampler_key)
            position = _steps(ready_job, None, team, position, Watch())
        if position.step < job.plan.num_steps:
            raise Interrupted(f"Stopped after step {position.step} with process 0.")
    return {}


def _steps(
    job: Job,
    ledger: Any,
    team: Team,
    position: Position,
    watch: Watch,
    secret: str | None = None,
) -> Position:
    """Trains on the team's devices; the position that is returned is whole here."""
    tools = with_exact_noise(team.tools(job, position), job, position, secret)
    records = team.records(ledger)
    return team.local(train(job, position, records, team.watch(watch), tools))


def _go_on(
    folder: RunFolder,
    job: Job,
    progress: Callable[[Job, int], Any] | None,
    team: Team,
) -> dict[str, Any]:
    """Takes the steps that are left, from the newest checkpoint."""
    position, facts = _resumed(folder, job)
    if position.step == job.plan.num_steps and folder.summary.exists():
        team.begin(position, over=True)
        write_report(folder.path)
        return json.loads(folder.summary.read_text(encoding="utf-8"))
    job = ready(job, position.sampler_key, folder.read_projection(facts))
    key = position.sampler_key
    with PrivacyLedger(folder.ledger, job.plan, key=key, resume=True) as ledger:
        _check_ledger(ledger, position, facts, team.layout)
        position = team.begin(position)
        folder.tidy()
        folder.cut_metrics(position.step)
        folder.add_certificate(job, position)
        shapes = job.batch_shapes()
        with memory_advice(lambda: job.grad_fn.microbatch(position.params, shapes)):
            secret = facts.get("noise_secret")
            steps = partial(_steps, job, ledger, team, secret=secret)
            position = _train(folder, job, position, facts, progress, steps)
        if position.step < job.plan.num_steps:
            with suppress(ValueError):  # the page of the steps taken so far
                write_report(folder.path)
            raise Interrupted(
                f"Stopped after step {position.step} of {job.plan.num_steps}; go on "
                f"with --resume --run-dir {folder.path}."
            )
        summary = summary_of(job, position, ledger, bool(facts["seed_fixed"]))
        summary |= error_bar(folder.metrics)
    write_atomically(folder.summary, json.dumps(summary, indent=1) + "\n")
    write_report(folder.path)
    return summary


def _resumed(folder: RunFolder, job: Job) -> tuple[Position, dict[str, Any]]:
    blank = start(job, derived_keys(0, {}))
    like = (blank.params, blank.state, blank.sampler_key)
    step, tree, facts = load_checkpoint(folder.checkpoints, like, identity(job))
    params, state, sampler_key = tree
    check_keys(job, facts, sampler_key, folder.path)
    rest = (facts["seconds"], facts.get("trail", ""))
    return Position(step, params, state, sampler_key, *rest), facts


def _check_same(folder: RunFolder, config: Config) -> None:
    found = differing_field(folder.read_config(), config)
    if found:
        raise ValueError(
            f"The run folder {folder.path} was begun with another configuration: "
            f"{found}; resume without changes or choose another folder."
        )


def _check_ledger(
    ledger: PrivacyLedger, position: Position, facts: dict[str, Any], layout: str
) -> None:
    if ledger.steps < position.step:
        raise ValueError(
            f"{ledger.path} has {ledger.steps} steps but the checkpoint has "
            f"{position.step}, so released steps are missing; restore the ledger."
        )
    if ledger.steps > position.step:
        check_repeatable(facts.get("environment"), position.step, layout)


def _train(
    folder: RunFolder,
    job: Job,
    position: Position,
    facts: dict[str, Any],
    progress: Callable[[Job, int], Any] | None,
    steps: Callable[[Position, Watch], Position],
) -> Position:
    begin = progress or _silent
    board: Any = nullcontext(lambda record: None)
    if job.config.report.tensorboard:
        board = event_file(folder.path, position.seconds)
    with stop_requests() as stop, board as show, begin(job, position.step) as bar:

        def evaluated(record: dict[str, Any]) -> None:
            folder.add_metrics(record)
            show(record)
            bar.evaluated(record)

        watch = Watch(bar.stepped, evaluated, folder.saver(facts), stop)
        return steps(position, watch)


@contextmanager
def _silent(job: Job, step: int) -> Iterator[Watch]:
    yield Watch()


def with_seed(config: Config, seed: int | None) -> Config:
    """Returns the configuration with another seed.

    Args:
        config: a run.
        seed: its seed, None for fresh keys.

    Returns:
        The same run otherwise.

    Example:
        >>> with_seed(Config(), 3).run.seed
        3
    """
    return dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))
