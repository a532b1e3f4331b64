"""Checks of a run from end to end: it stops with its plan, and resumes as it was."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg.base import Params
from dp_ilg.experiments.audits.checks import Finding
from dp_ilg.experiments.audits.residuals import Observer
from dp_ilg.experiments.audits.subject import release_of


def end_of_plan(observer: Observer, seed: int) -> Finding:
    """Whether ledger, sampler and noise each refuse a step past the plan.

    Args:
        observer: of the trainer.
        seed: of the run.

    Returns:
        Fails where one of them lets it pass.
    """
    trainer, key = observer.trainer, jax.random.key(seed)
    last, passed = trainer.plan.num_steps, []
    sampler: Any = trainer.sampler(key)
    if _allowed(lambda: sampler.indices(last)):
        passed.append("sampler")
    with tempfile.TemporaryDirectory() as folder:
        with trainer.ledger(Path(folder) / "ledger.jsonl") as ledger:
            for step in range(last):
                ledger.record(step)
            if _allowed(lambda: ledger.record(last)):
                passed.append("ledger")
    if np.isfinite(_release_after(observer, key, last)).any():
        passed.append("noise")
    words = f"allowed by {' and '.join(passed)}" if passed else "refused by all three"
    return Finding(f"step {last + 1} of {last} is {words}", "refused", not passed)


def _allowed(attempt: Any) -> bool:
    try:
        attempt()
    except ValueError:
        return False
    return True


def _release_after(observer: Observer, key: Any, steps: int) -> np.ndarray:
    """The release of step `steps`, counted from 0, with nobody in any batch."""
    trainer = observer.trainer
    empty = jnp.zeros(1, int), jnp.ones(1, bool)

    @jax.jit
    def step(params: Params, state: Any) -> tuple:
        return observer.step(params, state, observer.others(params, state, *empty))

    params, state = trainer.params, observer.init(key)
    for _ in range(steps + 1):
        params, state = step(params, state)
    leaves = jax.tree.leaves(release_of(state))
    return np.concatenate([np.asarray(x, np.float32).ravel() for x in leaves])


def resumed(observer: Observer, seed: int) -> Finding:
    """Whether a run that was stopped goes on to the same bits (law: keyed by step).

    Args:
        observer: of the trainer.
        seed: of the run.

    Returns:
        Fails where a resumed run draws other noise or another batch for a step: new
        noise on old data averages it out, old noise on new data subtracts it away.
    """
    trainer = observer.trainer
    key, draw = jax.random.split(jax.random.key(seed))
    steps, going = trainer.plan.num_steps, _going(observer)
    start = trainer.params, observer.init(key), draw
    whole = going(start, 0, steps)
    half = steps // 2
    on = going(trainer.resume(going(start, 0, half)), half, steps)
    pairs = zip(jax.tree.leaves(whole[0]), jax.tree.leaves(on[0]), strict=True)
    same = all(np.array_equal(a, b) for a, b in pairs)
    words = "bit-identical to" if same else "different from"
    return Finding(
        f"stopped after step {half}: {words} the whole run", "bit-identical", same
    )


def _going(observer: Observer) -> Callable[[tuple, int, int], tuple]:
    """Takes one run from a step to another: compiled once, so that bits compare."""
    trainer = observer.trainer
    everybody = jnp.arange(trainer.plan.num_examples)

    @jax.jit
    def step(params: Params, state: Any, mask: Any) -> tuple:
        total = observer.others(params, state, everybody, mask)
        return observer.step(params, state, total)

    def going(position: tuple, begin: int, end: int) -> tuple:
        params, state, draw = position
        sampler: Any = trainer.sampler(draw)
        for t in range(begin, end):
            mask = np.ones(trainer.plan.num_examples, bool)
            mask[np.asarray(sampler.indices(t))] = False
            params, state = step(params, state, jnp.asarray(mask))
        return params, state, draw

    return going
