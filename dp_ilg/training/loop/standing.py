"""Where a run stands, as the host knows it without asking the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from dp_ilg.accounting.ledger import BudgetExhausted
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.training.loop.lots import Lot
from dp_ilg.training.loop.state import PrivateState

_REPLAY = (
    "the noise of a step follows the key and the step's number, so two different sums "
    "under one noise would show their difference"
)


class Standing(NamedTuple):
    """The state that may be stepped next.

    Attributes:
        step: steps taken.
        trail: the digest of what the next step is released from; "" until known.
        state: that state itself.
        leaves: its arrays, by which it is told from any other; a tree of dictionaries
            can be written to.
    """

    step: int
    trail: str
    state: PrivateState
    leaves: tuple[Any, ...]

    @classmethod
    def of(cls, step: int, trail: str, state: PrivateState) -> Standing:
        """The standing of a state as it is now."""
        return cls(step, trail, state, tuple(jax.tree.leaves(state)))


def admit(at: Standing | None, state: Any, lot: Any, owner: Any) -> None:
    """Raises unless a state and a lot are the next ones of their run.

    Args:
        at: where the run stands, None before ``init``.
        state: what ``train.step`` was given.
        lot: likewise.
        owner: the run.

    Raises:
        BudgetExhausted: past the plan.
        TypeError: for things of another kind, and under ``jit`` or ``scan``.
        ValueError: for a lot or a state of another run, a lot that was taken, one of
            another step, and a state that was changed.
    """
    _check_kinds(state, lot)
    if at is None or state.origin.run is not owner:
        raise ValueError(
            "The state is of another run (its plan is "
            f"{state.origin.plan}); pass what init, restore or step of this one "
            "returned."
        )
    if not lot._owned_by(owner):
        raise ValueError(
            f"{lot!r} was handed out by another run, which charged it to another "
            "ledger; take it from batches of this one."
        )
    if lot._taken():
        raise ValueError(
            f"{lot!r} was taken already; each lot is stepped once, since {_REPLAY}."
        )
    check_current(at, state)
    if at.step >= owner.plan.num_steps:
        raise BudgetExhausted(
            f"The run has taken all {at.step} steps of its plan; stop here, or plan a "
            "new run with its own budget."
        )
    if lot.step != at.step:
        raise ValueError(
            f"{lot!r} does not follow: the state has taken {at.step} steps, so lot "
            f"{at.step} is next; take every lot, in order."
        )


def _check_kinds(state: Any, lot: Any) -> None:
    if not isinstance(state, PrivateState):
        raise TypeError(
            f"state is {type(state).__name__}, but must be what train.init or "
            "train.step returned."
        )
    if not isinstance(lot, Lot):
        raise TypeError(
            f"lot is {type(lot).__name__}, but must be one that train.batches handed "
            "out: only those are Poisson samples that were charged."
        )


def check_current(at: Standing, state: PrivateState) -> None:
    """Raises for a state that is not, bit for bit, the one the run stands at.

    Args:
        at: where the run stands.
        state: of the same run.

    Raises:
        TypeError: under ``jit`` or ``scan``.
        ValueError: for an older state, one that was given away, or one that was
            changed.
    """
    if is_current(at, state):
        return
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(state)):
        raise TypeError(
            "The state is traced (jit, grad, vmap or scan); train.step is compiled "
            "already and checks each step on the host, so call it in a plain loop."
        )
    gone = any(_deleted(x) for x in jax.tree.leaves(state))
    if gone or not _same_bits(at, state):
        why = "was stepped already" if gone else "is not the one the run stands at"
        raise ValueError(
            f"The state {why} (step {at.step} is next): {_REPLAY}; keep the state that "
            "train.step returns, and change parameters only before train.init."
        )


def is_current(at: Standing, state: PrivateState) -> bool:
    """Whether a state is the one the run stands at, by identity of its leaves."""
    given = jax.tree.leaves(state)
    return len(at.leaves) == len(given) and all(map(_is, at.leaves, given))


def steps_of(at: Standing | None, state: PrivateState, plan: PrivacyPlan) -> int:
    """The number of steps a state has taken; read from the device where not known.

    Args:
        at: where its run stands.
        state: any state of that run.
        plan: of the run.

    Returns:
        The number.

    Raises:
        BudgetExhausted: past the plan.
        ValueError: for a state whose arrays were given to the next step.
    """
    if at is not None and is_current(at, state):
        return at.step
    if _deleted(state.step):
        raise ValueError(
            "The state was stepped already, and its arrays are those of the next one; "
            "ask of the state that train.step returned."
        )
    step = int(state.step)
    if step > plan.num_steps:
        raise BudgetExhausted(
            f"The state has taken {step} steps, but the plan has {plan.num_steps}."
        )
    return step


def _is(one: Any, other: Any) -> bool:
    return one is other


def _deleted(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and leaf.is_deleted()


def _same_bits(at: Standing, state: PrivateState) -> bool:
    """Whether a state holds the bits of the current one, wherever they lie."""
    if jax.tree.structure(at.state) != jax.tree.structure(state):
        return False
    pairs = zip(at.leaves, jax.tree.leaves(state), strict=True)
    return all(a is b or _bits(a) == _bits(b) for a, b in pairs)


def _bits(leaf: Any) -> tuple[Any, ...]:
    if _deleted(leaf):
        return (object(),)  # equal to nothing
    if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array.dtype, array.shape, array.tobytes()
