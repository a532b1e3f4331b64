"""The checks of a step: a table from a name to a function of the evidence.

Those without chance (what an example moves at fixed keys) are exact up to rounding.
Those with it fail a sound step with probability `LEVEL` each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from dp_ilg.auditing.bounds import EpsilonLowerBound, epsilon_lower_bound
from dp_ilg.auditing.step_moves import Moves, rms, shared_noise
from dp_ilg.auditing.step_noise import NoiseSeen
from dp_ilg.auditing.step_worlds import Worlds

LEVEL = 1e-6
"""Probability that one statistical check fails for a sound step."""
TRIAL_DELTA = 0.1
"""Delta of the trials: chosen before, since a few hundred cannot see far tails."""
_SAME = 0.02
_ROUNDING = 2e-3  # relative: what float32 and a pilot's rounding may add to a distance
_WEAK = 0.5


class StepFinding(NamedTuple):
    """What one check of a step saw.

    Attributes:
        check: its name.
        found: what was seen.
        limit: what was asked for.
        holds: whether that is so; None for a remark, which decides nothing.
    """

    check: str
    found: str
    limit: str
    holds: bool | None


@dataclasses.dataclass(frozen=True, eq=False)
class Evidence:
    """All that the checks read, each gathered once.

    Attributes:
        stages: the worlds of the first step, and of the second where that can be had.
        plan: the claim.
        trials: how many keys.
    """

    stages: tuple[Worlds, ...]
    plan: Any
    trials: int

    @cached_property
    def moves(self) -> list[Moves]:
        """What examples move, by step."""
        return [Moves(worlds) for worlds in self.stages]

    @cached_property
    def noises(self) -> list[NoiseSeen]:
        """The noise, by step."""
        keys = range(1000, 1000 + self.trials)
        return [NoiseSeen(moves, keys) for moves in self.moves]

    @cached_property
    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Of steps with and without the strongest canary, under fresh keys."""
        noise, half = self.noises[0], self.trials // 2
        first = 1000 + self.trials
        inside = noise.scores(range(first, first + half), noise.strongest)
        outside = noise.scores(range(first + half, first + 2 * half), None)
        return inside, outside

    @cached_property
    def bound(self) -> EpsilonLowerBound:
        """A lower bound on epsilon of one step at `TRIAL_DELTA`."""
        return epsilon_lower_bound(
            *self.scores,
            delta=TRIAL_DELTA,
            significance=LEVEL,
            choosing_fraction=0.25,
        )

    @property
    def measurable(self) -> bool:
        """Whether some part of the state is a sum plus noise."""
        return bool(self.moves[0].sums and self.moves[0].moved)


def _named(moves: Moves, places: Any) -> str:
    names = [moves.parts[k].name or "the state" for k in places]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def bare(evidence: Evidence) -> StepFinding:
    """Nothing that an example moves is without noise."""
    for moves in evidence.moves:
        places = moves.places("bare")
        if places:
            found = f"an example moves {_named(moves, places)}; no key does"
            return StepFinding("noise is there", found, "nothing", False)
    seen = sum(len(m.sums) for m in evidence.moves[:1])
    found = f"noise on all that an example moves; {seen} are a sum plus noise"
    return StepFinding("noise is there", found, "nothing", True)


def fixed_divisor(evidence: Evidence) -> StepFinding:
    """The noise, and what it is divided by, does not follow the batch."""
    for moves in evidence.moves:
        places = moves.places("scaled")
        if places:
            found = f"one more example rescales the noise in {_named(moves, places)}"
            return StepFinding("one divisor", found, "no rescaling", False)
    return StepFinding("one divisor", "the same noise", "no rescaling", True)


def crowd(evidence: Evidence) -> StepFinding:
    """What an example adds does not depend on who else is there."""
    worst, name = 0.0, ""
    for moves in evidence.moves:
        for canary in moves.by_canary:
            share = _changed(moves, canary)
            if share > worst:
                worst, name = share, canary
    where = f" ('{name}')" if worst > _SAME else ""
    found = f"its effect differs by {100 * worst:.2g} % among others{where}"
    limit = f"at most {100 * _SAME:.0f} %"
    return StepFinding("on its own", found, limit, worst <= _SAME)


def _changed(moves: Moves, canary: str) -> float:
    """By what part a canary's effect changes among others, beyond rounding."""
    others, worst = moves.gaps(canary, "changed"), 0.0
    for k in moves.sums:
        mine, theirs = moves.moved[canary][k], others[k].mean(0)
        off = rms(mine - theirs) - moves.parts[k].floor
        size = max(rms(mine), rms(theirs))
        worst = max(worst, off / size if off > 0 else 0.0)
    return worst


def masked_rows(evidence: Evidence) -> StepFinding:
    """What stands in a masked row does not matter."""
    moves = evidence.moves[0]
    scene = moves.worlds.scene
    if not scene.masked:
        return StepFinding("masked rows", "the step takes no mask", "-", None)
    loudest = list(scene.canaries)[-1]
    after = moves.worlds.outputs(moves.numbers, *scene.batch(None, spare=loudest))
    pairs = zip(after, moves.base, moves.floors, strict=True)
    changed = [
        k for k, (a, b, f) in enumerate(pairs) if not np.allclose(a, b, 0, f, True)
    ]
    found = f"a masked row changes {_named(moves, changed)}" if changed else "unseen"
    return StepFinding("masked rows", found, "unseen", not changed)


def one_example(evidence: Evidence) -> StepFinding:
    """How far an example is from being hidden by the noise, at each step looked at."""
    shares = {
        (time, canary): noise.covered(canary)
        for time, noise in enumerate(evidence.noises)
        for canary in noise.moves.moved
        if noise.moves.sums
    }
    worst, words, holds = -1.0, "", True
    for (time, canary), (distance, error) in shares.items():
        share = distance * float(evidence.plan.noise_multipliers[time])
        most = _limit(error, len(shares))
        holds &= bool(share <= most)
        if share > worst:
            worst = share
            words = f"{share:.4g} of it (step {time}, '{canary}', limit {most:.4g})"
    unread = [
        name
        for noise in evidence.noises
        for name in [_named(noise.moves, [k for k, r in noise.mixed.items() if not r])]
        if name
    ]
    if unread:
        words += f"; the noise of {unread[0]} is correlated: the best direction tells"
        return StepFinding("one example", words, "at most what z covers", None)
    if worst < _WEAK:
        words += "; a weak canary: noise that is too small may go unseen"
    return StepFinding("one example", words, "at most what z covers", holds)


def best_direction(evidence: Evidence) -> StepFinding:
    """The same along the one direction that shows the example best."""
    inside, outside = evidence.scores
    noise = evidence.noises[0]
    weights = noise.direction()
    shift = sum(
        np.sum(weights[k] * x) for k, x in noise.moves.moved[noise.strongest].items()
    )
    spread = float(np.sqrt((np.var(inside, ddof=1) + np.var(outside, ddof=1)) / 2))
    count = len(inside) + len(outside) - 2
    share = float(shift / spread) if spread > 0 else float("inf")
    share *= float(evidence.plan.noise_multipliers[0])
    most = _limit(1 / np.sqrt(2 * count), 1)
    found = f"{share:.4g} of it (limit {most:.4g}, {count + 2} trials)"
    limit = "at most what z covers"
    return StepFinding("best direction", found, limit, bool(share <= most))


def fresh_noise(evidence: Evidence) -> StepFinding:
    """No noise is used twice: in two entries, two parts or two steps."""
    for what, one, other in _pairs(evidence):
        if one.size and shared_noise(one, other) is not None:
            return StepFinding(
                "fresh noise", f"{what} share their noise", "none", False
            )
    return StepFinding("fresh noise", "no draw is seen twice", "none", True)


def _pairs(evidence: Evidence) -> Any:
    moves, noise = evidence.moves[0], evidence.noises[0]
    flat = {k: noise.draws[k][:32] for k in moves.sums}
    named = {k: moves.parts[k].name or "the state" for k in moves.sums}
    for k, draws in flat.items():
        width = moves.base[k].shape[-1] if moves.base[k].ndim > 1 else 1
        for lag in {1, width}:
            if 0 < lag < draws.shape[1]:
                yield f"entries of {named[k]}", draws[:, lag:], draws[:, :-lag]
    places = list(flat)
    for i, j in [(i, j) for i in places for j in places if i < j]:
        size = min(flat[i].shape[1], flat[j].shape[1])
        pair = flat[i][:, :size], flat[j][:, :size]
        yield f"{named[i]} and {named[j]}", *pair
    yield from _successive(moves, named)


def _successive(moves: Moves, named: dict[int, str]) -> Any:
    """The noise of two steps on nobody."""
    worlds = moves.worlds
    nobody = worlds.scene.batch(None, "empty")
    if not len(nobody[1]):
        return
    once = worlds.outputs(range(16), *nobody)
    twice = worlds.outputs(range(16), *nobody, steps=2)
    for k in moves.sums:
        if np.all(np.isfinite(twice[k])):
            what = f"two steps in {named[k]}"
            yield what, once[k] - worlds.before[k], twice[k] - once[k]


def law(evidence: Evidence) -> StepFinding:
    """The noise is normal."""
    from scipy import stats

    noise = evidence.noises[0]
    rng, parts = np.random.default_rng(0), []
    for k, draws in noise.draws.items():
        spread = np.sqrt(noise.variances[k].reshape(-1)[: draws.shape[1]])
        usable = spread > 0
        white = (draws - draws.mean(0))[:, usable] / spread[usable]
        parts.append(white.ravel())
    everything = np.concatenate(parts) if parts else np.zeros(0)
    if everything.size < 100:
        return StepFinding("law of the noise", "no noise to look at", "normal", None)
    some = rng.choice(everything, min(20_000, everything.size), replace=False)
    found = float(stats.kstest(some, "norm").pvalue)
    words = f"Kolmogorov-Smirnov p {found:.2g}"
    return StepFinding("law of the noise", words, f"p above {LEVEL:g}", found > LEVEL)


def trials(evidence: Evidence) -> StepFinding:
    """A lower bound on the step's epsilon, from steps with and without an example."""
    claim = claimed(evidence.plan, TRIAL_DELTA)
    found = evidence.bound
    words = f"epsilon at least {found.epsilon:.3g} at delta {TRIAL_DELTA:g}"
    return StepFinding(
        "trials", words, f"{claim:.3g}, the claim", found.epsilon <= claim
    )


def claimed(plan: Any, delta: float) -> float:
    """Epsilon of the plan's first step for an example that is in its batch.

    Example:
        >>> from types import SimpleNamespace
        >>> round(claimed(SimpleNamespace(noise_multipliers=[1.0]), 1e-5), 2)
        4.38
    """
    import dp_accounting  # slow to import

    multiplier = float(plan.noise_multipliers[0])
    return float(dp_accounting.get_epsilon_gaussian(multiplier, delta))


def not_numbers(evidence: Evidence) -> StepFinding:
    """Which canaries turn the state into NaN."""
    names = evidence.moves[0].poisoned
    found = "none" if not names else f"NaN from the example {', '.join(names)}"
    if names:
        found += "; everybody sees that it is there: drop such examples or their batch"
    return StepFinding("not a number", found, "none", None if names else True)


def _limit(error: float, tests: int) -> float:
    """The largest distance that a sound step shows, of the one that z covers.

    Chance is in the measured variance alone: chi-square, of as many degrees of freedom
    as its relative error says, at `LEVEL` for all tests together.
    """
    from scipy import stats

    if error == 0:
        return 1 + _ROUNDING
    degrees = 1 / (2 * error**2)
    least = float(stats.chi2.ppf(LEVEL / tests, degrees)) / degrees
    return 1 / np.sqrt(least) + _ROUNDING


STEP_CHECKS: dict[str, Callable[[Evidence], StepFinding]] = {
    "noise is there": bare,
    "one divisor": fixed_divisor,
    "masked rows": masked_rows,
    "not a number": not_numbers,
}
"""Checks of any step."""

NOISE_CHECKS: dict[str, Callable[[Evidence], StepFinding]] = {
    "on its own": crowd,
    "one example": one_example,
    "best direction": best_direction,
    "fresh noise": fresh_noise,
    "law of the noise": law,
    "trials": trials,
}
"""Checks of a step of whose state some part is a sum plus noise."""
