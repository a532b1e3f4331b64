"""Discrete Gaussian draws from an exact sampler: from whole numbers only.

Bits come from SHAKE-256 under a secret of 256 bits, as in `dp_ilg.noise.secure`. Every
decision compares whole numbers, so that the law is the discrete Gaussian's itself: on
the integers with standard deviation 2^40, rounded to the release's grid of 2^27
afterwards, which is post-processing. Beside a rounded Gaussian its density is off by
less than 1e-25: the plan pays 1e-15 of epsilon for that, and of delta the probability,
4e-55, that a draw does not fit 31 bits.

A draw is ``2^40 (k + x)`` with a sign: k has the law exp(-k^2 / 2), x is uniform on a
lattice of 2^-40 and kept with probability exp(-k x - x^2 / 2), by the Bernoulli factory
of Canonne, Kamath and Steinke. This split by k (Karney) keeps 7 of 10 candidates and
takes a third of the bits that one through discrete Laplace numbers does.

Reference: Canonne, Kamath, Steinke 2020, "The discrete Gaussian for differential
privacy", Algorithms 1 and 3; Karney 2016, "Sampling exactly from the normal
distribution".
"""

from __future__ import annotations

import decimal
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg.base import MOST_METRICS
from dp_ilg.noise.secure import ExactDraws, SecureNoise
from dp_ilg.noise.table import GRID_BITS

BITS = 40  # of x: a standard deviation is 2^40
_WHOLE_BITS = 512  # of the law of k, of which 64 decide but once in 10^18
_MOST = 24  # largest k; more has a probability below 10^-125
_LARGEST = 2_100_000_000  # 15.6 standard deviations; more has a probability of 1e-54
_CHUNK = 1 << 12  # words drawn from the stream at once

Words = Callable[[int], np.ndarray]


class ExactNoise(SecureNoise):
    """Draws the exact noise of any step from a secret, in any order, without state.

    Privacy:
        With its draws of the right step in every update, noise is discrete Gaussian,
        and as hard to tell from random as SHAKE-256 is, for who does not know the
        secret. Keep that with the run's checkpoints and never use it for two runs.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp, secrets
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, exact_noise=True)
        >>> tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(0))
        >>> source = ExactNoise(secret=secrets.token_bytes(32))
        >>> params = {"w": jnp.zeros(2)}
        >>> state = tx.init(params)
        >>> draws = source.draws(0, params, tx.geometry(state))
        >>> grads = {"w": jnp.ones((5, 2))}
        >>> updates, state = jax.jit(tx.update)(grads, state, params, noise=draws)
        >>> source
        ExactNoise(secret=<hidden>)
    """

    _domain = b"dp_ilg.exact_noise.1"

    def draws(self, step: Any, params: Any, geometry: Any, rows: Any = 0) -> Any:
        """The noise of one step, on the host; see `SecureNoise.draws`.

        Args:
            step: which step, from 0: the one the state is at.
            params: the parameters; only shapes are read.
            geometry: ``tx.geometry(state)``, for the number of groups.
            rows: how many rows are counted (`dp_ilg.keep_rows`).

        Returns:
            `ExactDraws`.

        Raises:
            ValueError: for a step that is negative or no integer.

        Example:
            >>> import dp_ilg, jax.numpy as jnp
            >>> params = {"w": jnp.zeros((2, 3))}
            >>> source = ExactNoise(secret=bytes(32))
            >>> found = source.draws(4, params, dp_ilg.Geometry.uniform(params))
            >>> int(found.step), found.gradient["w"].dtype
            (4, dtype('int32'))
        """
        return ExactDraws(*super().draws(step, params, geometry, rows))

    def _drawn(self, place: tuple[int, int, int], count: int) -> np.ndarray:
        wide = discrete_gaussians(self._words(place), count)
        drop = BITS - GRID_BITS
        rounded = (wide + (1 << (drop - 1))) >> drop
        return np.clip(rounded, -_LARGEST, _LARGEST).astype(np.int32)

    def _words(self, place: tuple[int, int, int]) -> Words:
        """A function that hands out the next 64-bit words of a place's stream."""
        part, left = 0, np.zeros(0, np.uint64)

        def more(count: int) -> np.ndarray:
            nonlocal part, left
            while len(left) < count:
                where = self._stream((*place, part))
                part += 1
                size = max(_CHUNK, count - len(left))
                new = np.frombuffer(where.digest(8 * size), "<u8")
                left = np.concatenate([left, new])
            found, left = left[:count], left[count:]
            return found

        return more


def nothing(params: Any, geometry: Any, rows: int = 0) -> ExactDraws:
    """Draws of zero for no step, of which NaN is released: to trace a step with.

    Args:
        params: the parameters, perhaps traced.
        geometry: as in `ExactNoise.draws`.
        rows: as in `ExactNoise.draws`.

    Returns:
        `ExactDraws` of step -1.

    Example:
        >>> import dp_ilg
        >>> params = {"w": jnp.zeros((2, 3))}
        >>> int(nothing(params, dp_ilg.Geometry.uniform(params)).step)
        -1
    """
    leaves = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32), params)
    scores = jnp.zeros(len(geometry.groups.names), jnp.int32)
    metrics = jnp.zeros(MOST_METRICS, jnp.int32)
    counted = jnp.zeros(rows, jnp.int32) if rows else None
    return ExactDraws(jnp.int32(-1), leaves, scores, metrics, counted)


def discrete_gaussians(words: Words, count: int) -> np.ndarray:
    """Independent discrete Gaussian integers of standard deviation 2^40.

    Args:
        words: hands out so many uniform words of 64 bits, new ones at every call.
        count: how many draws.

    Returns:
        int64 ``[count]``.

    Privacy: exact for uniform words; how long it takes depends on the words only.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> words = lambda n: rng.integers(0, 2**64, n, np.uint64)
        >>> found = discrete_gaussians(words, 9)
        >>> found.shape, bool(abs(found).max() < 6 * 2**40)
        ((9,), True)
    """
    found: list[np.ndarray] = []
    missing = count
    while missing:
        tried = missing + missing // 2 + 16
        whole = _whole(words, tried)
        bits = words(tried)
        x, negative = bits >> np.uint64(64 - BITS), (bits & np.uint64(1)).astype(bool)
        keep = _kept(words, whole, x)
        keep &= ~(negative & (whole == 0) & (x == 0))  # zero has one sign
        size = (whole << BITS) + x.astype(np.int64)
        good = np.where(negative, -size, size)[keep][:missing]
        found.append(good)
        missing -= len(good)
    return np.concatenate([np.zeros(0, np.int64), *found])


def _kept(words: Words, whole: np.ndarray, x: np.ndarray) -> np.ndarray:
    """True with probability exp(-k x - x^2 / 2), x in units of 2^-40."""
    alive = np.arange(len(x))
    alive = alive[_factory(words, x[alive], True)]
    for turn in range(int(whole.max(initial=0))):
        due = whole[alive] > turn
        passed = np.ones(len(alive), bool)
        passed[due] = _factory(words, x[alive[due]], False)
        alive = alive[passed]
    keep = np.zeros(len(x), bool)
    keep[alive] = True
    return keep


def _factory(words: Words, x: np.ndarray, squared: bool) -> np.ndarray:
    """True with probability exp(-g), g = x or x^2 / 2: Algorithm 1 for g up to 1.

    The first of the events "1 in k, and g" that fails has an odd number k that often.
    """
    odd = np.zeros(len(x), bool)
    active, k = np.arange(len(x)), 0
    while len(active):
        k += 1
        again = _below(words, x[active])
        if squared:
            again &= _below(words, x[active])
        one_in = 2 * k if squared else k
        again &= _one_in(words, one_in, len(active))
        odd[active[~again]] = k % 2 == 1
        active = active[again]
    return odd


def _below(words: Words, x: np.ndarray) -> np.ndarray:
    """True with probability x, exactly."""
    return (words(len(x)) >> np.uint64(64 - BITS)) < x


def _one_in(words: Words, k: int, count: int) -> np.ndarray:
    """True with probability 1 / k, exactly: words above a multiple of k drawn again."""
    if k == 1:
        return np.ones(count, bool)
    found = words(count)
    limit = np.uint64(2**64 // k * k - 1)
    while (beyond := found > limit).any():
        found = np.where(beyond, words(count), found)
    return found % np.uint64(k) == 0


@functools.cache
def _cumulative() -> tuple[list[int], np.ndarray]:
    """The law of k, exp(-k^2 / 2) normalised: 512 bits of it, and the first 64."""
    with decimal.localcontext() as context:
        context.prec = _WHOLE_BITS // 3
        values = [(-decimal.Decimal(k * k) / 2).exp() for k in range(_MOST + 1)]
        scale = decimal.Decimal(2) ** _WHOLE_BITS / sum(values)
        sums, total = [], decimal.Decimal(0)
        for value in values[:-1]:
            total += value
            sums.append(int(total * scale))
    first = np.array([x >> (_WHOLE_BITS - 64) for x in sums], np.uint64)
    return sums, first


def _whole(words: Words, count: int) -> np.ndarray:
    """Whole parts k; where 64 bits leave it open, 448 more decide."""
    sums, first = _cumulative()
    bits = words(count)
    found = np.searchsorted(first, bits, side="right")
    for place in np.flatnonzero(np.isin(bits, first)):
        rest = [int(w) for w in words(_WHOLE_BITS // 64 - 1)]
        exact = functools.reduce(lambda a, b: a << 64 | b, rest, int(bits[place]))
        found[place] = sum(exact >= limit for limit in sums)
    return found.astype(np.int64)
