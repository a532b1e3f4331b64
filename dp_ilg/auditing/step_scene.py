"""The batches of an audit: an example in several loudnesses, others beside it.

Worlds with and without an example are batches of one shape: only the mask differs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_EMPTY = "empty"  # a crowd of masked rows


@dataclasses.dataclass(frozen=True)
class Scene:
    """The batches of an audit: others, a place for a canary, and a spare masked row.

    Attributes:
        canaries: examples without batch axis, by name.
        others: examples with a leading axis.
        masked: whether the step takes a mask; without one, rows are left out.
    """

    canaries: dict[str, Any]
    others: Any
    masked: bool

    def batch(
        self, canary: str | None, crowd: str = "all", spare: str | None = None
    ) -> tuple[Any, np.ndarray]:
        """A batch and its mask.

        Args:
            canary: who joins, by name; None for nobody.
            crowd: "all" others, "changed" (half of them masked, the rest scaled) or
                "empty" (all masked).
            spare: what stands in the row that is masked always.

        Returns:
            Rows and ``is_padding_example``.
        """
        others, count = self.others, len(jax.tree.leaves(self.others)[0])
        absent = np.zeros(count, bool)
        if crowd == "changed":
            others, absent[: (count + 1) // 2] = scaled(others, 0.5), True
        if crowd == _EMPTY:
            absent[:] = True
        first = jax.tree.map(lambda x: x[0], others)
        rows = [self.canaries[name] if name else first for name in (canary, spare)]
        mask = np.concatenate([absent, [canary is None, True]])
        batch = jax.tree.map(
            lambda x, *more: np.concatenate([x, *[np.asarray(r)[None] for r in more]]),
            others,
            *rows,
        )
        if self.masked:
            return batch, mask
        return jax.tree.map(lambda x: x[~mask], batch), mask[~mask]


def scaled(tree: Any, factor: Any) -> Any:
    """Floating-point leaves times a factor; labels and ids as they are.

    Example:
        >>> scaled({"x": np.float32(2), "y": np.int32(1)}, 3)["x"].item()
        6.0
    """

    def one(x: Any) -> np.ndarray:
        x = np.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return np.asarray(x * np.asarray(factor, np.float32)).astype(x.dtype)

    return jax.tree.map(one, tree)


LOUDNESS = {
    "as it is": 1.0,
    "times 30": 30.0,
    "times -30": -30.0,
    "times 1000": 1000.0,
    "times -1000": -1000.0,
}


def scene_of(example: Any, others: Any, masked: bool, seed: int) -> Scene:
    """The canaries that one example gives, and who stands beside them.

    Args:
        example: without batch axis.
        others: with one, or None for four made of the example, its floating-point
            entries times uniform numbers between -2 and 2.
        masked: whether the step takes a mask.
        seed: of those numbers.

    Returns:
        The scene.

    Raises:
        ValueError: for an example without arrays, or others of another form.

    Example:
        >>> scene = scene_of(np.ones(3, "float32"), None, True, 0)
        >>> batch, mask = scene.batch("as it is")
        >>> batch.shape, mask.tolist()
        ((6, 3), [False, False, False, False, False, True])
    """
    example = jax.tree.map(np.asarray, example)
    leaves = jax.tree.leaves(example)
    if not leaves:
        raise ValueError(
            "example has no arrays; give one example, as the loss sees it."
        )
    if others is None:
        rng = np.random.default_rng(seed)
        made = [
            jax.tree.map(lambda x: scaled(x, rng.uniform(-2, 2, x.shape)), example)
            for _ in range(4)
        ]
        others = jax.tree.map(lambda *x: np.stack(x), *made)
    others = jax.tree.map(np.asarray, others)
    _check_others(example, others)
    loud = any(jnp.issubdtype(x.dtype, jnp.floating) for x in leaves)
    names = LOUDNESS if loud else {"as it is": 1.0}
    canaries = {name: scaled(example, factor) for name, factor in names.items()}
    return Scene(canaries, others, masked)


def _check_others(example: Any, others: Any) -> None:
    if jax.tree.structure(example) != jax.tree.structure(others):
        raise ValueError(
            f"others is {jax.tree.structure(others)}, but the example is "
            f"{jax.tree.structure(example)}; give examples of one form, stacked."
        )
    pairs = zip(jax.tree.leaves(example), jax.tree.leaves(others), strict=True)
    for one, many in pairs:
        if many.ndim == 0 or many.shape[1:] != one.shape or not len(many):
            raise ValueError(
                f"others has a leaf of shape {many.shape}, but the example's is "
                f"{one.shape}; give it without batch axis, and others with one."
            )
