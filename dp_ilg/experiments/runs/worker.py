"""What `supervised.supervised` starts: `dp-ilg` as one process of several."""

import importlib
import os
import sys
import threading

from dp_ilg.experiments.runs.supervised import MARK

_COMMAND = "dp_ilg.experiments.cli.main"  # lies above this room: started by its name


def work() -> int:
    """Runs the command line; its Python speaks where the one that watches does.

    Returns:
        The exit code.

    Example:
        >>> work.__name__
        'work'
    """
    out, words, alive = map(int, os.environ[MARK].split(","))
    sys.stdout, sys.stderr = os.fdopen(out, "w"), os.fdopen(words, "w", buffering=1)
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    return importlib.import_module(_COMMAND).main()


def _end_with(alive: int) -> None:
    """Ends this process when the one that watches is gone, whatever it is doing."""
    os.read(alive, 1)
    os._exit(1)


if __name__ == "__main__":
    found = work()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(found)  # JAX would wait at exit for processes that are gone
