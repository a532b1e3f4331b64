"""A process that carries out runs of a sweep, one line of JSON at a time.

    python -m dp_ilg.experiments.sweeps.worker [DATA_DIR]

Requests come on standard input, answers go to standard output; whatever else is
printed goes to standard error. The process ends with its standard input, at once.
"""

import json
import os
import queue
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any, TextIO

from dp_ilg.experiments.config.schema import config_from_mapping
from dp_ilg.experiments.runs.outside.parts import sources
from dp_ilg.experiments.sweeps.bench import Bench


def main(argv: list[str]) -> None:
    """Answers requests until standard input ends.

    Args:
        argv: nothing, or the folder of data files.

    Example:
        >>> import inspect
        >>> list(inspect.signature(main).parameters)
        ['argv']
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints must not garble the answers
    bench = Bench(Path(argv[0]) if argv else None)
    requests: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(sys.stdin, requests), daemon=True).start()
    while True:
        request = json.loads(requests.get())
        answers.write(json.dumps(answer(bench, request)) + "\n")
        answers.flush()


def answer(bench: Bench, request: dict[str, Any]) -> dict[str, Any]:
    """Carries out one request.

    Args:
        bench: what runs.
        request: ``config`` as TOML text with its seed, ``group``, and ``sources``:
            which code its parts from outside are.

    Returns:
        What `Bench.run` found.

    Example:
        >>> request = {"config": "data.name = 'digits'", "group": "a"}
        >>> answer(Bench(None), request)["error"]
        'request lacks the section [model].'
    """
    try:
        config = config_from_mapping(tomllib.loads(request["config"]), "request")
        _check_sources(sources(config), request.get("sources", {}))
    except ValueError as error:
        return {"status": "failed", "error": str(error)}
    return bench.run(config, request["group"])


def _check_sources(here: dict[str, str], there: dict[str, str]) -> None:
    """Refuses code that was changed since the sweep was begun: it is another run."""
    for name, digest in here.items():
        if there.get(name) != digest:
            raise ValueError(
                f"The {name} was changed while the sweep ran ({there.get(name)} then, "
                f"{digest} now); give the same command again."
            )


def _listen(lines: TextIO, requests: "queue.Queue[str]") -> None:
    for line in lines:
        requests.put(line)
    os._exit(0)  # whoever asked is gone


if __name__ == "__main__":
    main(sys.argv[1:])
