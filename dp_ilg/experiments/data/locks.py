"""One process at a time in a run folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this system: then one process is assumed
    fcntl = None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for this process; the system lets go when the process dies.

    Two runs in one folder would each remove the other's checkpoints, and the one that
    falls behind would repeat releases. The lock is on the folder itself, so it leaves
    no file, works where nothing can be written, and survives a renaming.

    Args:
        folder: a folder that exists.

    Yields:
        Nothing, while it is held.

    Raises:
        ValueError: if another process (or this one, elsewhere) holds it.
        OSError: if it cannot be opened.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> with locked(Path(folder.name)):
        ...     with locked(Path(folder.name)):
        ...         pass
        Traceback (most recent call last):
        ValueError: The run folder ... is in use by another process; wait for it, ...
        >>> folder.cleanup()
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"The run folder {folder} is in use by another process; wait for it, "
                "or use another run folder."
            ) from None
        yield
    finally:
        os.close(handle)
