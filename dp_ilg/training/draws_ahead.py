"""Noise that the host draws for the next step while this one runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class DrawsAhead:
    """Hands out the draws of each step, with the next one's already begun.

    Args:
        draws: a step -> its draws, such as `dp_ilg.noise.exact.ExactNoise.draws`.
        steps: the number of steps; none beyond it is drawn.

    Privacy:
        The draws are as secret as the key. At most two steps' are held.

    Example:
        >>> with DrawsAhead(lambda step: step * 10, 3) as ahead:
        ...     [ahead.of(step) for step in range(3)]
        [0, 10, 20]
    """

    def __init__(self, draws: Callable[[int], Any], steps: int):
        """Starts a thread, which draws nothing yet."""
        self._draws, self._steps = draws, steps
        self._next: tuple[int, Future] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dp_ilg-noise")

    def of(self, step: int) -> Any:
        """The draws of a step.

        Args:
            step: which; the one after it is begun.

        Returns:
            What the function gives.

        Example:
            >>> with DrawsAhead(str, 9) as ahead:
            ...     ahead.of(7)
            '7'
        """
        begun, self._next = self._next, None
        fits = begun is not None and begun[0] == step
        found = begun[1].result() if begun is not None and fits else self._draws(step)
        if step + 1 < self._steps:
            self._next = step + 1, self._pool.submit(self._draws, step + 1)
        return found

    def __enter__(self) -> DrawsAhead:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
