"""Several processes as one run: how they meet, agree, and notice that one is gone.

All of it goes over JAX's own distributed runtime. Process 0 decides and writes; the
others do as it says. Whatever one process dies of ends all of them: a collective whose
peer is gone fails at once, and a silent peer is noticed after `Devices.timeout`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from dp_ilg.training.mesh import make_mesh
from dp_ilg.validation import positive, whole

_POLL_MILLISECONDS = 500
_PATIENCE_SECONDS = 60.0  # for others, perhaps still loading, to hear what went wrong
_FAREWELL_SECONDS = 2.0  # for those who have heard to end before the coordinator does
_SHUTDOWN_SECONDS = 300  # process 0 still evaluates and writes when the others are done
GONE = (
    "the other processes cannot be reached any more, so one of them has ended; every "
    "step that may have been seen is in the ledger: start all again with --resume."
)

UNMET = (
    "start each of them once, with one coordinator, one number of processes and "
    "numbers from 0."
)
MET = "DP_ILG_MET"
"""Environment variable: a file descriptor that hears when the processes have met."""


class LostProcess(ValueError):
    """Another process ended, or cannot be reached.

    Example:
        >>> issubclass(LostProcess, ValueError)
        True
    """


@dataclass(frozen=True)
class Devices:
    """Where a run is carried out; no part of what it is, nor of its guarantee.

    A run may go on with other devices than it was begun with: its noise has the same
    bits, and sums differ by rounding.

    Attributes:
        replicas: copies of the parameters, over which batches are cut; left out, one
            device, or all there are if anything else here is given.
        shards: pieces that each copy is cut into, over as many devices.
        coordinator: HOST:PORT of process 0, for several processes.
        processes: how many there are.
        process: which one this is, from 0.
        timeout: seconds to wait for a process that does not come or has gone silent.

    Raises:
        ValueError: for numbers out of range, or several processes without coordinator.

    Privacy:
        The processes send parameters and secret keys to each other as they are: the
        network between them must be trusted.

    Example:
        >>> Devices(processes=2)
        Traceback (most recent call last):
        ValueError: devices.coordinator is left out, but 2 processes need one; give \
HOST:PORT of process 0.
    """

    replicas: int | None = None
    shards: int = 1
    coordinator: str | None = None
    processes: int = 1
    process: int = 0
    timeout: float = 60.0

    def __post_init__(self):
        if self.replicas is not None:
            whole("devices.replicas", self.replicas)
        whole("devices.shards", self.shards)
        whole("devices.processes", self.processes)
        whole("devices.process", self.process, 0)
        positive("devices.timeout", self.timeout)
        if self.process >= self.processes:
            raise ValueError(
                f"devices.process is {self.process}, but must be below "
                f"devices.processes = {self.processes}; it counts from 0."
            )
        if self.processes > 1 and self.coordinator is None:
            raise ValueError(
                f"devices.coordinator is left out, but {self.processes} processes need "
                "one; give HOST:PORT of process 0."
            )
        if self.coordinator is not None:
            self.address()

    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = (self.coordinator or "").rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(
                f"devices.coordinator is {self.coordinator!r}, but must be HOST:PORT, "
                "such as 10.0.0.1:1234."
            )
        return host, int(port)

    def mesh(self) -> Mesh | None:
        """The mesh that is asked for, None for a single device.

        Raises:
            ValueError: if devices are missing or left over.
        """
        if self == Devices(timeout=self.timeout):
            return None
        replicas = self.replicas
        if replicas is None:
            replicas, left = divmod(len(jax.devices()), self.shards)
            if left or not replicas:
                raise ValueError(
                    f"devices.shards is {self.shards}, which does not divide the "
                    f"{len(jax.devices())} devices; give devices.replicas too."
                )
        return make_mesh(replicas, self.shards)


class Hosts:
    """The processes of a run, as one of them sees them.

    Attributes:
        process: which one this is; 0 decides and writes.
        count: how many there are.
        patience: seconds that a process which fails waits until the others have heard
            why; less once they take steps, since they listen less often then.

    Example:
        >>> Hosts(0, 1).leads
        True
    """

    def __init__(self, process: int, count: int):
        """Remembers which process this is."""
        self.process, self.count = process, count
        self.patience = _PATIENCE_SECONDS

    @property
    def leads(self) -> bool:
        """Whether this process is the one that decides and writes."""
        return self.process == 0

    def say(self, key: str, value: str) -> None:
        """Lets the other processes `hear` a value; alone, does nothing."""
        if self.count > 1:
            _client().key_value_set(key, value)

    def forget(self, key: str) -> None:
        """Drops what was said, once nobody asks for it any more."""
        if self.count > 1:
            _client().key_value_delete(key)

    def hear(self, key: str) -> str:
        """Waits for what another process says.

        Raises:
            LostProcess: if one says that it has failed instead.
        """
        while True:
            try:
                return _client().blocking_key_value_get(key, _POLL_MILLISECONDS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            for _, told in _client().key_value_dir_get("failed/"):
                self.say(f"heard/{self.process}", told)
                raise LostProcess(told)

    def fail(self, why: str) -> None:
        """Tells the others that this process ends, and why."""
        words, until = " ".join(why.split()), time.monotonic() + self.patience
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.say(f"failed/{self.process}", f"Process {self.process} ended: {words}")
            for other in set(range(self.count)) - {self.process}:
                left = max(1, round(1000 * (until - time.monotonic())))
                _client().blocking_key_value_get(f"heard/{other}", left)
            time.sleep(_FAREWELL_SECONDS)

    def agree(self, facts: Mapping[str, str]) -> None:
        """Compares facts that all processes must share.

        Args:
            facts: name to value.

        Raises:
            ValueError: in every process, naming the first difference.

        Privacy:
            The value of "data", a digest, is sent to the others but not shown.
        """
        if self.count == 1:
            return
        self.say(f"facts/{self.process}", json.dumps(dict(facts)))
        first, *rest = [json.loads(self.hear(f"facts/{i}")) for i in range(self.count)]
        for number, other in enumerate(rest, 1):
            for name, value in first.items():
                if other.get(name) == value:
                    continue
                how = f" ({other.get(name)}, not {value})" if name != "data" else ""
                raise ValueError(
                    f"Process {number} has another {name} than process 0{how}; start "
                    "all processes alike."
                )


@contextlib.contextmanager
def joined(devices: Devices) -> Iterator[Hosts]:
    """Meets the other processes, and leaves with them.

    Args:
        devices: says who and where.

    Yields:
        The processes; one that is alone starts nothing.

    Raises:
        ValueError: if the coordinator or another process does not come.
        LostProcess: if another process ends meanwhile.

    Example:
        >>> with joined(Devices()) as hosts:
        ...     hosts.count
        1
    """
    hosts = Hosts(devices.process, devices.processes)
    if hosts.count == 1:
        yield hosts
        return
    _meet(devices)
    try:
        yield hosts
    except LostProcess:
        raise
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if _is_loss(error):
            raise LostProcess(f"Process {hosts.process}: {GONE}") from error
        hosts.fail(str(error))
        raise
    except BaseException as error:
        hosts.fail(str(error) or type(error).__name__)
        raise
    jax.distributed.shutdown()


def _meet(devices: Devices) -> None:
    seconds = max(1, round(devices.timeout))
    _reach(devices)
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            devices.coordinator,
            devices.processes,
            devices.process,
            cluster_detection_method="deactivate",
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=seconds,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
        jax.devices()  # waits for all of them
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        if "before any JAX calls" in str(error):
            raise ValueError(
                "Several processes must be joined before JAX is used; begin a fresh "
                "Python process."
            ) from error
        raise ValueError(
            f"The {devices.processes} processes did not all meet at "
            f"{devices.coordinator} within {seconds} s; {UNMET}"
        ) from error
    if MET in os.environ:
        os.write(int(os.environ[MET]), b"1")


def _reach(devices: Devices) -> None:
    """Raises unless process 0 can listen, or the others can reach it."""
    host, port = devices.address()
    if devices.process == 0:
        try:
            with socket.create_server(("", port)):
                return
        except OSError as error:
            raise ValueError(
                f"Port {port} of devices.coordinator cannot be used here "
                f"({error.strerror}); choose another one for all processes, and start "
                "only one process 0."
            ) from None
    until = time.monotonic() + devices.timeout
    while True:
        try:
            with socket.create_connection((host, port), timeout=1.0):
                return
        except OSError as error:
            if time.monotonic() > until:
                raise ValueError(
                    f"The coordinator {devices.coordinator} could not be reached "
                    f"within {devices.timeout:g} s ({error.strerror or error}); start "
                    "process 0 there, and check address and firewall."
                ) from None
            time.sleep(0.2)


def _is_loss(error: Exception) -> bool:
    """Whether an error of JAX means that a peer is gone."""
    words = str(error)
    marks = ("Gloo", "UNAVAILABLE", "oordination", "DEADLINE_EXCEEDED", "heartbeat")
    return any(mark in words for mark in marks)


def _client() -> Any:
    """JAX's store of keys and values; it has no public name."""
    from jax._src import distributed

    return distributed.global_state.client
