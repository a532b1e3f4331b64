"""A clip norm that changes over the steps by a public schedule.

Noise follows by itself: it is drawn at ``sigma_t`` times the clip norm that the sum
carries, so the noise multiplier, and with it epsilon, stays that of the plan.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from dp_ilg import validation
from dp_ilg.base import ClippedGrad, Params, PrivateTransformation
from dp_ilg.clipping.clip import ClipMode, as_clip_mode, clip_per_example
from dp_ilg.geometry.facts import ClipFacts


class ClipByScheduleState(NamedTuple):
    """Which step comes next."""

    step: Any


def clip_by_schedule(
    schedule: Any, *, clip_mode: str | ClipMode = "joint"
) -> PrivateTransformation:
    """`dp_ilg.clip_per_example` whose clip norm is a schedule of the step.

    A `ClippedGrad` passes through with the norm it was clipped with: beside
    `dp_ilg.clipped_grad`, call that with ``l2_clip_norm=schedule(step)`` inside the
    step instead.

    Args:
        schedule: step -> clip norm, above 0, as in Optax. Public: a function of the
            step alone, or of earlier releases, never of the data.
        clip_mode: as in `dp_ilg.clip_per_example`.

    Returns:
        A transformation to `ClippedGrad`, the first link of a private chain.

    Raises:
        TypeError: for a schedule that is not callable.
        ValueError: for a mode or a clip norm (at step 0) that is wrong.

    Privacy: each step is a Gaussian with the plan's noise multiplier relative to that
    step's clip norm, so epsilon is the plan's. The clip norm in the plan's statement
    is only the nominal one: say that it is scheduled.

    Example:
        >>> import dp_ilg, optax
        >>> params = {"w": jnp.zeros(2)}
        >>> clip = clip_by_schedule(optax.linear_schedule(1.0, 0.5, 1))
        >>> state, gradients = clip.init(params), {"w": jnp.array([[3.0, 4.0]])}
        >>> for _ in range(2):
        ...     geometry = dp_ilg.Geometry.uniform(params)
        ...     clipped, state = clip.update(gradients, state, geometry=geometry)
        ...     clipped.sensitivity()
        1.0
        0.5

    Reference: Abadi et al. 2016, section 3.1 (per-layer and time-dependent parameters).
    """
    if not callable(schedule):
        raise TypeError(
            f"The clip schedule is {schedule!r}, which cannot be called; pass a "
            "function of the step, or use dp_ilg.clip_per_example for a constant."
        )
    validation.positive("The clip norm at step 0", schedule(0))
    mode = as_clip_mode(clip_mode)

    def init(params: Params) -> ClipByScheduleState:
        clip_per_example(1.0).init(params)
        return ClipByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: ClipByScheduleState, params: Any = None, **extra: Any
    ) -> tuple[ClippedGrad, ClipByScheduleState]:
        bound = jnp.asarray(schedule(state.step), jnp.float32)
        bound = jnp.where(bound > 0, bound, jnp.nan)  # under jit: NaN is released
        clip = clip_per_example(bound, clip_mode=mode)
        clipped, _ = clip.update(updates, optax.EmptyState(), params, **extra)
        return clipped, ClipByScheduleState(state.step + 1)

    return PrivateTransformation(
        init,
        update,
        role="clip",
        facts=ClipFacts(mode),
        clip_norm=lambda state: schedule(state.step),
    )
