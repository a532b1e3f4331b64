"""Where the installed command begins: its version, and what it needs installed.

Both are answered before `main` is imported, which needs the extra `experiments`.
"""

import importlib.util
import sys
from collections.abc import Sequence

from dp_ilg import __version__

NEEDED = ("flax", "jinja2", "matplotlib", "orbax", "rich", "sklearn", "tyro")
"""The modules of the extra `experiments`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the version, or hands over to `dp_ilg.experiments.cli.main`.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit code: 2 if packages are missing, else that of the command.

    Example:
        >>> main(["--version"])
        dp-ilg 0...
        0
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["--version"]:
        print(f"dp-ilg {__version__}")
        return 0
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"dp-ilg: The command needs {', '.join(missing)}; install them with "
            "pip install 'dp_ilg[experiments]'.",
            file=sys.stderr,
        )
        return 2
    from dp_ilg.experiments.cli.main import main as command

    return command(args)


if __name__ == "__main__":
    sys.exit(main())
