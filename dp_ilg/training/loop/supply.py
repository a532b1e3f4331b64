"""What lots are made of: a feed, the noise that the host draws, and the ledger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dp_ilg.accounting.ledger import PrivacyLedger
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.training.draws_ahead import DrawsAhead
from dp_ilg.training.environment import code_digest
from dp_ilg.training.feeds import Feed
from dp_ilg.training.loop.binding import Binding
from dp_ilg.training.loop.lot_digest import marking, read_lot
from dp_ilg.training.loop.lots import Supply


def supply_of(
    binding: Binding,
    ledger: PrivacyLedger | None,
    steps: range,
    ahead: int,
    told: Callable[[int], None],
) -> Supply:
    """Feed, noise and ledger of the lots that are left.

    Args:
        binding: the run, bound to its data.
        ledger: charges every step, or None.
        steps: which steps are left.
        ahead: chunks gathered while a step runs.
        told: called with every step that was charged.

    Returns:
        The `Supply`; its `close` lets go of all three.

    Privacy:
        A step is charged with a digest of what it is released from, of the code that
        rounds it and of the rows that were read, so that it can be repeated only as it
        was.
    """
    feed = Feed(
        binding.rows,
        binding.sampler,
        first=steps.start,
        ahead=ahead,
        place=marking(binding.place),
    )
    seen: dict[int, str] = {}
    noise = _Noise(binding.draws, steps.stop)
    code = code_digest()

    def chunks(step: int) -> Any:
        found, seen[step] = read_lot(feed, binding, step)
        return found

    def charge(step: int, trail: str) -> None:
        rows = seen.pop(step)
        if ledger is not None:
            ledger.record(step, released_from=f"{trail} {code} {rows}")
        told(step)

    def close() -> None:
        feed.close()
        noise.close()
        if ledger is not None:
            ledger.close()

    return Supply(chunks, charge, noise, close)


def open_ledger(
    path: Any, plan: PrivacyPlan, key: Any, taken: int | None
) -> PrivacyLedger:
    """Opens a run's ledger; its folder is made, for its owner only, if absent.

    Args:
        path: the file.
        plan: of the run.
        key: of the ledger; secret.
        taken: steps that the run has taken before, None for a run that begins.

    Returns:
        The ledger, locked until it is closed.

    Raises:
        ValueError: if it has steps and the run begins, if it has fewer than the run has
            taken, and as `PrivacyLedger`.
        OSError: if it cannot be written.
    """
    Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = PrivacyLedger(path, plan, key=key, resume=taken is not None)
    steps = found.steps
    if taken is not None and steps < taken:
        found.close()
        raise ValueError(
            f"The ledger {path} has {steps} steps, but the run has taken {taken}; pass "
            "the ledger it was begun with."
        )
    return found


class _Noise:
    """The host's draws of a step, where there are any; the next one's ahead."""

    def __init__(self, draws: Callable[[int], Any] | None, steps: int):
        self._draws = draws
        self._ahead = None if draws is None else DrawsAhead(draws, steps)

    def __call__(self, step: int) -> Any:
        if self._draws is None:
            return None
        return self._draws(step) if self._ahead is None else self._ahead.of(step)

    def close(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.__exit__()
