"""Noise schedules: the shape of the noise multiplier over the steps.

A schedule is public: it depends on the step alone, never on data. It gives a
*relative* shape; calibration scales the whole of it to reach a target epsilon, and
`to_stages` first makes it piecewise constant, because the cost of exact accounting
grows with the number of distinct multipliers.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, SupportsFloat

import numpy as np

from dp_ilg import validation
from dp_ilg.accounting.shapes import COUNTS, SHAPES
from dp_ilg.registry.lookup import resolve, table, unknown


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A named shape with its parameters; hashable, so a plan may be a cache key.

    Made by the factories of this module, which check the parameters.

    Attributes:
        name: a key of `SCHEDULES`.
        parameters: the numbers the shape needs.

    Raises:
        ValueError: for a name that is no schedule, or another number of parameters.

    Example:
        >>> linear(0.5) == linear(0.5)
        True
        >>> linear(0.5).multipliers(3, steps_per_epoch=1.0)
        array([1.  , 0.75, 0.5 ])
    """

    name: str
    parameters: tuple[float, ...] = ()

    def __post_init__(self):
        if self.name not in SHAPES:
            raise ValueError(unknown("schedule", self.name, SCHEDULES, "schedule"))
        least, most = COUNTS[self.name]
        if not least <= len(self.parameters) <= most:
            raise ValueError(
                f"Schedule({self.name!r}, {self.parameters}) has "
                f"{len(self.parameters)} parameters, which is not how many "
                f"{self.name} has; make it with dp_ilg.schedules.{self.name}."
            )

    def multipliers(self, num_steps: int, steps_per_epoch: SupportsFloat) -> np.ndarray:
        """Returns the relative noise multiplier of every step.

        Args:
            num_steps: the number of steps.
            steps_per_epoch: the number of examples over the expected batch size.

        Returns:
            A new float64 array of `num_steps` positive multipliers.

        Raises:
            ValueError: if the shape cannot have that many steps or falls to zero.

        Example:
            >>> stages([1.0, 2.0]).multipliers(4, steps_per_epoch=1.0)
            array([1., 1., 2., 2.])
        """
        validation.whole("num_steps", num_steps)
        validation.positive("steps_per_epoch", steps_per_epoch)
        steps = np.arange(int(num_steps))
        # The guard keeps 3 * (10 / 3) from being epoch 0 by rounding.
        epochs = np.floor(steps / float(steps_per_epoch) + 1e-9)
        values = SHAPES[self.name](self.parameters, steps, epochs)
        if not np.all(values > 0):
            raise ValueError(
                f"The schedule {self.name}{self.parameters} reaches a noise multiplier "
                f"of 0 within {num_steps} steps; use a slower decay or a floor."
            )
        return values


def constant() -> Schedule:
    """The same noise at every step; the strongest baseline.

    Returns:
        The schedule.

    Example:
        >>> constant().multipliers(2, steps_per_epoch=1.0)
        array([1., 1.])
    """
    return Schedule("constant")


def inverse_time(decay: SupportsFloat, floor: SupportsFloat | None = None) -> Schedule:
    """The decay of DP-AdamILG: 1 / (1 + decay * epoch), not below `floor`.

    Epochs count from 0 and are whole. The published floor is an absolute noise
    multiplier, sqrt(2 ln(1.25 / delta)) / eps_lim. A schedule is a shape, so here
    `floor` is a fraction of the scale: give ``absolute_floor / sigma_0``. With
    ``plan_privacy(noise_multiplier=sigma_0)`` that is exactly the published schedule;
    with ``plan_privacy(epsilon=...)`` the floor is scaled with everything else.

    Args:
        decay: the rate k of an epoch, 0 or above.
        floor: the smallest relative multiplier, or None for no floor.

    Returns:
        The schedule.

    Raises:
        ValueError: for a negative or non-finite decay or a floor not above 0.

    Example:
        >>> inverse_time(1.0, floor=0.4).multipliers(4, steps_per_epoch=1.0)
        array([1. , 0.5, 0.4, 0.4])

    Reference:
        Li, Liang, Jiang, Zhang, "DP-AdamILG", PMLR 260, 2024, Algorithm 1.
    """
    if floor is None:
        return Schedule("inverse_time", (_rate("decay", decay),))
    validation.positive("floor", floor)
    return Schedule("inverse_time", (_rate("decay", decay), float(floor)))


def linear(end: SupportsFloat) -> Schedule:
    """A straight line from 1 at the first step to `end` at the last.

    Args:
        end: the last relative multiplier, above 0; above 1 the noise grows.

    Returns:
        The schedule.

    Raises:
        ValueError: if `end` is not a finite number above 0.

    Example:
        >>> linear(2.0).multipliers(3, steps_per_epoch=1.0)
        array([1. , 1.5, 2. ])
    """
    validation.positive("end", end)
    return Schedule("linear", (float(end),))


def exponential(rate: SupportsFloat) -> Schedule:
    """The exponential decay exp(-rate * epoch), in whole epochs from 0.

    Args:
        rate: the decay of an epoch, 0 or above.

    Returns:
        The schedule.

    Raises:
        ValueError: for a negative or non-finite rate.

    Example:
        >>> exponential(0.5).multipliers(3, steps_per_epoch=1.0).round(3)
        array([1.   , 0.607, 0.368])

    Reference:
        Yu, Liu, Pu, Gursoy, Truex, "Differentially Private Model Publishing for
        Deep Learning", IEEE S&P 2019.
    """
    return Schedule("exponential", (_rate("rate", rate),))


def cosine(end: SupportsFloat) -> Schedule:
    """Half a cosine from 1 at the first step to `end` at the last.

    Args:
        end: the last relative multiplier, above 0; above 1 the noise grows.

    Returns:
        The schedule.

    Raises:
        ValueError: if `end` is not a finite number above 0.

    Example:
        >>> cosine(0.5).multipliers(3, steps_per_epoch=1.0)
        array([1.  , 0.75, 0.5 ])
    """
    validation.positive("end", end)
    return Schedule("cosine", (float(end),))


def stages(values: Iterable[SupportsFloat]) -> Schedule:
    """Equally long stages, each with its own multiplier.

    Args:
        values: the relative multiplier of each stage, at most one a step.

    Returns:
        The schedule.

    Raises:
        ValueError: if there are no values or one is not a finite number above 0.

    Example:
        >>> stages([2, 1]).multipliers(4, steps_per_epoch=1.0)
        array([2., 2., 1., 1.])
    """
    return Schedule("stages", _positive_values(values))


def array(values: Iterable[SupportsFloat]) -> Schedule:
    """Any schedule, one multiplier a step.

    Args:
        values: the relative multiplier of every step.

    Returns:
        The schedule; it fits plans of exactly that many steps.

    Raises:
        ValueError: if there are no values or one is not a finite number above 0.

    Example:
        >>> array([1, 2, 1]).multipliers(3, steps_per_epoch=1.0)
        array([1., 2., 1.])
    """
    return Schedule("array", _positive_values(values))


SCHEDULES: dict[str, Callable[..., Schedule]] = table(
    "schedule",
    {
        "constant": constant,
        "inverse_time": inverse_time,
        "linear": linear,
        "exponential": exponential,
        "cosine": cosine,
        "stages": stages,
        "array": array,
    },
)


def as_schedule(schedule: Any, **parameters: Any) -> Any:
    """Reads a schedule: anything that is one, or the name of one.

    Args:
        schedule: a `Schedule`, a function of the step, a sequence of multipliers, or a
            name: of `SCHEDULES`, of an entry point of ``dp_ilg.schedules``, or
            ``package.module:name`` or ``./file.py:name``.
        **parameters: of a schedule that is named; what the name stands for is then
            called with them.

    Returns:
        The schedule; `dp_ilg.accounting.shapes.multipliers_of` takes it.

    Raises:
        ValueError: for an unknown name, and for parameters that it does not have or
            lacks.

    Privacy: its values must not come from the private data.

    Example:
        >>> as_schedule("linear", end=0.5) == linear(0.5)
        True
        >>> as_schedule("linear")
        Traceback (most recent call last):
        ValueError: The schedule linear lacks end; give it.
    """
    if not isinstance(schedule, str):
        if any(schedule is factory for factory in SCHEDULES.values()):
            raise ValueError(
                f"schedule is {schedule!r}, which makes schedules; call it."
            )
        return schedule
    found = resolve("schedule", schedule, SCHEDULES, "schedule")
    if schedule not in SCHEDULES and not parameters:
        return found
    _check_parameters(schedule, found, parameters)
    return found(**parameters)


def _check_parameters(name: str, factory: Any, parameters: dict[str, Any]) -> None:
    known = inspect.signature(factory).parameters if callable(factory) else {}
    for given in parameters:
        if given not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"The schedule {name} has no parameter {given}; {takes}.")
    for wanted, parameter in known.items():
        if parameter.default is parameter.empty and wanted not in parameters:
            raise ValueError(f"The schedule {name} lacks {wanted}; give it.")


def to_stages(
    multipliers: np.ndarray, num_stages: int
) -> tuple[tuple[int, float], ...]:
    """Makes a sequence of multipliers piecewise constant.

    A sequence that already has at most `num_stages` runs of equal values is kept
    exactly. Otherwise it is cut into `num_stages` pieces of equal length, and each
    piece gets the multiplier that spends the same zCDP budget, sum 1/z^2, as the
    piece did. The result is what is applied *and* accounted, so the approximation
    costs no privacy.

    Args:
        multipliers: the multiplier of every step, all above 0.
        num_stages: the largest number of stages.

    Returns:
        Pairs of a number of steps and their multiplier.

    Raises:
        ValueError: if `num_stages` is not a whole number of at least 1.

    Example:
        >>> to_stages(np.array([2.0, 2.0, 1.0]), num_stages=16)
        ((2, 2.0), (1, 1.0))
        >>> len(to_stages(linear(0.5).multipliers(100, 10.0), num_stages=4))
        4
    """
    validation.whole("num_stages", num_stages)
    values = np.asarray(multipliers, np.float64)
    starts = np.flatnonzero(np.diff(values, prepend=np.nan) != 0)
    if len(starts) <= num_stages:
        pieces = np.split(values, starts[1:])
        return tuple((len(piece), float(piece[0])) for piece in pieces)
    pieces = np.array_split(values, num_stages)
    return tuple((len(piece), float(np.mean(piece**-2.0) ** -0.5)) for piece in pieces)


def _rate(name: str, value: SupportsFloat) -> float:
    try:
        rate = math.nan if isinstance(value, (str, bytes)) else float(value)
    except (TypeError, OverflowError):
        rate = math.nan
    if not 0 <= rate < math.inf:
        words = validation.shown(value)
        raise ValueError(f"{name} is {words}, but must be a finite number from 0 up.")
    return rate


def _positive_values(values: Iterable[SupportsFloat]) -> tuple[float, ...]:
    values = tuple(values)
    if not values:
        raise ValueError("The schedule has no values; give at least one above 0.")
    for index, value in enumerate(values):
        validation.positive(f"values[{index}]", value)
    return tuple(float(value) for value in values)
