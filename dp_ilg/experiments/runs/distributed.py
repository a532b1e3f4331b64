"""A run on many devices: what its loop calls there, and how processes stay in step.

Every process runs the same loop. Process 0 has the folder: it writes a step into the
ledger, and only when that is on disk lets the others take it. They read nothing of
the folder; parameters, state and keys are sent to them.
"""

from __future__ import annotations

import json
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from dp_ilg.experiments.config.schema import config_from_mapping, config_to_toml
from dp_ilg.experiments.runs.folder import differing_field
from dp_ilg.experiments.runs.hosts import Devices, Hosts
from dp_ilg.experiments.runs.job import Job
from dp_ilg.experiments.runs.keys import identity
from dp_ilg.experiments.runs.trainer import (
    Position,
    Records,
    Tools,
    Watch,
    make_tools,
)
from dp_ilg.training.environment import environment
from dp_ilg.training.mesh import Shardings, placed, spread, whole
from dp_ilg.training.mesh_rows import OwnRows, place_rows
from dp_ilg.training.step import make_train_step

_PATIENCE_SECONDS = 5.0  # for others to hear of a failure between two steps


class Team:
    """The devices and processes of a run; on one device all of it does nothing.

    Attributes:
        hosts: the processes.
        mesh: the devices, None for a single one.
        layout: how they are arranged, in words: rounding follows it.

    Example:
        >>> Team(Hosts(0, 1), Devices()).layout
        'one device'
    """

    def __init__(self, hosts: Hosts, devices: Devices):
        """Makes the mesh.

        Raises:
            ValueError: if devices are missing or left over.
        """
        self.hosts, self.mesh = hosts, devices.mesh()
        self.layout = "one device"
        if self.mesh is not None:
            cut = "{replicas} replicas of {shards} shards".format(**self.mesh.shape)
            self.layout = f"{cut} on {hosts.count} processes"

    def agree(self, job: Job) -> None:
        """Checks that all processes would train the same way on the same data.

        Raises:
            ValueError: in every process, naming the first difference.
        """
        if self.hosts.count == 1:
            return
        _check_configurations(self.hosts, config_to_toml(job.config))
        facts = identity(job) | environment(self.layout)
        facts["number of devices"] = str(jax.local_device_count())
        self.hosts.agree(facts)

    def begin(self, position: Position, over: bool = False) -> Position:
        """Brings everybody to one position, that of process 0.

        Args:
            position: of process 0; of the others any fresh one.
            over: whether nothing is left to do, as process 0 knows.

        Returns:
            The position on all devices; the others get step -1 if all is over.
        """
        if self.hosts.count > 1:
            position = _send(self.hosts, position, over)
            self.hosts.patience = _PATIENCE_SECONDS
        if self.mesh is None or position.step < 0:
            return position
        at = Shardings.of(position.params, position.state, self.mesh)
        params, state = placed((position.params, position.state), at[:2])
        return position._replace(params=params, state=state)

    def local(self, position: Position) -> Position:
        """The position whole in this process; all must ask for it together."""
        if self.mesh is None:
            return position
        params, state = whole((position.params, position.state))
        return position._replace(params=params, state=state)

    def tools(self, job: Job, position: Position) -> Tools | None:
        """What the loop calls, None for what it makes itself on one device."""
        if self.mesh is None:
            return None
        mesh, tx = self.mesh, job.make_optimizer(jax.random.key(0))
        at = Shardings.of(position.params, position.state, mesh)
        evaluate = make_tools(job).evaluate if self.hosts.leads else lambda _: {}
        return Tools(
            make_train_step(spread(job.grad_fn, mesh), tx, at),
            lambda here: evaluate(self.local(here)),
            partial(
                OwnRows,
                process=self.hosts.process,
                processes=self.hosts.count,
                devices=mesh.size // self.hosts.count,
            ),
            partial(place_rows, mesh),
            self.local,
        )

    def records(self, ledger: Records | None) -> Records:
        """The ledger: steps are on disk before anybody takes them."""
        if self.hosts.count == 1 and ledger is not None:
            return ledger
        return _SharedRecords(self.hosts, ledger)

    def watch(self, watch: Watch) -> Watch:
        """Lets all processes stop where process 0 is asked to."""
        if self.hosts.count == 1:
            return watch
        return replace(watch, stop=_SharedStop(self.hosts, watch.stop))


class _SharedRecords:
    """Process 0 writes a step down and says so; the others wait to hear it."""

    def __init__(self, hosts: Hosts, ledger: Records | None):
        self._hosts, self._ledger = hosts, ledger

    def record(self, step: int, *, released_from: Any) -> None:
        if self._ledger is None:
            self._hosts.hear(f"record/{step}")
            return
        self._ledger.record(step, released_from=released_from)
        self._hosts.say(f"record/{step}", "on disk")
        if step > 1:  # everybody has taken that step
            self._hosts.forget(f"record/{step - 2}")


class _SharedStop:
    """Process 0's answer to whether to stop, after each step, in all processes."""

    def __init__(self, hosts: Hosts, stop: Callable[[], bool]):
        self._hosts, self._stop, self._asked = hosts, stop, 0

    def __call__(self) -> bool:
        key = f"stop/{self._asked}"
        self._asked += 1
        if not self._hosts.leads:
            return self._hosts.hear(key) == "yes"
        answer = self._stop()
        self._hosts.say(key, "yes" if answer else "no")
        if self._asked > 2:
            self._hosts.forget(f"stop/{self._asked - 3}")
        return answer


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C into a question the loop asks; the second one raises.

    Yields:
        The question: whether somebody asked. Outside the main thread nobody can.

    Example:
        >>> with stop_requests() as stop:
        ...     stop()
        False
    """
    asked = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("Stopping after this step; Ctrl-C again to drop it.", file=sys.stderr)

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: nobody can press Ctrl-C here
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def deaf_to_interrupts(process: int) -> Iterator[None]:
    """Leaves Ctrl-C to process 0, which stops all of them after a step.

    Args:
        process: which one this is.

    Yields:
        Nothing.

    Example:
        >>> with deaf_to_interrupts(1):
        ...     pass
    """

    def say(number: int, frame: Any) -> None:
        print(f"Process {process} stops when process 0 does.", file=sys.stderr)

    before = signal.signal(signal.SIGINT, say)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _check_configurations(hosts: Hosts, text: str) -> None:
    hosts.say(f"configuration/{hosts.process}", text)
    first, *rest = [
        config_from_mapping(tomllib.loads(hosts.hear(f"configuration/{i}")))
        for i in range(hosts.count)
    ]
    for number, other in enumerate(rest, 1):
        found = differing_field(other, first)
        if found:
            raise ValueError(
                f"Process {number} has another configuration than process 0: {found}; "
                "start all processes with the same file and flags."
            )


def _send(hosts: Hosts, position: Position, over: bool) -> Position:
    """Process 0's position in every process, bit by bit."""
    from jax.experimental import multihost_utils

    if hosts.leads:
        step = -1 if over else position.step
        facts = [step, position.seconds, position.trail]
        hosts.say("position", json.dumps(facts))
    step, seconds, trail = json.loads(hosts.hear("position"))
    if step < 0:
        return position if hosts.leads else position._replace(step=-1)
    tree = (position.params, position.state, position.sampler_key)
    leaves, structure = jax.tree.flatten(tree)
    plain = [_words(x) for x in leaves]
    sent = np.concatenate([np.frombuffer(x.tobytes(), np.uint8) for x in plain])
    if not hosts.leads:
        sent = np.zeros_like(sent)
    got = np.asarray(multihost_utils.broadcast_one_to_all(sent, hosts.leads))
    ends = np.cumsum([x.nbytes for x in plain])
    pieces = np.split(got.astype(np.uint8), ends[:-1])
    filled = map(_filled, leaves, plain, pieces)
    params, state, sampler_key = jax.tree.unflatten(structure, filled)
    return Position(step, params, state, sampler_key, seconds, trail)


def _words(leaf: Any) -> np.ndarray:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _filled(leaf: Any, plain: np.ndarray, sent: np.ndarray) -> Any:
    value = np.frombuffer(sent.tobytes(), plain.dtype).reshape(plain.shape)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        words = jax.numpy.asarray(value)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(leaf))
    return jax.numpy.asarray(value)
