"""Save and restore: a run with its secret, its place, and what it was begun with.

Two forms with one content: folders of Orbax, by ``train.save``, and bytes of
``flax.serialization``, of a `PrivateState`. Both hold the keys of the noise.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dp_ilg.training.checkpoints import (
    filled,
    packed,
    read_checkpoint,
    save_checkpoint,
    unpacked,
)
from dp_ilg.training.loop.state import PrivateState
from dp_ilg.training.run_secret import RunSecret


class Place(NamedTuple):
    """What is saved beside the arrays of a state.

    Attributes:
        plan: digest of the plan.
        program: digest of the compiled step; "" before the first lot.
        data: digest of the data; "" before the first lot.
        trail: digest of what the next step is released from; "" before the first lot.
        secret: of the run, in hexadecimal.
        fixed: whether that came from a seed.

    Privacy:
        As secret as the keys.
    """

    plan: str
    program: str
    data: str
    trail: str
    secret: str
    fixed: bool

    def __repr__(self) -> str:
        return f"Place(plan={self.plan!r}, secret=<hidden>)"


def tree_of(state: PrivateState) -> Any:
    """The arrays of a state, in the order in which they are saved."""
    return state.params, state.opt_state, state.step


def save(folder: Any, step: int, tree: Any, place: Place) -> Path:
    """Writes a state into a folder, whole or not at all.

    Args:
        folder: of the saved states; made for its owner only if absent.
        step: steps taken.
        tree: of `tree_of`, on one device.
        place: what belongs to it.

    Returns:
        The folder of this state.

    Raises:
        OSError: if it cannot be written.
    """
    return save_checkpoint(Path(folder), step, tree, place._asdict())


def load(folder: Any, like: PrivateState) -> tuple[int, Any, Place]:
    """Reads the newest state of a folder.

    Args:
        folder: of the saved states.
        like: a state of the same run, for the structure.

    Returns:
        Steps taken, the arrays as `tree_of` has them, and what belongs to them.

    Raises:
        ValueError: if there is none, it is damaged, or it is of another model.
    """
    return _of(*read_checkpoint(Path(folder)), like)


def _of(step: int, leaves: Any, facts: Any, like: PrivateState) -> Any:
    try:
        place = Place(**facts)
    except TypeError as error:
        raise ValueError(
            "What was saved is no state of private_training; restore it with what "
            "saved it."
        ) from error
    check_place(place, like.origin.plan)
    return step, filled(tree_of(like), leaves), place


def check_place(place: Place, plan: str) -> None:
    """Raises for a state of another plan."""
    if place.plan != plan:
        raise ValueError(
            f"The saved state is of another plan ({place.plan}, not {plan}); make "
            "private_training with the plan it was saved under."
        )


def check_secret(place: Place, own: RunSecret, charged: int) -> RunSecret:
    """The secret to go on with: the saved one.

    Args:
        place: of the saved state.
        own: of the run that restores.
        charged: lots that this run has handed out.

    Returns:
        The saved secret.

    Raises:
        ValueError: if the run has another fixed seed, or has begun under its own.
    """
    saved = RunSecret.from_hex(place.secret, place.fixed)
    if not own.same(saved) and (own.fixed or charged):
        why = "was given another seed" if own.fixed else "has handed out lots"
        raise ValueError(
            f"The saved state has another key than this run, which {why}; make "
            "private_training with seed=None, and the saved key is used."
        )
    return saved


def register_with_flax() -> None:
    """Lets ``flax.serialization`` take a `PrivateState`, once a program imports it."""
    serialization = sys.modules.get("flax.serialization")
    if serialization is None or PrivateState in serialization._STATE_DICT_REGISTRY:
        return
    serialization.register_serialization_state(
        PrivateState, _to_state_dict, _from_state_dict
    )


def _to_state_dict(state: PrivateState) -> dict[str, Any]:
    step, tree, place = state.origin.run._saved(state)
    found = packed(step, tree, place._asdict())
    facts = {"json": json.dumps(place._asdict(), sort_keys=True), "step": step}
    return {"leaves": found["leaves"], "facts": facts, "digest": found["digest"]}


def _from_state_dict(target: PrivateState, saved: dict[str, Any]) -> PrivateState:
    try:
        facts = np.frombuffer(saved["facts"]["json"].encode(), np.uint8)
        whole = {**saved, "facts": {"json": facts, "step": saved["facts"]["step"]}}
        found = unpacked(whole)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            "These bytes are not a saved PrivateState, or are damaged; read what "
            "flax.serialization.to_bytes wrote of one."
        ) from error
    return target.origin.run._went_on(*_of(*found, target))
