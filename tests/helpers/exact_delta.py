"""Delta of a run to ten digits: its transform inverted by quadrature, as an oracle.

Written apart from the accountant, for the tests alone. Moments of a step's loss are
integrals by Gauss-Legendre panels; the contour integral is taken twice, by the
trapezoid rule and by the midpoint rule. Poisson's formula makes the first too large
and the second too small by what both wrap round, so their distance is the error. An
imagined Gaussian of a cost of a millionth of epsilon ends the integral where the losses
themselves do not.
"""

import math

import numpy as np
from scipy import optimize, special, stats

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_BLOCK = 128
_MOST_TERMS = 20_000


def log_ratio(q, z, x):
    """Log of the mixture's density over that without the example, at z x."""
    u = x / z - 0.5 / z**2
    if q == 1:
        return u
    low = np.log1p(q * np.expm1(np.minimum(u, 20.0)))
    rest = np.log1p((1 - q) / q * np.exp(-np.maximum(u, 20.0)))
    return np.where(u < 20, low, math.log(q) + u + rest)


def law(q, z, sensitivity, removed, x):
    """Log density of P at x (standard units), and the loss there."""
    normal = -0.5 * x * x - 0.5 * math.log(2 * math.pi)
    ours = log_ratio(q, z, x)
    if sensitivity == 2:
        return normal + ours, ours - log_ratio(q, z, -x)
    return (normal + ours, ours) if removed else (normal, -ours)


def panels(q, z, sensitivity, removed, tail, tilt, frequency):
    """Losses and logs of weighted tilted densities of a step's nodes.

    Half of `tail` is the mass of P that is left out at each end.
    """
    low, high = stats.norm.ppf(tail / 2), stats.norm.isf(tail / 2)
    if sensitivity == 2 or removed:
        odd = special.ndtri(min(tail / 4 / q, 0.5))
        high = max(stats.norm.isf(tail / 4), 1 / z - odd)
    grid = np.linspace(low, high, 2001)
    logs, losses = law(q, z, sensitivity, removed, grid)
    tilted = logs + tilt * losses
    inside = np.flatnonzero(tilted > tilted.max() - 50)
    part = slice(max(inside[0] - 1, 0), inside[-1] + 2)
    grid, losses, tilted = grid[part], losses[part], tilted[part]
    slope = np.abs(np.gradient(losses, grid))
    steep = np.abs(np.gradient(tilted, grid))
    density = np.maximum(1 / 0.7, 1 / z) + frequency * slope / 6 + steep / 12
    count = np.concatenate(
        [[0], np.cumsum(0.5 * (density[1:] + density[:-1]) * np.diff(grid))]
    )
    edges = np.interp(np.linspace(0, count[-1], math.ceil(count[-1]) + 1), count, grid)
    half, middle = np.diff(edges) / 2, (edges[1:] + edges[:-1]) / 2
    x = (middle[:, None] + half[:, None] * _NODES).ravel()
    logs, losses = law(q, z, sensitivity, removed, x)
    return losses, logs + tilt * losses + np.log((half[:, None] * _WEIGHTS).ravel())


def mixture_panels(parts, *facts):
    """The same for a step that is one of several, by a coin that is told."""
    found = [(math.log(share), *panels(q, z, *facts)) for share, q, z in parts]
    losses = np.concatenate([losses for _, losses, _ in found])
    return losses, np.concatenate([share + logs for share, _, logs in found])


class Exact:
    """Delta of a run: `steps` are pairs of parts [(share, q, z)] and a count."""

    def __init__(self, steps, sensitivity, removed, epsilon, delta, extra=3e-6):
        tail = 1e-6 * delta / max(1, sum(count for _, count in steps))
        self.steps, self.side = steps, (sensitivity, removed, tail)
        self.left_out = 1e-6 * delta
        found = optimize.minimize_scalar(
            lambda x: (
                self._moment(math.exp(x))
                - math.exp(x) * epsilon
                - x
                - math.log1p(math.exp(x))
            ),
            bounds=self._bracket(epsilon),
            method="bounded",
            options={"xatol": 1e-3},
        )
        tilts = (math.exp(found.x) * np.array([1, 0.9, 0.75, 0.5, 2.0, 4.0])).tolist()
        size = {t: self._moment(t) - t * epsilon for t in tilts}
        tilts = [t for t in tilts if size[t] < size[tilts[0]] + 8]  # or it cancels
        self.tilt = min(tilts, key=lambda t: self._period(t, epsilon))
        self.scale = self._moment(self.tilt)
        self.normal = 2 * extra * epsilon / (1 + self.tilt)
        self.scale += 0.5 * self.normal * self.tilt * (1 + self.tilt)
        self.epsilon = epsilon
        self._sum_up()

    def _moment(self, tilt):
        total = 0.0
        for parts, count in self.steps:
            _, logs = mixture_panels(parts, *self.side, tilt, 0.0)
            total += count * special.logsumexp(logs)
        return total

    def _period(self, tilt, epsilon=None):
        """So long that what wraps round is a part in 1e13."""
        epsilon = self.epsilon if epsilon is None else epsilon
        size = self._moment(tilt) - tilt * epsilon
        wider = (tilt * np.array([1.05, 1.1, 1.2, 1.35, 1.6, 2.0, 3.0])).tolist()
        right = [
            (self._moment(t) - t * epsilon - size + 30) / (t - tilt) for t in wider
        ]
        return max(min(right), (30 + max(0.0, -size)) / tilt)

    def _bracket(self, epsilon):
        """Between two tilts the derivative changes its sign."""
        high = 1e-3

        def slope(t):
            return (
                (self._moment(t * 1.01) - self._moment(t)) / (0.01 * t)
                - epsilon
                - 1 / t
                - 1 / (1 + t)
            )

        while slope(high) < 0 and high < 1e7:
            high *= 3
        return math.log(high / 4), math.log(high * 1.1)

    def _sum_up(self):
        """Terms at multiples of half a step until they have died out."""
        self.period = self._period(self.tilt)
        self.step = math.pi / self.period  # half of the trapezoid rule's
        values, frequencies, top, done = [], [], 60.0 * self.step, 0
        nodes = None
        while done < _MOST_TERMS:
            block = self.step * np.arange(done, done + _BLOCK)
            if nodes is None or block[-1] > top:
                while block[-1] > top:
                    top *= 2
                nodes = [
                    (*mixture_panels(parts, *self.side, self.tilt, top), count)
                    for parts, count in self.steps
                ]
                nodes = [self._prepared(*one) for one in nodes]
            values.append(self._terms(nodes, block))
            frequencies.append(block)
            done += _BLOCK
            if np.abs(values[-1]).max() < 1e-13 * abs(values[0][0]):
                break
        natural = block[-1] ** 2 * self.normal < 9  # the losses end it, not the extra
        self.converged = natural or self.tilt * self.epsilon > 5
        self.converged &= done < _MOST_TERMS
        self.frequencies, self.values = (
            np.concatenate(frequencies),
            np.concatenate(values),
        )

    def _prepared(self, losses, logs, count):
        kept = logs > logs.max() - 38
        weights = np.exp(logs[kept] - special.logsumexp(logs))
        weights /= weights.sum()
        centre = weights @ losses[kept]
        turns = self.step * (losses[kept] - centre)
        inner = weights[:, None] * np.exp(1j * np.outer(turns, np.arange(_BLOCK)))
        return turns, inner, centre, count

    def _terms(self, nodes, block):
        first = round(block[0] / self.step)
        logs = -0.5 * self.normal * block**2
        logs = logs + 1j * block * self.normal * (self.tilt + 0.5)
        for turns, inner, centre, count in nodes:
            moment = np.exp(1j * first * turns) @ inner
            logs = logs + count * (np.log(moment) + 1j * block * centre)
        s = self.tilt + 1j * block
        return np.exp(logs - 1j * block * self.epsilon) / (s * (s + 1))

    def deltas(self, epsilon):
        """Delta at an epsilon near the first one: too small, and too large."""
        turned = (
            self.values * np.exp(1j * self.frequencies * (self.epsilon - epsilon))
        ).real
        turned[0] *= 0.5
        factor = 2 * math.exp(self.scale - self.tilt * epsilon) / self.period
        return (
            factor * turned[1::2].sum(),
            factor * turned[::2].sum() + self.left_out,
        )
