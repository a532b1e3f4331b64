"""Coordinates in which a gradient is clipped: a public centre and scale an entry.

A `dp_ilg.Geometry` weighs groups; with `Coordinates` it also weighs single entries.
Per-example gradients are clipped and noised as ``(g - a) / b``, and the release is
``a + b * mean``. Both come from earlier releases, so the guarantee does not change; and
because they travel inside the geometry, clip and noise cannot disagree (law: one
geometry).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dp_ilg.geometry.groups import Groups, check_batch_axis


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coordinates:
    """Scale b and centre a of every parameter, as functions of earlier releases.

    Attributes:
        scale: positive arrays, one a leaf of the parameters and of its shape, in
            float32 or wider.
        centre: the same for a, or None for 0.

    Privacy: public facts and earlier releases only. The release estimates the mean
    gradient: its expectation over the Poisson sample is that of the clipped
    gradients' mean, because the expected sample has ``batch_size`` examples. Given
    the drawn size n, which stays secret, the part ``a (1 - n / batch_size)`` remains,
    and an empty batch releases a plus noise.

    Example:
        >>> import jax.numpy as jnp
        >>> coordinates = Coordinates((jnp.array([2.0, 4.0]),), (jnp.ones(2),))
        >>> inside = coordinates.entered([jnp.array([[5.0, 5.0]])])
        >>> inside[0].tolist(), coordinates.restored([inside[0][0]])[0].tolist()
        ([[2.0, 1.0]], [5.0, 5.0])

    Reference: Pichapati et al. 2019 (AdaCliP), Algorithm 1.
    """

    scale: Any
    centre: Any = None
    whitened: ClassVar[bool] = False

    def entered(self, leaves: Sequence[Any]) -> list[Array]:
        """Per-example gradients, or one gradient, in these coordinates."""
        return [self.entered_leaf(k, x) for k, x in enumerate(leaves)]

    def entered_leaf(self, index: int, value: Any) -> Array:
        """The same of one leaf."""
        scale = self.scale[index]
        wide = jnp.asarray(value).astype(scale.dtype)
        if self.centre is not None:
            wide = wide - self.centre[index]
        return wide / scale

    def axis_kinds(self) -> list[None]:
        """None for each leaf: its map is none by axes."""
        return [None] * len(self.scale)

    def restored(self, leaves: Sequence[Array]) -> list[Array]:
        """A released mean in these coordinates, as an ordinary gradient."""
        plain = [x * b for x, b in zip(leaves, self.scale, strict=True)]
        if self.centre is None:
            return plain
        return [x + a for x, a in zip(plain, self.centre, strict=True)]

    def noise_squares(self, groups: Groups) -> Float[Array, " groups"]:
        """Mean square of the noise of each group on the release, at weights 1."""
        squares = jnp.square(groups.norms(self.scale))
        return squares / jnp.array(groups.sizes, float)

    def check(self, groups: Groups) -> None:
        """Raises unless there is a scale of every leaf, in its shape."""
        groups.check(self.scale)


def enter_gradients(coordinates: Any, gradients: Any, groups: Groups) -> Any:
    """Per-example gradients, a tree with leading batch axes, in the coordinates.

    Args:
        coordinates: scale and centre.
        gradients: like the parameters, each leaf with a leading batch axis.
        groups: the groups of the parameters.

    Returns:
        The same tree in float32 or wider.

    Raises:
        ValueError: where a leaf has no batch axis or batch axes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from dp_ilg.geometry.layers import group
        >>> half = Coordinates((jnp.full(2, 2.0),))
        >>> groups = group({"w": jnp.ones(2)})
        >>> enter_gradients(half, {"w": jnp.ones((1, 2))}, groups)["w"].tolist()
        [[0.5, 0.5]]
    """
    leaves, treedef = jax.tree.flatten(gradients)
    check_batch_axis(leaves, groups)
    return jax.tree.unflatten(treedef, coordinates.entered(leaves))
