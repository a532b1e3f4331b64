"""Lots: the examples of one step, sealed, and charged before they are handed out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

from dp_ilg.noise.repeats import next_digest

_WHY = (
    "A lot holds the private examples of one step and goes into train.step whole; "
    "what depends on them belongs into the loss, where it is clipped."
)


class Lot:
    """The examples of one step: sealed, and taken by ``train.step`` alone, once.

    It is no array and no tree of arrays. Sizes and rows stay inside: how many examples
    were drawn is as private as which.

    Privacy:
        Its step was charged before it was handed out, whether or not it is taken.

    Example:
        >>> lot = Lot(3, None, iter([]), lambda: None)
        >>> lot
        Lot(step=3, rows=<private>)
        >>> len(lot)
        Traceback (most recent call last):
        TypeError: A lot holds the private examples of one step and goes into ...
    """

    __slots__ = ("_step", "_owner", "_chunks", "_noise")

    def __init__(
        self, step: int, owner: Any, chunks: Any, noise: Callable[[], Any]
    ) -> None:
        """Takes the step, whose it is, its chunks, and what draws its noise."""
        self._step, self._owner = step, owner
        self._chunks, self._noise = chunks, noise

    @property
    def step(self) -> int:
        """The step it is for, from 0."""
        return self._step

    def __repr__(self) -> str:
        return f"Lot(step={self.step}, rows=<private>)"

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(_WHY)

    __len__ = __iter__ = __getitem__ = __array__ = _refuse
    __add__ = __mul__ = __truediv__ = __reduce_ex__ = _refuse
    __copy__ = __deepcopy__ = _refuse
    __jax_array__ = property(_refuse)  # JAX looks for it, and must not go on without

    def _owned_by(self, owner: Any) -> bool:
        return self._owner is owner

    def _taken(self) -> bool:
        return self._chunks is None

    def _take(self) -> tuple[Any, Any]:
        """Chunks and noise; they are here no more afterwards."""
        chunks, self._chunks = self._chunks, None
        return chunks, self._noise()

    def _settle(self) -> None:
        """Reads the chunks that have not been read yet, before the next lot is."""
        if self._chunks is not None and not isinstance(self._chunks, list):
            self._chunks = list(self._chunks)


class Supply(NamedTuple):
    """What lots are made of and written down by.

    Attributes:
        chunks: a step -> its chunks, as `dp_ilg.training.feeds.Feed.chunks`.
        charge: writes a step and the digest of what it is released from down.
        noise: a step -> its noise, where the host draws that; else None.
        close: lets go of all of it.
    """

    chunks: Callable[[int], Any]
    charge: Callable[[int, str], None]
    noise: Callable[[int], Any]
    close: Callable[[], None]


class Lots:
    """Hands out the lots of a run, each charged first; what ``train.batches`` returns.

    Iterate over it, or use it as a context manager. Leaving the loop closes feed and
    ledger.

    Privacy:
        A lot is written into the ledger, with a digest of what its step is released
        from, and synced to the disk before it is handed out.

    Example:
        >>> nothing = Supply(lambda t: [], lambda t, d: None, lambda t: None, print)
        >>> [lot.step for lot in Lots(None, range(2), "0" * 64, nothing)]
        <BLANKLINE>
        [0, 1]
    """

    def __init__(self, owner: Any, steps: range, trail: str, supply: Supply) -> None:
        """Takes the run, its steps, what the first is released from, and the supply."""
        self._owner, self._left, self._trail = owner, iter(steps), trail
        self._supply: Supply | None = supply
        self._last: Lot | None = None

    def __iter__(self) -> Iterator[Lot]:
        return self

    def __next__(self) -> Lot:
        if self._last is not None:
            self._last._settle()
        step, supply = next(self._left, None), self._supply
        if step is None or supply is None:
            self.close()
            raise StopIteration
        chunks = supply.chunks(step)
        supply.charge(step, self._trail)
        self._trail = next_digest(self._trail)
        self._last = Lot(step, self._owner, chunks, lambda: supply.noise(step))
        return self._last

    def close(self) -> None:
        """Lets go of feed and ledger; closing twice is harmless."""
        supply, self._supply = self._supply, None
        if supply is not None:
            supply.close()

    def __enter__(self) -> Lots:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def __del__(self) -> None:
        if not sys.is_finalizing():  # or half of Python is gone
            self.close()
