"""The command `init`: a configuration and a script that run, to begin from."""

import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Annotated

import tyro

from dp_ilg.experiments.cli.commands import Rows, show

_FILES = {"config.toml": "starter.toml", "train.py": "starter.txt"}  # name -> template
_ROWS: Rows = {
    "config": ("Configuration", "{}"),
    "script": ("Script", "{}"),
    "next": ("Try", "{}"),
}


def init(
    folder: Annotated[str, tyro.conf.Positional] = ".", *, json: bool = False
) -> Callable[[], None]:
    """Writes config.toml and train.py, which run as they are, to begin from.

    Args:
        folder: where to; made if it is not there. No file is replaced.
        json: print one JSON object.

    Returns:
        What does it.

    Example:
        >>> import tempfile
        >>> init(tempfile.mkdtemp(), json=True)()
        {"config": ".../config.toml", "script": ".../train.py", "next": ...}
    """

    def work() -> None:
        config, script = write_starter(Path(folder))
        told = f"dp-ilg train {config} --run-dir {config.parent / 'runs' / 'first'}"
        found = {"config": str(config), "script": str(script)}
        show(found | {"next": f"{told}, or python {script}"}, json, _ROWS)

    return work


def write_starter(folder: Path) -> list[Path]:
    """Writes the files, all or none.

    Args:
        folder: where to; made if absent.

    Returns:
        Configuration and script.

    Raises:
        ValueError: if one of them is there already; nothing is written.
        OSError: if a file cannot be written; those already written are removed.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> [path.name for path in write_starter(folder)]
        ['config.toml', 'train.py']
    """
    paths = {folder / name: source for name, source in _FILES.items()}
    for path in paths:
        if os.path.lexists(path):
            raise ValueError(
                f"{path} exists and is not replaced; choose another folder."
            )
    room, written = resources.files("dp_ilg.experiments.cli"), []
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for path, source in paths.items():
            text = (room / source).read_text(encoding="utf-8")
            with open(path, "x", encoding="utf-8") as file:
                written.append(path)
                file.write(text)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return list(paths)
