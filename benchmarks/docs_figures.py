"""Draws the figures of the documentation from benchmarks/results/*.jsonl.

    python benchmarks/docs_figures.py              # docs/assets/*.svg
    python benchmarks/docs_figures.py --only speed
    python benchmarks/docs_figures.py --check      # names those that disagree, exits 1

Every file carries the numbers it shows; --check compares them with the lines and draws
nothing. Takes ten seconds.
"""

import argparse
import sys

from figures import FIGURES, look
from tables.lines import measured


def disagreeing() -> list[str]:
    """The figures whose numbers are not what the lines say."""
    return [
        name
        for name, drawing in FIGURES.items()
        if look.shown(look.path_of(name)) != look.rounded(drawing.numbers(measured))
    ]


def main(argv: list[str] | None = None) -> int:
    """Draws or checks; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--only", nargs="+", choices=sorted(FIGURES))
    args = parser.parse_args(argv)
    if args.check:
        wrong = disagreeing()
        for name in wrong:
            print(f"docs/assets/{name}.svg disagrees with the lines")
        return 1 if wrong else 0
    look.ASSETS.mkdir(parents=True, exist_ok=True)
    for name in args.only or FIGURES:
        text = look.svg(FIGURES[name], measured)
        look.path_of(name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
