"""Processes that carry out the runs of a sweep; one that dies costs one run."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dp_ilg.experiments.config.schema import config_to_toml
from dp_ilg.experiments.sweeps.board import Board
from dp_ilg.experiments.sweeps.runs import Run

COMPILED = ".compiled-by-dp-ilg"  # removed at the end, so nobody else's name
WORKER = (sys.executable, "-m", "dp_ilg.experiments.sweeps.worker")
_TRIES = 2


class WorkerDied(Exception):
    """A process ended without an answer.

    Example:
        >>> str(WorkerDied("signal 9"))
        'signal 9'
    """


class CannotStart(ValueError):
    """A process ended by itself before it had answered anything.

    That says nothing about the run it was given, so the sweep stops.

    Example:
        >>> issubclass(CannotStart, ValueError)
        True
    """


class Worker:
    """One process, given one run at a time.

    Attributes:
        process: the process.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     worker = Worker(["cat"], Path(folder), threads=1)
        ...     worker.ask({"status": "done"})
        ...     worker.close()
        {'status': 'done'}
    """

    def __init__(self, command: Sequence[str], folder: Path, *, threads: int):
        """Starts the process.

        Args:
            command: what to start.
            folder: of the sweep; its `workers.log` takes what the process prints.
            threads: on how many threads it computes.
        """
        environment = os.environ | {
            "NPROC": str(threads),  # the size of XLA's thread pool
            "JAX_COMPILATION_CACHE_DIR": str(folder.resolve() / COMPILED),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._log, self._answered = folder / "workers.log", False
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us to handle
            )

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Args:
            request: JSON values.

        Returns:
            The answer.

        Raises:
            WorkerDied: if the process ends first.
            CannotStart: if it does so by itself, at its first request.
        """
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write((json.dumps(request) + "\n").encode())
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = b""
        if not line.endswith(b"\n"):
            self._mourn(self.process.wait())
        self._answered = True
        return json.loads(line)

    def _mourn(self, code: int) -> NoReturn:
        if code < 0:
            raise WorkerDied(f"it was killed by {_signal(-code)}")
        if self._answered:
            raise WorkerDied(f"it stopped with exit code {code}, see {self._log}")
        raise CannotStart(
            f"A process for runs stopped with exit code {code} at its first run; see "
            f"the end of {self._log}, mend that and give the same command again."
        )

    def close(self) -> None:
        """Ends the process, in the middle of a run too."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            try:
                pipe.close()
            except BrokenPipeError:
                pass


class Pool:
    """Threads that each keep one process busy with what a board hands out.

    Example:
        >>> import inspect
        >>> list(inspect.signature(Pool).parameters)
        ['board', 'start', 'size']
    """

    def __init__(self, board: Board, start: Callable[[], Worker], size: int):
        """Starts nothing yet.

        Args:
            board: hands out the runs.
            start: starts a process.
            size: how many there are at a time.
        """
        self._board, self._start, self._size = board, start, size
        self._workers: dict[int, Worker] = {}
        self._errors: list[BaseException] = []
        self._closing = False

    def work(self) -> None:
        """Returns when the board has nothing more.

        Raises:
            OSError: if results cannot be written or processes not be started.
        """
        threads = [
            threading.Thread(target=self._serve, args=(number,), daemon=True)
            for number in range(self._size)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        finally:
            self._closing = True
            self._board.stop()
            for worker in list(self._workers.values()):
                worker.close()
        if self._errors:
            raise self._errors[0]

    def _serve(self, number: int) -> None:
        last = None
        try:
            while (run := self._board.take(last)) is not None:
                self._board.finish(run, self._attempt(number, run))
                last = run
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            if not self._closing:
                self._errors.append(error)
            self._board.stop()

    def _attempt(self, number: int, run: Run) -> dict[str, Any]:
        """Runs once, and once more if the process dies."""
        request: dict[str, Any] = {"config": config_to_toml(run.config, seed=True)}
        request |= {"group": run.group(), "sources": dict(run.sources)}
        words = ""
        for _ in range(_TRIES):
            if number not in self._workers:
                self._workers[number] = self._start()
            try:
                return self._workers[number].ask(request)
            except WorkerDied as death:
                if self._closing:
                    raise
                words = str(death)
                self._workers.pop(number).close()
        return {
            "status": "failed",
            "error": f"Its process ended {_TRIES} times before it did: {words}.",
        }


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
