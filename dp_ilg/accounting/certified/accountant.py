"""Epsilon of any composition of Gaussians, sampled or not: the certified accountant.

It holds for every delta and any number of steps, is never below the exact value, and is
seldom more than 4 parts in 10,000 above it for an epsilon of 1e-4 to 100. `contour` has
the proof. Here is what asks: which directions and sizes of data count, and how line and
imagined release are fitted. Where no line of at most 262,144 terms fits, or hardly any
noise hides a replaced example, the answer is still a bound, but a looser one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dp_ilg.accounting.certified import contour
from dp_ilg.accounting.certified.runs import CUT, Run, best_bound, bound_at
from dp_ilg.accounting.kinds import Kind, merged

_ADDED = 3e-3  # of epsilon, that the imagined release may cost at first
_ADDED_THEN = 4e-4
_SETTLED, _GOAL = 3e-4, 2e-4  # of epsilon, that it may and shall cost in the end
_MOST_ADDED = 0.1
_BLURRED = 1e-4  # of epsilon, that rounding may cost
_TRIES = 12
_MOST_KINDS, _ROUGH_KINDS = 2048, 16
_BARE = 0.02  # noise below it hides nobody who takes part
_OTHER = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 64.0, 0.6, 0.3])


def epsilon(kinds: Sequence[Kind], delta: float, sensitivity: int) -> float:
    """Returns an upper bound on epsilon, tight to about 4 parts in 10,000.

    Args:
        kinds: the steps, with noise multipliers above 0.
        delta: the delta of the guarantee, in (0, 1).
        sensitivity: 1 for an example added or removed, 2 for one replaced.

    Returns:
        The epsilon, at least 0.

    Raises:
        ValueError: where it is beyond what floating-point numbers hold.

    Privacy:
        Every step is taken for its dominating pair, see `renyi.step_divergences`; a cut
        draw for a mixture of two such pairs (`dp_ilg.accounting.truncation`).

    Example:
        >>> run = [Kind(0.01, z, (), 10_000) for z in (1.0, 0.99, 0.98)]
        >>> round(epsilon(run, 1e-5, 1), 2)
        12.08
        >>> round(epsilon(run, 1e-30, 1), 2)
        30.52

    Reference:
        See the module.
    """
    bare = [k for k in kinds if k.sampling_prob < 1 and k.noise_multiplier < _BARE]
    if not bare:
        return _sides(kinds, math.log(delta), sensitivity)
    rest = [kind for kind in kinds if kind not in bare]
    whole = [*rest, *(k._replace(sampling_prob=1.0, truncated=()) for k in bare)]
    found = _sides(whole, math.log(delta), sensitivity)
    stay_out = sum(kind.count * math.log1p(-kind.sampling_prob) for kind in bare)
    left = delta + math.expm1(stay_out) * (1 + 1e-12)
    if left > 0:
        found = min(found, _sides(rest, math.log(left), sensitivity))
    return found


def rough_epsilon(kinds: Sequence[Kind], delta: float, sensitivity: int) -> float:
    """Returns an upper bound on epsilon from one order each way, within milliseconds.

    Args:
        kinds: as in `epsilon`.
        delta: as in `epsilon`.
        sensitivity: as in `epsilon`.

    Returns:
        A bound above `epsilon`, often by a tenth.

    Example:
        >>> run = [Kind(0.01, 1.0, (), 10_000)]
        >>> 1 < rough_epsilon(run, 1e-5, 1) / epsilon(run, 1e-5, 1) < 1.2
        True
    """
    found, few = 0.0, merged(kinds, _ROUGH_KINDS)
    for removed in (True, False) if sensitivity == 1 else (True,):
        for law in (0, 1):
            run = Run.of(few, sensitivity, removed, law).cut(math.log(delta), 1.0)
            found = max(found, best_bound(run, math.log(delta))[0])
    return found


def _sides(kinds: Sequence[Kind], log_delta: float, sensitivity: int) -> float:
    """The largest epsilon over directions and, with cut draws, over data sizes."""
    kinds = merged(kinds, _MOST_KINDS)
    directions = (True, False) if sensitivity == 1 else (True,)
    laws = (0, 1) if sensitivity == 1 and any(k.truncated for k in kinds) else (0,)
    found, tilt = 0.0, 0.0
    for removed in directions:
        for law in laws:
            run = Run.of(kinds, sensitivity, removed, law)
            few = Run.of(merged(kinds, _ROUGH_KINDS), sensitivity, removed, law)
            few = few.cut(log_delta, 1.0)
            tilts = [tilt * factor for factor in _OTHER if tilt]
            if any(bound_at(few, log_delta, one) <= found for one in tilts):
                continue  # not even its upper bound is above
            bound, tilt = best_bound(few, log_delta)
            if bound <= found:
                continue
            found = max(found, _side(run, few, log_delta, bound, tilt))
    return found


def _side(run: Run, few: Run, log_delta: float, bound: float, tilt: float) -> float:
    """Epsilon of one side: a line is fitted to an epsilon until that is the answer."""
    best, about, added = bound, bound, _ADDED
    before, after, retilted = math.inf, 0.0, False  # epsilon, and `added` there
    for _ in range(_TRIES):
        share = min(1.0, tilt * about)
        line = contour.fitted(few.cut(log_delta, share), tilt, log_delta, about, added)
        terms = line and contour.summed(run.cut(log_delta, share), line)
        if terms is None:
            if before < math.inf or added > _MOST_ADDED:
                break
            added *= 8  # looser, but within reach
            continue
        found = contour.solve(terms, log_delta + math.log1p(-share * CUT), best)
        best = min(best, found)
        rest = (before - found) / max(1e-9, after / added - 1)  # in proportion
        if found == 0 or rest < _SETTLED * found:
            break
        slope, blurred = contour.slope(terms, found)
        near = found > 0.5 * about
        if not near or (blurred > _BLURRED and not retilted):
            retilted, before = near, math.inf
            relative = terms.error / abs(terms.values[0])
            tilt = _better_tilt(few, tilt, log_delta, found, relative)
            added = min(added, _ADDED_THEN)
        elif found > 0.9 * about:  # the line fits: see what less of the imagined gives
            before, after = found, added
            added = min(added / 4, max(added / 64, _GOAL * (1 + tilt) / slope))
        about = best
    return best


def _better_tilt(
    run: Run, tilt: float, log_delta: float, about: float, relative: float
) -> float:
    """The tilt that takes the fewest terms, among some around the given one.

    Where terms cancel, their rounding, relative to the first one, would drown delta.
    """

    def costs(one: float) -> float:
        line = contour.fitted(run, one, log_delta, about, _ADDED)
        if not line:
            return math.inf
        log_drowned = math.log(relative or 1e-300) + line.size
        drowned = math.exp(min(log_drowned, 300.0)) / max(1.0, one * about)
        return line.terms * (1 + drowned / _BLURRED)

    return min((tilt * _OTHER).tolist(), key=costs)
