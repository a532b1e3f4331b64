"""What schedules compute: the shapes that have names, and whatever a user gives.

A schedule that is given is a function of the step (one of Optax's, too), a sequence of
multipliers, or an object with a method ``multipliers(num_steps, steps_per_epoch)``.
"""

from collections.abc import Callable
from typing import Any, SupportsFloat

import numpy as np

from dp_ilg import validation


def multipliers_of(
    schedule: Any, num_steps: int, steps_per_epoch: SupportsFloat
) -> np.ndarray:
    """The relative noise multiplier of every step of any schedule, checked.

    Args:
        schedule: a function of the step, a sequence of `num_steps` numbers, or an
            object with ``multipliers``, such as `dp_ilg.schedules` makes.
        num_steps: the number of steps.
        steps_per_epoch: the number of examples over the expected batch size.

    Returns:
        float64 ``[num_steps]``, all finite and above 0.

    Raises:
        ValueError: in one sentence, for anything else.

    Privacy: a schedule must be a function of the step and of public constants; what is
    computed from private data is a release that no plan knows.

    Example:
        >>> multipliers_of(lambda step: 2.0 - step / 4, 3, 1.0)
        array([2.  , 1.75, 1.5 ])
        >>> multipliers_of([1.0, 2.0], 2, 1.0)
        array([1., 2.])
    """
    if callable(getattr(schedule, "multipliers", None)):
        values = schedule.multipliers(num_steps, steps_per_epoch)
    elif callable(schedule) and not isinstance(schedule, type):
        values = _called(schedule, num_steps)
    elif isinstance(schedule, str | bytes) or not hasattr(schedule, "__len__"):
        raise ValueError(
            f"schedule is {validation.shown(schedule)}, but must be made by "
            "dp_ilg.schedules, or be a function of the step or a sequence of "
            f"{num_steps} numbers."
        )
    else:
        values = schedule
    return _checked(values, num_steps)


def _called(schedule: Callable[[Any], Any], num_steps: int) -> Any:
    """All steps in one call where that gives the same, else one after another."""
    steps = np.arange(num_steps)
    some = sorted({0, num_steps // 2, num_steps - 1})
    try:
        values = np.asarray(schedule(steps), np.float64)
        if values.shape == (num_steps,):
            alone = [float(schedule(t)) for t in some]
            if np.allclose(values[some], alone, rtol=1e-5, atol=0):
                return values
    except Exception:  # noqa: BLE001, S110 - made for one step at a time
        pass
    step = 0
    try:
        found = []
        for step in range(num_steps):
            found.append(float(schedule(step)))
        return found
    except Exception as error:  # noqa: BLE001 - the user's own code
        words = " ".join(str(error).split())
        raise ValueError(
            f"The schedule cannot be used: at step {step} it raises "
            f"{type(error).__name__}: {words}; a schedule is a function of the step "
            "that returns a number above 0."
        ) from error


def _checked(values: Any, num_steps: int) -> np.ndarray:
    try:
        found = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise ValueError(
            f"The schedule gives {validation.shown(values)}, but must give {num_steps} "
            "numbers, one a step."
        ) from None
    if found.shape != (num_steps,):
        raise ValueError(
            f"The schedule gives an array of shape {found.shape}, but the plan has "
            f"{num_steps} steps; give one multiplier a step."
        )
    wrong = np.flatnonzero(~((found > 0) & np.isfinite(found)))
    if len(wrong):
        raise ValueError(
            f"The schedule gives {found[wrong[0]]:g} at step {wrong[0]}, but must give "
            "a finite number above 0 at every step."
        )
    return found


def _constant(parameters, steps, epochs):
    return np.ones(len(steps))


def _inverse_time(parameters, steps, epochs):
    values = 1.0 / (1.0 + parameters[0] * epochs)
    return np.maximum(values, parameters[1]) if len(parameters) == 2 else values


def _linear(parameters, steps, epochs):
    return 1.0 + (parameters[0] - 1.0) * _progress(steps)


def _exponential(parameters, steps, epochs):
    return np.exp(-parameters[0] * epochs)


def _cosine(parameters, steps, epochs):
    (end,) = parameters
    return end + (1.0 - end) * 0.5 * (1.0 + np.cos(np.pi * _progress(steps)))


def _stages(parameters, steps, epochs):
    if len(parameters) > len(steps):
        raise ValueError(
            f"The schedule has {len(parameters)} stages but the plan only "
            f"{len(steps)} steps; give at most one stage a step."
        )
    return np.array(parameters)[steps * len(parameters) // len(steps)]


def _array(parameters, steps, epochs):
    if len(parameters) != len(steps):
        raise ValueError(
            f"The schedule has {len(parameters)} values but the plan has "
            f"{len(steps)} steps; give one value a step."
        )
    return np.array(parameters)


SHAPES = {
    "constant": _constant,
    "inverse_time": _inverse_time,
    "linear": _linear,
    "exponential": _exponential,
    "cosine": _cosine,
    "stages": _stages,
    "array": _array,
}
_MOST = 10**9  # of parameters: as many as there are steps
COUNTS = {  # least and most parameters
    "constant": (0, 0),
    "inverse_time": (1, 2),
    "linear": (1, 1),
    "exponential": (1, 1),
    "cosine": (1, 1),
    "stages": (1, _MOST),
    "array": (1, _MOST),
}


def _progress(steps: np.ndarray) -> np.ndarray:
    return steps / max(len(steps) - 1, 1)
