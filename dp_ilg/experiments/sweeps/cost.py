"""What tuning cost: looks at private data, and epsilon if they were charged."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from dp_ilg.accounting.plan import PrivacyPlan


def tuning_cost(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cost of every cell that was tuned, from all records of a sweep.

    Args:
        records: lines of ``results.jsonl``, those of settings since given up included.

    Returns:
        A row for each task, method and epsilon: how many runs looked at private data to
        choose, the sum of their epsilons and deltas (simple composition, in which
        everything is shown), and ``search_epsilon``: what a search would cost that
        makes as many runs on average and shows the best only.

    Privacy:
        A sweep charges none of it: an epsilon in its tables is that of one run.
        ``search_epsilon`` holds if scores are computed from public data or charged;
        those of a sweep come from held-out private examples, so even that charge would
        not be enough.

    Example:
        >>> tuning_cost([])
        []
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["kind"] == "run" and record["phase"] == "tuning":
            if record["status"] == "done":
                name = record["task"], record["method"], record["epsilon"]
                groups.setdefault(name, []).append(record)
    return [
        dict(zip(("task", "method", "epsilon"), name, strict=True)) | _cost(runs)
        for name, runs in groups.items()
    ]


def whole_cost(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What everything that a sweep did would cost, were all of it charged.

    Args:
        records: lines of ``results.jsonl``.

    Returns:
        A row for each task: its runs, tuning and reported, and the sums of their
        epsilons and deltas.

    Privacy:
        The sums hold by simple composition for all models of a task together, were the
        seeds secret and the held-out accuracies not shown: runs under one seed draw
        batches and noise of their own, and their shared projection is counted in each.

    Example:
        >>> run = dict(kind="run", status="done", task="digits", epsilon_spent=1.9)
        >>> whole_cost([run | {"delta": 1e-5}] * 2)[0]["sum_of_epsilons"]
        3.8
    """
    done = [r for r in records if r["kind"] == "run" and r["status"] == "done"]
    tasks = dict.fromkeys(record["task"] for record in done)
    return [
        {"task": task} | _sums([r for r in done if r["task"] == task]) for task in tasks
    ]


def _sums(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "runs": len(runs),
        "sum_of_epsilons": sum(run["epsilon_spent"] for run in runs),
        "sum_of_deltas": sum(run["delta"] for run in runs),
    }


def _cost(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    plan = PrivacyPlan.from_json(runs[0]["plan"])
    return _sums(runs) | {"search_epsilon": _search(plan, len(runs))}


def _search(plan: PrivacyPlan, runs: int) -> float | None:
    """None where dp_accounting has no answer."""
    bare = dataclasses.replace(plan, l2_clip_norm=1.0, score_budget=0.0)
    bare = dataclasses.replace(bare, metric_budget=0.0)
    return _search_of(bare, runs)


@lru_cache(maxsize=256)
def _search_of(plan: PrivacyPlan, runs: int) -> float | None:
    from dp_ilg.accounting.composition import search_epsilon

    paid = plan.noise_charge  # of every run that is made
    left = plan.delta - runs * paid.delta
    try:
        found = search_epsilon(plan.event(), left, expected_runs=runs)
        return found + runs * paid.epsilon
    except (ValueError, NotImplementedError, TypeError):
        return None
