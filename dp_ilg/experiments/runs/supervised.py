"""One process of several, under the eyes of another: whatever kills it is one sentence.

JAX's runtime aborts a process whose coordinator is gone, from a thread of its own and
with a page of native log; Gloo writes among the results. So `dp-ilg train` with
several processes runs itself once more as a worker, whose Python speaks to the
terminal and whose native code speaks to nobody, and says in one sentence what became
of it.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from dp_ilg.experiments.runs.hosts import GONE, MET, UNMET

LOST = 3
"""Exit code of a worker whose peers are gone."""
MARK = "DP_ILG_WORKER"
"""Environment variable that names the file descriptors a worker is given."""


def is_worker() -> bool:
    """Whether this process was started by `supervised`.

    Returns:
        True in a worker.

    Example:
        >>> is_worker()
        False
    """
    return MARK in os.environ


def supervised(args: Sequence[str], process: int) -> None:
    """Runs a command line in a worker and ends as it ends.

    A worker never outlives the one that watches it.

    Args:
        args: of `dp-ilg`.
        process: its number among the run's processes.

    Raises:
        SystemExit: always, with the worker's exit code; 2 and one sentence on standard
            error if something killed it.

    Example:
        >>> supervised.__name__
        'supervised'
    """
    alive, ours = os.pipe()
    heard, met = os.pipe()
    given = (os.dup(1), os.dup(2), alive, met)
    sys.stdout.flush()
    worker = subprocess.Popen(
        [sys.executable, "-m", "dp_ilg.experiments.runs.worker", *args],
        env=os.environ | {MARK: ",".join(map(str, given[:3])), MET: str(met)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=given,
        start_new_session=True,  # or Ctrl-C would reach it twice
    )
    for descriptor in given:
        os.close(descriptor)
    ask = lambda number, frame: worker.send_signal(number)  # noqa: E731
    before = signal.signal(signal.SIGINT, ask)
    try:
        code = worker.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        os.close(ours)
    os.set_blocking(heard, False)
    with os.fdopen(heard, "rb") as told:
        had_met = bool(told.read())
    if code == -signal.SIGABRT and not had_met:  # JAX's own way of giving up
        print(
            f"dp-ilg: Process {process}: the processes did not all meet; {UNMET}",
            file=sys.stderr,
        )
    elif code in (LOST, -signal.SIGABRT):
        print(f"dp-ilg: Process {process}: {GONE}", file=sys.stderr)
    elif code < 0:
        name = signal.Signals(-code).name
        print(
            f"dp-ilg: Process {process} was ended by {name}; start all processes again "
            "with --resume.",
            file=sys.stderr,
        )
    raise SystemExit(2 if code in (LOST, *range(-64, 0)) else code)
