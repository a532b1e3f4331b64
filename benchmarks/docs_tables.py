"""Writes the tables of README.md and docs/ from benchmarks/results/*.jsonl.

    python benchmarks/docs_tables.py             # rewrites what stands between markers
    python benchmarks/docs_tables.py --check     # names pages that disagree, exits 1
    python benchmarks/docs_tables.py --show why  # prints a table

A marker is ``<!-- table: NAME -->``, and the table ends at ``<!-- end -->``. The names
and the functions of the lines are `TABLES` in benchmarks/tables. Takes ten seconds.
"""

import argparse
import sys

from common import ROOT
from tables import TABLES, pages
from tables.lines import measured


def main(argv: list[str] | None = None) -> int:
    """Rewrites, checks or shows; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--show", choices=sorted(TABLES), metavar="NAME")
    args = parser.parse_args(argv)
    if args.show:
        print(TABLES[args.show](measured))
        return 0
    if not args.check:
        pages.rewrite(pages.pages(), TABLES, measured)
        return 0
    wrong = pages.disagreeing(pages.pages(), TABLES, measured)
    for path, tables in wrong.items():
        print(f"{path.relative_to(ROOT)}: {', '.join(tables)} disagree with the lines")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
