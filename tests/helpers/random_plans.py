"""Random runs over the whole domain of the accountant, and an oracle's verdict.

A run has one or a few kinds of steps. Rates, noise, steps and delta are log-uniform.
In about a seventh of the runs draws are cut to a largest size.
"""

import math
import time

import numpy as np

from dp_ilg.accounting.certified import accountant
from dp_ilg.accounting.kinds import Kind
from dp_ilg.accounting.truncation import cut_laws
from tests.helpers.exact_delta import Exact
from tests.helpers.tilted_delta import tilted_delta


def draw(rng):
    """Kinds, delta and sensitivity of a run whose epsilon is between 1e-4 and 100."""
    while True:
        delta = 10 ** rng.uniform(-30, -2)
        stages = int(rng.choice([1, 1, 1, 2, 3]))
        q, z = 10 ** rng.uniform(-6, 0), 10 ** rng.uniform(-0.7, 2.3)
        steps = int(10 ** rng.uniform(0, 7))
        kinds = [
            Kind(q, z * float(rng.uniform(1, 2)), (), max(1, steps // stages))
            for _ in range(stages)
        ]
        if rng.random() < 0.2:
            kinds.append(Kind(1.0, 10 ** rng.uniform(0.5, 3), (), 1))
        sensitivity = int(rng.choice([1, 2]))
        laws = _laws(q, rng) if rng.random() < 0.15 else ()
        kinds = [
            k._replace(truncated=laws) if k.sampling_prob < 1 else k for k in kinds
        ]
        rough = accountant.rough_epsilon(kinds, delta, sensitivity)
        if 1e-4 < rough < 120:
            return kinds, delta, sensitivity


def _laws(q, rng):
    """Of cut draws, from hardly ever to one in two; none where that is never."""
    examples = int(10 ** rng.uniform(3, 7))
    mean = examples * q
    return cut_laws(examples, q, 1 + int(mean + rng.uniform(0, 4) * mean**0.5))


def _sides(kinds, sensitivity):
    """Steps as the oracle takes them, for every law of cut draws, and directions."""
    both = sensitivity == 1 and any(k.truncated for k in kinds)
    for law in (0, 1) if both else (0,):  # a replaced example leaves N - 1 others
        steps = []
        for q, z, laws, count in kinds:
            parts = [(1.0, q, z)]
            if laws:
                cut, rate = laws[law]
                parts = [(1 - cut, q, z), (cut, rate, z / 2)]
            steps.append(([part for part in parts if part[0] > 0], count))
        for removed in (True, False) if sensitivity == 1 else (True,):
            yield steps, removed


def verdict(kinds, delta, sensitivity):
    """What the accountant says and how the oracle's delta at it compares.

    `above` is the oracle's least delta at the epsilon claimed, over delta: above 1 the
    claim is false. `within` is its largest at an epsilon smaller by a thousandth: below
    1 the claim is loose. Where the oracle calls a claim false, a second one is asked,
    and decides. None where an oracle does not converge.
    """
    began = time.process_time()
    epsilon = accountant.epsilon(kinds, delta, sensitivity)
    seconds = time.process_time() - began
    facts = {"epsilon": epsilon, "seconds": seconds, "above": None, "within": None}
    if not 1e-4 <= epsilon <= 100:
        return facts
    found = []
    for steps, removed in _sides(kinds, sensitivity):
        most = sum(
            -k.count * math.log1p(-min(k.sampling_prob, 1 - 1e-16)) for k in kinds
        )
        if sensitivity == 1 and not removed and most <= epsilon:
            continue  # no loss is that large
        oracle = Exact(steps, sensitivity, removed, epsilon, delta)
        if not oracle.converged:
            return facts
        low, high = min(oracle.deltas(epsilon)), max(oracle.deltas(epsilon / 1.001))
        if low > delta:  # it cannot tell a false claim from a sum that has not settled
            low = tilted_delta(steps, sensitivity, removed, epsilon)
            high = tilted_delta(steps, sensitivity, removed, epsilon / 1.001)
        if low is None or high is None:
            return facts
        found.append((low, high))
    above, within = np.max(found, axis=0) / delta
    return facts | {"above": float(above), "within": float(within)}
