"""Whether what arrives at a chain was clipped as the chain says.

A `dp_ilg.ClippedGrad` has the guarantee of the noise in its own weights and clip norm,
whatever they are. That they are those of this chain, for this step, is a second,
independent word: gradients of another plan, of another chain or of an old state, and
sums that something scaled, say other ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dp_ilg.accounting.ledger import BudgetExhausted
from dp_ilg.base import ClippedGrad
from dp_ilg.clipping.modes import SAME_NORM, other_mode, other_norm
from dp_ilg.clipping.scores.table import other_score
from dp_ilg.geometry.facts import ClipFacts, joined_facts
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.seal import sealed


class Said(NamedTuple):
    """What the links of a chain say.

    Attributes:
        facts: of the clip, or None.
        clip_norm: maps the chain's state to the clip norm of the step (None where no
            link of this very chain clips).
        check_end: raises for a state that has taken more steps than its plan has, as
            far as the number is on the host already; nothing waits for it.
    """

    facts: ClipFacts | None
    clip_norm: Callable[[Any], Any]
    check_end: Callable[[Any], None]


def said_by(links: Sequence[Any]) -> Said:
    """What the links of a chain say of the clip, and of the end of the plan.

    Args:
        links: of the chain; any Optax transformations.

    Returns:
        The `Said`.

    Example:
        >>> import dp_ilg
        >>> said = said_by([dp_ilg.clip_per_example(0.5)])
        >>> said.facts.clip_mode.name, said.clip_norm(((),))
        ('joint', 0.5)
    """
    asked = [getattr(link, "clip_norm", None) for link in links]
    norms = [(place, norm) for place, norm in enumerate(asked) if norm is not None]

    def clip_norm(state: Any) -> Any:
        return next((norm(state[place]) for place, norm in norms), None)

    noises = [i for i, link in enumerate(links) if getattr(link, "role", "") == "noise"]

    def check_end(state: Any) -> None:
        for place in noises:
            _check_end(links[place].plan, getattr(state[place], "step", None))

    facts = joined_facts(getattr(link, "facts", None) for link in links)
    return Said(facts, clip_norm, check_end)


def _check_end(plan: Any, step: Any) -> None:
    """Raises one host call after a step past the plan, which was NaN."""
    if plan is None or not _is_here(step):
        return
    if int(step) > plan.num_steps:
        raise BudgetExhausted(
            f"This optimizer has taken {int(step)} steps, but its plan has "
            f"{plan.num_steps}: all after them is NaN by intention; stop at "
            "plan.num_steps and take the parameters of then, or plan a new run."
        )


def _is_here(step: Any) -> bool:
    """Whether a number can be read without waiting for a device."""
    if isinstance(step, np.ndarray):
        return not step.ndim
    if isinstance(step, Tracer) or not isinstance(step, jax.Array):
        return False
    array: Any = step
    alive = not array.ndim and array.is_fully_addressable and not array.is_deleted()
    return alive and array.is_ready()


def check_state(state: Any, count: int) -> None:
    """Raises unless a chain's state is made of as many parts as the chain, whole ones.

    Args:
        state: of a chain.
        count: how many transformations the chain has.

    Raises:
        ValueError: for another number of parts, or parts that are dictionaries, as a
            checkpoint gives that is restored without a target.

    Example:
        >>> check_state(((), {"step": 1}), 2)
        Traceback (most recent call last):
        ValueError: The optimizer's state holds plain dictionaries, as a checkpoint ...
    """
    if not isinstance(state, tuple | list) or len(state) != count:
        parts = len(state) if isinstance(state, tuple | list) else "no"
        raise ValueError(
            f"The state has {parts} parts, but the chain has {count} "
            "transformations; call init of the same chain."
        )
    if any(type(part) is dict for part in state):
        raise ValueError(
            "The optimizer's state holds plain dictionaries, as a checkpoint restored "
            "without a target has them; restore it with the target tx.init(params)."
        )


def checked(
    updates: Any, extra: dict[str, Any], own: Geometry, clip_norm: Any
) -> tuple[Any, dict[str, Any]]:
    """What a chain is given, its clipped sums compared with the chain's own state.

    Args:
        updates: per-example gradients, or a `ClippedGrad`.
        extra: the extra arguments of the update: ``clipped_grad=`` is compared as well,
            and a ``geometry=`` stands in place of the chain's.
        own: the chain's ``geometry(state)``, with its facts.
        clip_norm: the clip norm of this step, or None where the chain does not say.

    Returns:
        Both, with a clip norm of NaN where a difference cannot be known before values
        are, so that nothing but NaN is released.

    Raises:
        ValueError: for sums clipped in other groups, weights, mode or norm, as far as
            known; for arithmetic on a sum.
        TypeError: for a ``clipped_grad=`` that is none.

    Privacy: a function of public values only.

    Example:
        >>> import dp_ilg
        >>> params, loss = {"w": jnp.zeros(2)}, lambda p, x: p["w"] @ x
        >>> own = dp_ilg.Geometry.uniform(params)
        >>> rows = jnp.ones((3, 2))
        >>> clipped = dp_ilg.clipped_grad(loss, l2_clip_norm=2.0)(
        ...     params, rows, geometry=own)
        >>> checked(clipped, {}, own, 2.0)[0] is clipped
        True
        >>> checked(clipped, {}, own, 1.0)
        Traceback (most recent call last):
        ValueError: l2_clip_norm is 2 in clipped_grad, but 1 in the chain whose ...
    """
    given = extra.get("geometry", own)
    wanted = given.saying(joined_facts([given.facts, own.facts]))
    beside = extra.get("clipped_grad")
    if beside is not None:
        if not isinstance(beside, ClippedGrad):
            raise TypeError(
                f"clipped_grad is {type(beside).__name__}, which is not clipped; pass "
                "what a dp_ilg.clipped_grad function returned."
            )
        extra = extra | {"clipped_grad": _agreed(beside, wanted, clip_norm)}
    if isinstance(updates, ClippedGrad):
        updates = _agreed(updates, wanted, clip_norm)
    return updates, extra


def _agreed(clipped: ClippedGrad, wanted: Geometry, clip_norm: Any) -> ClippedGrad:
    """The sum, poisoned where it turns out to be of another chain."""
    sealed(clipped)
    found = clipped.geometry
    if found.groups != wanted.groups:
        raise ValueError(
            f"The gradients were clipped in {found.groups.names}, but the chain's "
            f"groups are {wanted.groups.names}; clip with this optimizer's "
            "geometry(state)."
        )
    _check_mode(found.facts, wanted.facts)
    same = [_same_norm(clipped.l2_clip_norm, wanted.facts, clip_norm)]
    same += _same_weights(found, wanted)
    unknown = [x for x in same if isinstance(x, Tracer)]
    if not unknown:
        return clipped
    fine = jnp.all(jnp.stack(unknown))
    bound = jnp.where(fine, clipped.l2_clip_norm, jnp.nan)
    return dataclasses.replace(clipped, l2_clip_norm=bound)


def _check_mode(found: ClipFacts | None, wanted: ClipFacts | None) -> None:
    one, two = (getattr(facts, "clip_mode", None) for facts in (found, wanted))
    if one is not None and two is not None and not one.agrees(two):
        raise ValueError(other_mode(one, two))
    own, said = (getattr(facts, "score", None) for facts in (found, wanted))
    if own is not None and said is not None and own != said:
        raise ValueError(other_score(own, said))


def _same_norm(found: Any, wanted: ClipFacts | None, clip_norm: Any) -> Any:
    """Whether the clip norm is the chain's; what is no number is left to the noise."""
    norm = getattr(wanted, "l2_clip_norm", None)
    norm = clip_norm if norm is None else norm
    if norm is None:
        return True
    close = jnp.abs(found - norm) <= SAME_NORM * jnp.asarray(norm)
    same = close | ~(jnp.isfinite(found) & (jnp.asarray(found) > 0))
    if not isinstance(same, Tracer) and not bool(same):
        raise ValueError(other_norm(f"{float(found):g}", f"{float(norm):g}"))
    return same


def _same_weights(found: Geometry, wanted: Geometry) -> list[Any]:
    """Whether weights and coordinates are the chain's; those of NaN are the noise's."""
    bare = [jax.tree.flatten((g.weights, g.coordinates)) for g in (found, wanted)]
    (mine, structure), (theirs, other) = bare
    same: list[Any] = [structure == other]
    if structure == other:
        pairs = zip(mine, theirs, strict=True)
        same = [_close(a, b) for a, b in pairs if a is not b]
    if not all(bool(x) for x in same if not isinstance(x, Tracer)):
        raise ValueError(
            "The gradients were clipped in other weights than this chain's state "
            "holds; clip with grad_fn(..., geometry=tx.geometry(state)) of the same "
            "chain and step, or hand public weights to tx.update(..., geometry=), too."
        )
    return same


def _close(one: Any, other: Any) -> Any:
    one, other = jnp.asarray(one), jnp.asarray(other)
    far = jnp.abs(one - other) > SAME_NORM * jnp.abs(other)
    return ~jnp.any(far)
