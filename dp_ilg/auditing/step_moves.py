"""What the worlds of a step show: how far an example moves it, what noise covers it.

A part of the state that is *a sum plus noise* moves by the same amount under every key
when an example joins. There sensitivity is read off exactly, and only the size of the
noise is measured. What Adam makes of such a part moves otherwise, and is left alone.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

import numpy as np

from dp_ilg.auditing.step_worlds import Worlds

_PILOTS = 16  # keys under which an example's effect is looked at
_SAME = 0.02  # relative difference that is still taken for none
_EXACT = 1e-3  # relative to what one number explains
_READABLE = 10.0  # a smaller effect, in what rounding may change, is not measured
_ROUNDINGS = 8.0  # roundings of a number of the state
KINDS = ("still", "bare", "sum", "scaled", "derived")


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of the state, and how it answers when an example joins.

    Attributes:
        name: where it is in the state.
        kind: "still" (no example moves it), "bare" (an example moves it, and there is
            no noise), "sum" (a sum plus noise), "scaled" (the noise itself changes with
            the batch) or "derived" (anything else, such as Adam's direction).
        floor: what rounding may change in an entry.
    """

    name: str
    kind: str
    floor: float


def kind_of(gaps: list[np.ndarray], base: np.ndarray, floor: float) -> str:
    """How a part answers, from a few keys.

    Args:
        gaps: with less without an example, ``[keys, ...]``, one a canary.
        base: without, ``[keys, ...]``.
        floor: what rounding may change in an entry.

    Returns:
        One of `KINDS`.

    Example:
        >>> noise = np.random.default_rng(0).normal(size=(4, 10))
        >>> kind_of([np.ones((4, 10))], noise, 1e-6)
        'sum'
        >>> kind_of([0.5 * noise], noise, 1e-6), kind_of([noise**3], noise, 1e-6)
        ('scaled', 'derived')
    """
    moved = [gap for gap in gaps if np.max(np.abs(gap), initial=0) > floor]
    if not moved:
        return "still"
    noise = base - base.mean(0)
    if np.max(np.abs(noise), initial=0) <= floor:
        return "bare"
    kinds = {_one_kind(gap, noise, floor) for gap in moved} - {"faint"}
    return max(kinds or {"derived"}, key=("sum", "scaled", "derived").index)


def _one_kind(gap: np.ndarray, noise: np.ndarray, floor: float) -> str:
    mean = gap.mean(0)
    rest = gap - mean
    if rms(rest) <= max(_SAME * rms(mean), floor):
        return "sum" if rms(mean) > _READABLE * floor else "faint"
    slope = np.sum(rest * noise) / np.sum(noise**2)
    off = rms(rest - slope * noise)
    return "scaled" if off <= max(_EXACT * rms(rest), floor) else "derived"


def rms(values: Any) -> float:
    """The root mean square of an array; 0 of none.

    Example:
        >>> rms(np.array([3.0, -3.0]))
        3.0
    """
    return float(np.sqrt(np.mean(np.square(values)))) if np.size(values) else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Moves:
    """What one example does to a step, with the randomness held fixed.

    Attributes:
        worlds: of the step.
        numbers: of the keys that are looked at.
    """

    worlds: Worlds
    numbers: range = range(_PILOTS)

    @cached_property
    def base(self) -> list[np.ndarray]:
        """What is seen without a canary."""
        return self.worlds.outputs(self.numbers, *self.worlds.scene.batch(None))

    @cached_property
    def floors(self) -> list[float]:
        """What rounding may change in an entry of each part; 0 for whole numbers."""
        found = []
        for start, after in zip(self.worlds.before, self.base, strict=True):
            if not np.issubdtype(after.dtype, np.floating):
                found.append(0.0)
                continue
            unit = 2.0**-8 if start.dtype.name == "bfloat16" else 2.0**-24
            if start.dtype.name == "float16":
                unit = 2.0**-11
            largest = max(
                np.max(np.abs(np.nan_to_num(x.astype(np.float64))), initial=0)
                for x in (start, after)
            )
            found.append(_ROUNDINGS * unit * float(largest))
        return found

    def gaps(self, canary: str, crowd: str = "all") -> list[np.ndarray]:
        """With less without a canary, under the same keys.

        Args:
            canary: its name.
            crowd: who else is there.

        Returns:
            ``[keys, ...]`` of each part, float64.
        """
        scene = self.worlds.scene
        there = self.worlds.outputs(self.numbers, *scene.batch(canary, crowd))
        base = self.base
        if crowd != "all":
            base = self.worlds.outputs(self.numbers, *scene.batch(None, crowd))
        return [_minus(a, b) for a, b in zip(there, base, strict=True)]

    @cached_property
    def by_canary(self) -> dict[str, list[np.ndarray]]:
        """The gaps of every canary for which they are numbers."""
        found = {name: self.gaps(name) for name in self.worlds.scene.canaries}
        return {
            name: gaps
            for name, gaps in found.items()
            if all(np.all(np.isfinite(x)) for x in gaps)
        }

    @cached_property
    def poisoned(self) -> list[str]:
        """The canaries that make something NaN or infinite."""
        return sorted(set(self.worlds.scene.canaries) - set(self.by_canary))

    @cached_property
    def parts(self) -> list[Part]:
        """Every part and its kind."""
        found = []
        facts = zip(self.worlds.names, self.floors, self.base, strict=True)
        for k, (name, floor, base) in enumerate(facts):
            gaps = [gaps[k] for gaps in self.by_canary.values()]
            wide = np.nan_to_num(base.astype(np.float64))
            found.append(Part(name, kind_of(gaps, wide, floor), floor))
        return found

    def places(self, kind: str) -> list[int]:
        """Which parts are of a kind."""
        return [k for k, part in enumerate(self.parts) if part.kind == kind]

    @cached_property
    def sums(self) -> list[int]:
        """The parts that are a sum plus noise, each once.

        Parameters after plain SGD and their momentum are one release twice; counted
        twice, they would show more than they do.
        """
        kept: list[int] = []
        for k in self.places("sum"):
            if not any(self._copies(j, k) for j in kept):
                kept.append(k)
        return kept

    def _copies(self, one: int, other: int) -> bool:
        """Whether two parts are multiples of each other, noise and examples alike."""
        first, second = (self.base[k] for k in (one, other))
        if first.shape != second.shape:
            return False
        slope = shared_noise(first, second)
        if slope is None:
            return False
        gaps = [(gaps[one], gaps[other]) for gaps in self.by_canary.values()]
        floor = self.floors[other] + abs(slope) * self.floors[one]
        return all(
            rms((b - slope * a).mean(0)) <= max(_SAME * rms(b.mean(0)), floor)
            for a, b in gaps
        )

    @cached_property
    def moved(self) -> dict[str, dict[int, np.ndarray]]:
        """How far each canary moves each such part."""
        return {
            name: {k: gaps[k].mean(0) for k in self.sums}
            for name, gaps in self.by_canary.items()
        }


def _minus(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.asarray(one, np.float64) - np.asarray(other, np.float64)


def shared_noise(one: np.ndarray, other: np.ndarray) -> float | None:
    """Whether two arrays of draws are multiples of each other.

    Args:
        one: ``[keys, ...]``.
        other: of the same shape.

    Returns:
        The multiple, or None where they are not.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(4, 10))
        >>> round(shared_noise(draws, 3 * draws), 6), shared_noise(draws, draws[::-1])
        (3.0, None)
    """
    a, b = (x - x.mean(0) for x in (one.astype(float), other.astype(float)))
    energy, theirs = float(np.sum(a * a)), float(np.sum(b * b))
    if not (energy > 0 and theirs > 0):
        return None
    cross = float(np.sum(a * b))
    return cross / energy if cross**2 > 0.98 * energy * theirs else None
