"""`dp-ilg compare`: carries out a sweep, goes on with one, or reports what is there."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_ilg import validation
from dp_ilg.experiments.papers.reproduce import tell
from dp_ilg.experiments.sweeps.board import Board
from dp_ilg.experiments.sweeps.check import read_sweep
from dp_ilg.experiments.sweeps.cost import tuning_cost, whole_cost
from dp_ilg.experiments.sweeps.pool import COMPILED, WORKER, Pool, Worker
from dp_ilg.experiments.sweeps.results import Results, index, read_results
from dp_ilg.experiments.sweeps.statistics import Result, results_of
from dp_ilg.experiments.sweeps.sweep import Sweep


@dataclass(frozen=True)
class CompareOptions:
    """What `dp-ilg compare` may be told.

    Attributes:
        out: the folder of the results; by default runs/compare-NAME.
        data_dir: a folder of data files.
        workers: processes at a time; by default what the sweep says.
        report_only: run nothing, report what is there.
        retry_failed: run again what is on file as failed.
        extend: go on in a folder that was begun with another version of the sweep.

    Raises:
        ValueError: for fewer than 1 worker.

    Example:
        >>> CompareOptions(workers=0)
        Traceback (most recent call last):
        ValueError: workers is 0, but must be a whole number of at least 1.
    """

    out: Path | None = None
    data_dir: Path | None = None
    workers: int | None = None
    report_only: bool = False
    retry_failed: bool = False
    extend: bool = False

    def __post_init__(self):
        if self.workers is not None:
            validation.whole("workers", self.workers)


def compare(path: Path, options: CompareOptions) -> dict[str, Any]:
    """Carries out what is missing of a sweep and reports it.

    Args:
        path: the sweep, a TOML file.
        options: how.

    Returns:
        JSON values: the folder, the reports, whether the sweep is complete, what is
        missing, the tables and the cost of tuning.

    Raises:
        ValueError: in one sentence, for a sweep that cannot be, a folder that belongs
            to another one or to another process, and damaged results.
        OSError: if results cannot be written.

    Privacy:
        Each run is private for itself; the choice of settings is charged to none of
        them, as the report says with numbers. The seeds are published.

    Example:
        >>> compare(Path("no/such.toml"), CompareOptions())
        Traceback (most recent call last):
        ValueError: The sweep no/such.toml cannot be read: No such file or directory.
    """
    sweep = read_sweep(path)
    folder = options.out or Path("runs") / f"compare-{Path(path).stem}"
    absent: dict[str, str] = {}
    _check_folder(folder, options.report_only)
    if not options.report_only:
        text = Path(path).read_text(encoding="utf-8")
        with Results(folder, text, extend=options.extend) as results:
            absent = _run(sweep, results, options)
    return _report(sweep, folder, absent)


def _check_folder(folder: Path, report_only: bool) -> None:
    """Raises for a folder whose files a sweep's would replace, or without a sweep."""
    begun = any((folder / name).exists() for name in ("sweep.toml", "results.jsonl"))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder as --out.")
    if not begun and (folder / "config.toml").exists():
        raise ValueError(f"{folder} is the folder of a run; give another --out.")
    if report_only and not begun:
        raise ValueError(f"{folder} holds no sweep; give the --out of one.")


def _run(sweep: Sweep, results: Results, options: CompareOptions) -> dict[str, str]:
    """Runs what is missing; returns the tasks without data, and why."""
    board = Board(sweep, results, options.retry_failed)
    size = min(options.workers or sweep.workers, board.total)
    threads = max(1, (os.cpu_count() or 1) // size)
    data = options.data_dir
    if data is not None and not data.is_dir():
        raise ValueError(f"The data folder {data} is no folder; pass one that exists.")
    command = [*WORKER, *([] if data is None else [str(data.resolve())])]

    def start() -> Worker:
        return Worker(command, results.folder, threads=threads)

    try:
        Pool(board, start, size).work()
    except KeyboardInterrupt:
        tell("Interrupted; the same command goes on where it stopped.")
        raise SystemExit(130) from None
    shutil.rmtree(results.folder / COMPILED, ignore_errors=True)
    return board.absent


def _report(sweep: Sweep, folder: Path, absent: dict[str, str]) -> dict[str, Any]:
    from dp_ilg.experiments.sweeps.report import Comparison, write_comparison

    records = read_results(folder)
    found = index(records)
    results = results_of(sweep, lambda run: found.get(run.key()), absent)
    comparison = Comparison(sweep, results, records)
    return {
        "sweep": sweep.label(),
        "folder": str(folder),
        **write_comparison(comparison, folder),
        "complete": not comparison.missing(),
        "missing": comparison.missing(),
        "columns": comparison.columns(),
        "reference": sweep.reference,
        "cells": [_row(result) for result in results.values()],
        "tuning_cost": tuning_cost(records),
        "whole_cost": whole_cost(records),
    }


def _row(result: Result) -> dict[str, Any]:
    """A cell as JSON values; an interval without ends becomes None."""
    gap = result.difference
    several = gap is not None and gap.pairs > 1
    return {
        **result.cell._asdict(),
        "status": result.status,
        "note": result.note,
        "mean": result.mean,
        "deviation": result.deviation,
        "by_seed": {str(k): v for k, v in (result.by_seed or {}).items()},
        "difference": None if gap is None else gap.mean,
        "interval": [gap.low, gap.high] if gap is not None and several else None,
        "verdict": None if gap is None else gap.verdict(),
        "perplexity": {str(k): v for k, v in result.perplexity.items()},
        "choice": None if result.choice is None else result.choice._asdict(),
        "validation": result.validation,
        "measure": result.measure.name,
        "seconds": list(result.seconds),
    }
