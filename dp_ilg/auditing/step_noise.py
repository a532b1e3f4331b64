"""The noise of a step, and how well it covers what an example moves."""

from __future__ import annotations

import dataclasses
from functools import cached_property

import numpy as np

from dp_ilg.auditing import step_mixing
from dp_ilg.auditing.step_moves import Moves

_SAMPLED = 4096  # entries of a part whose noise is kept


@dataclasses.dataclass(frozen=True, eq=False)
class NoiseSeen:
    """The noise of every part that is a sum, from many keys and one batch.

    Attributes:
        moves: tells the parts.
        numbers: of the keys.
    """

    moves: Moves
    numbers: range

    @cached_property
    def _gathered(self) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """Variances by entry, and draws of some entries, by part."""
        worlds, sums = self.moves.worlds, self.moves.sums
        center = {k: self.moves.base[k].mean(0) for k in sums}
        total = {k: np.zeros(center[k].shape) for k in sums}
        squares = {k: np.zeros(center[k].shape) for k in sums}
        kept: dict[int, list[np.ndarray]] = {k: [] for k in sums}
        for block in worlds.blocks(self.numbers, *worlds.scene.batch(None)):
            for k in sums:
                off = block[k] - center[k]
                total[k] += off.sum(0)
                squares[k] += np.square(off).sum(0)
                kept[k].append(off.reshape(len(off), -1)[:, :_SAMPLED])
        count = len(self.numbers)
        variances = {
            k: np.maximum(squares[k] - total[k] ** 2 / count, 0) / (count - 1)
            for k in sums
        }
        return variances, {k: np.concatenate(x) for k, x in kept.items()}

    @property
    def draws(self) -> dict[int, np.ndarray]:
        """``[keys, entries]`` of some entries of each part, before whitening."""
        return self._gathered[1]

    @cached_property
    def variances(self) -> dict[int, np.ndarray]:
        """Of each part by entry; pooled where all entries have the same."""
        raw = self._gathered[0]
        return {
            k: x if self.uneven[k] else np.full(x.shape, x.mean())
            for k, x in raw.items()
        }

    @cached_property
    def uneven(self) -> dict[int, bool]:
        """Whether a part's entries have different noise, as blocks of a leaf have."""
        found, spread = {}, 2 / (len(self.numbers) - 1)
        for k, values in self._gathered[0].items():
            mean = values.mean() if values.size else 0.0
            off = np.mean(np.square(values / mean - 1)) if mean > 0 else 0.0
            error = spread * np.sqrt(2 / max(1, values.size))
            found[k] = bool(off > spread + 8 * error + 0.3 * spread)
        return found

    @cached_property
    def mixed(self) -> dict[int, bool]:
        """The parts whose entries have correlated noise: can its covariance be read."""
        return {
            k: step_mixing.is_readable(draws, self.variances[k].size)
            for k, draws in self.draws.items()
            if step_mixing.is_mixed(draws)
        }

    def covered(self, canary: str) -> tuple[float, float]:
        """How far a canary is, in standard deviations of the noise, all parts together.

        Args:
            canary: its name.

        Returns:
            The distance (infinite where an entry it moves has no noise), and its
            relative standard error.
        """
        square, error, keys = 0.0, 0.0, len(self.numbers) - 1
        terms: list[tuple[float, float]] = []
        for k, moved in self.moves.moved[canary].items():
            floor = self.moves.parts[k].floor
            real = np.where(np.abs(moved) > floor, moved, 0.0)
            if self.mixed.get(k):
                inner = np.sum(real * step_mixing.solved(self.draws[k], real))
                terms.append((float(inner), keys - moved.size + 1))
                continue
            own = np.square(real)
            ratio = np.divide(
                own, self.variances[k], out=np.zeros_like(own), where=own > 0
            )
            if self.uneven[k]:
                ratio = ratio * (keys - 2) / keys
                terms += [(float(x), keys) for x in ratio.ravel() if x > 0]
            else:
                terms.append((float(ratio.sum()), keys * moved.size))
        square = sum(x for x, _ in terms)
        if not np.isfinite(square):
            return float("inf"), 0.0
        if square > 0:
            error = np.sqrt(sum((x / square) ** 2 / (2 * n) for x, n in terms))
        return float(np.sqrt(square)), float(error)

    @cached_property
    def strongest(self) -> str:
        """The canary that is farthest."""
        return max(self.moves.moved, key=lambda name: self.covered(name)[0])

    def direction(self) -> dict[int, np.ndarray]:
        """Weights by which releases are added up to see the strongest canary best."""
        found = {}
        for k, moved in self.moves.moved[self.strongest].items():
            if self.mixed.get(k):
                found[k] = np.nan_to_num(step_mixing.solved(self.draws[k], moved))
                continue
            least = max(self.moves.parts[k].floor ** 2, np.finfo(float).tiny)
            found[k] = moved / np.maximum(self.variances[k], least)
        return found

    def scores(self, numbers: range, canary: str | None) -> np.ndarray:
        """One number a key: the release along `direction`.

        Args:
            numbers: of keys that were not looked at before.
            canary: who is in the batch.

        Returns:
            ``[keys]``.
        """
        worlds, weights = self.moves.worlds, self.direction()
        center = {k: self.moves.base[k].mean(0) for k in weights}
        found = [
            sum(
                np.tensordot(block[k] - center[k], weights[k], weights[k].ndim)
                for k in weights
            )
            for block in worlds.blocks(numbers, *worlds.scene.batch(canary))
        ]
        return np.concatenate(found) if weights else np.zeros(len(numbers))
