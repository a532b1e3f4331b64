"""Templates of pages, and pages written all at once."""

import os
import tempfile
from importlib import resources
from pathlib import Path

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template

from dp_ilg.experiments.reports.svg import printable


def write_page(path: Path, text: str) -> Path:
    """Writes a page all at once: a reader sees the old one or the new one.

    Args:
        path: where to; its folder must exist.
        text: the page.

    Returns:
        `path`.

    Raises:
        ValueError: in one sentence, if it cannot be written; nothing is left behind.

    Example:
        >>> write_page(Path("/no/such/folder/a.html"), "<!doctype html>")
        Traceback (most recent call last):
        ValueError: /no/such/folder/a.html cannot be written (No such file or \
directory); free space, change permissions or choose another path.
    """
    try:
        _replace(path, text.encode("utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}); free space, change "
            "permissions or choose another path."
        ) from None
    return path


def _replace(path: Path, content: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".report-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def template(name: str) -> Template:
    """A template of this room, in which everything that is put in is escaped.

    Args:
        name: the file's.

    Returns:
        The template; a name it uses and is not given raises.

    Example:
        >>> template("page.html.jinja").render.__name__
        'render'
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _lines_printable(value) if type(value) is str else value,
        loader=FunctionLoader(_template_text),
    )
    return environment.get_template(name)


def _template_text(name: str) -> str:
    room = resources.files("dp_ilg.experiments.reports")
    return (room / name).read_text(encoding="utf-8")


def _lines_printable(text: str) -> str:
    return "\n".join(printable(line) for line in text.replace("\t", "    ").split("\n"))
