"""Privacy losses of one step on a grid: which loss has which probability, rounded up.

The worst pair of neighbouring outputs P, Q of a step is a pair of mixtures of normal
distributions (`renyi`). Its loss log(P/Q) is put on grid points by splitting the mass
of every cell between the cell's two ends so that both P and Q keep theirs. That pair is
at least as easy to tell apart as the true one at every epsilon, whatever the grid: a
coarse grid costs epsilon, never the guarantee.

Reference:
    Doroshenko, Ghazi, Kamath, Kumar, Manurangsi, "Connect the dots: tighter discrete
    approximations of privacy loss distributions", PoPETs 2022.
"""

from __future__ import annotations

import math

import numpy as np

_GROWTH = 0.01  # width of a cell relative to its loss, where that is above one unit
_FINE = 200  # cells of one unit next to zero


def grid(unit: float, largest: float) -> np.ndarray:
    """Grid points as multiples of a unit: dense at 0, ever wider to both sides.

    What a cell adds to epsilon grows with its probability times its width squared, and
    large losses are rare.

    Args:
        unit: the loss between two points next to 0.
        largest: the loss the grid must reach.

    Returns:
        int64[points], ascending and symmetric about 0; point k stands for ``k * unit``.

    Example:
        >>> points = grid(1e-3, 2.0)
        >>> len(points), int(points[-1]) >= 2000, bool((points == -points[::-1]).all())
        (913, True, True)
    """
    far = max(math.ceil(largest / unit), 2)
    up = list(range(1, min(_FINE, far) + 1))
    while up[-1] < far:
        up.append(up[-1] + max(1, int(_GROWTH * up[-1])))
    half = np.array(up, np.int64)
    return np.concatenate([-half[::-1], [0], half])


def largest_loss(q: float, z: float, sensitivity: int, log_tail: float) -> float:
    """A loss that is exceeded with a probability below ``exp(log_tail)``.

    Args:
        q: the sampling rate, in (0, 1].
        z: the noise multiplier.
        sensitivity: 1, or 2 if an example is replaced.
        log_tail: the log of the probability, at most -1.

    Returns:
        The loss.

    Example:
        >>> round(largest_loss(0.01, 1.0, 1, -30.0), 2)
        3.67
    """
    deviations = math.sqrt(-2 * log_tail)  # a normal tail is below exp(-x^2 / 2)
    unsampled = sensitivity * (0.5 * sensitivity + deviations * z) / z**2
    return float(np.logaddexp(np.log1p(-min(q, 1 - 1e-9)), np.log(q) + unsampled))


def step_losses(
    points: np.ndarray, steps: np.ndarray, sensitivity: int, removed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Puts the losses of several kinds of steps on one grid.

    Args:
        points: float64[points], ascending and symmetric about 0.
        steps: float64[kinds, 2], sampling rate and noise multiplier of each kind.
        sensitivity: 1 if neighbours differ by an example added or removed, 2 if by one
            replaced (then `removed` makes no difference).
        removed: whether P is the side that has the example.

    Returns:
        float64[kinds, points] probabilities of the losses, and float64[kinds] that of
        an infinite one; each row and its infinity sum to 1.

    Privacy:
        The pair on the grid dominates the step's own. Sampling cannot be better than
        Poisson, nor a bound on one example's norm larger than 1.

    Example:
        >>> points = grid(0.01, 5.0) * 0.01
        >>> losses, infinite = step_losses(points, np.array([[0.1, 1.0]]), 1, True)
        >>> float(losses.sum() + infinite[0]), bool(losses @ points > 0)
        (1.0, True)
    """
    q, z = steps[:, :1], steps[:, 1:]
    cuts = _outcome(points[None, :], q, z, sensitivity) / z
    ours = _masses(cuts, q, 1 / z)
    theirs = _masses(cuts, q, -1 / z) if sensitivity == 2 else _masses(cuts, 0 * q, z)
    if not removed:  # the loss changes its sign, P and Q their places
        ours, theirs = theirs[:, ::-1], ours[:, ::-1]
    below, cells, above = ours[:, 0], ours[:, 1:-1], ours[:, -1]
    width = np.diff(points)
    raised = cells - theirs[:, 1:-1] * np.exp(points[:-1])
    upper = np.clip(raised / -np.expm1(-width), 0, cells)
    found = np.zeros((len(steps), len(points)))
    found[:, 1:] += upper
    found[:, :-1] += cells - upper
    found[:, 0] += below
    return found, above


def _outcome(loss: np.ndarray, q, z, sensitivity: int) -> np.ndarray:
    """The outcome x whose loss is the given one: losses grow with x."""
    if sensitivity == 1:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = z**2 * np.log1p(np.expm1(loss) / q) + 0.5
        return np.where(np.expm1(loss) > -q, found, -np.inf)
    size, h = np.abs(loss), 1 / (2 * z**2)
    b = (1 - q) * np.expm1(size)
    root = np.sqrt(b**2 + 4 * q**2 * np.exp(size - 2 * h))
    return np.sign(loss) * z**2 * (np.log(b + root) - np.log(2 * q) + h)


def _masses(cuts: np.ndarray, q, shift) -> np.ndarray:
    """Probability below the first cut, between neighbouring ones and above the last.

    Of the mixture of N(0, 1) with a share q of N(shift, 1).
    """
    from scipy import special

    def normal(x: np.ndarray) -> np.ndarray:
        low = special.ndtr(x)
        high = special.ndtr(-x)
        inside = np.where(x[:, :-1] > 0, -np.diff(high), np.diff(low))
        return np.concatenate([low[:, :1], inside, high[:, -1:]], axis=1)

    return (1 - q) * normal(cuts) + q * normal(cuts - shift)
