"""The geometry of a step: one positive weight a group, and the norm they make.

``||g||_w = sqrt(sum_j ||g^j||^2 / w_j^2)``. Clipping in this norm and adding noise
of standard deviation ``sigma C w_j`` in group j is one Gaussian mechanism with
multiplier sigma whatever the weights (docs/idea.md), as long as they come
from public facts and earlier releases only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dp_ilg.base import PyTree, own_promotion
from dp_ilg.geometry import grid
from dp_ilg.geometry.facts import ClipFacts, joined_facts
from dp_ilg.geometry.groups import Groups, weighted_norm
from dp_ilg.geometry.layers import group
from dp_ilg.validation import shown

LARGEST_RATIO = 1e4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Geometry:
    """Weights of the groups, and which groups they are.

    Attributes:
        weights: positive float32 ``[groups]``; exactly 0 for a dropped group, where
            `drops` is True.
        groups: static facts, part of the tree structure.
        coordinates: None, or in which coordinates the norm is taken: one linear map a
            leaf, `dp_ilg.geometry.maps.AxisMaps`, or a scale and centre an entry,
            `dp_ilg.geometry.coordinates.Coordinates`.
        facts: None, or the `dp_ilg.geometry.facts.ClipFacts` of the chain, or of the
            clip, that this geometry comes from.
        release: None, or the last released gradient, where the chain's score reads it.
        drops: whether a weight of 0 means that the group is dropped for this step: its
            gradients are left out of norm and sum, and what is released of it is
            exactly 0, without noise. Where this is False, a weight of 0 is a mistake
            and releases NaN. Static.

    Privacy: all must be functions of public facts and of earlier releases;
    then any step clipped and noised in them has the guarantee of its noise
    multiplier, for adding or removing one example.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": jnp.ones(3), "b": jnp.ones(4)}
        >>> geometry = Geometry.of(params, {"a": 1.0, "b": 2.0})
        >>> geometry.groups.names, geometry.weights.tolist()
        (('a', 'b'), [1.0, 2.0])
        >>> float(geometry.norm(jnp.array([3.0, 8.0])))
        5.0

    Reference: the lemma of Li et al. 2024 (section 4) for fixed thresholds, here
    with thresholds that are released before they are used.
    """

    weights: Any
    groups: Groups = dataclasses.field(metadata={"static": True})
    coordinates: Any = None
    facts: Any = None  # `ClipFacts`; tools that map over fields put their own there
    release: Any = None
    drops: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def uniform(cls, params: PyTree, layers: Any = "module") -> Geometry:
        """All weights 1: the ordinary L2 norm, that is, DP-SGD and DP-Adam.

        Args:
            params: the parameter tree.
            layers: how to group it, see `dp_ilg.layers`.

        Returns:
            The geometry.
        """
        groups = group(params, layers)
        return cls(jnp.ones(len(groups.names), jnp.float32), groups)

    @classmethod
    def given(cls, params: PyTree, layers: Any) -> Geometry:
        """`layers` itself where it is a geometry, else all weights 1 in its groups."""
        return layers if isinstance(layers, cls) else cls.uniform(params, layers)

    @classmethod
    def of(cls, params: PyTree, weights: Any, layers: Any = "module") -> Geometry:
        """Public constants as weights.

        Args:
            params: the parameter tree.
            weights: a mapping from group name to weight, or one number a group.
            layers: how to group it, see `dp_ilg.layers`.

        Returns:
            The geometry.

        Raises:
            ValueError: unless there is one positive finite weight for each group.
        """
        groups = group(params, layers)
        return cls(public_values("weights", weights, groups), groups)

    @own_promotion
    def norm(self, norms: Float[Array, "... groups"]) -> Float[Array, "..."]:
        """The geometry's norm of a gradient whose groups have these L2 norms."""
        return weighted_norm(self.seen(norms), self.divisors())

    def kept(self) -> Any:
        """Which groups take part, bool ``[groups]``; None where none can be dropped.

        Where all weights are 0, none is dropped: that is no choice of a rule but a
        state of zeros, say, and releases NaN as anywhere.
        """
        if not self.drops:
            return None
        positive = self.weights != 0
        return positive | ~jnp.any(positive)

    def divisors(self) -> Any:
        """What norms are divided by: the weights, and 1 for a dropped group."""
        return jnp.where(self.kept(), self.weights, 1) if self.drops else self.weights

    def seen(self, norms: Float[Array, "... groups"]) -> Float[Array, "... groups"]:
        """L2 norms of an example's groups, 0 for the dropped ones."""
        return jnp.where(self.kept(), norms, 0) if self.drops else norms

    def of_kept(self, leaves: list[Array]) -> list[Array]:
        """Leaves shaped like the parameters, exactly 0 in dropped groups.

        Whatever stands there is replaced, NaN among it.
        """
        if not self.drops:
            return leaves
        pairs = zip(leaves, self.kept_leaves(), strict=True)
        return [jnp.where(kept, x, jnp.zeros_like(x)) for x, kept in pairs]

    def kept_leaves(self) -> list[Array]:
        """Where each leaf is kept, bool and broadcastable; False where it is frozen."""
        there: Any = self.kept()
        return [x > 0 for x in self.groups.expand(there.astype(jnp.float32))]

    def saying(self, facts: ClipFacts | None) -> Geometry:
        """The same geometry with these facts, and its own where they say nothing."""
        return dataclasses.replace(self, facts=joined_facts([facts, self.facts]))

    def forgetting(self) -> Geometry:
        """The same geometry without the last release, which only a clip reads."""
        return dataclasses.replace(self, release=None)

    def joined(self, one: Any, other: Any) -> dict[str, Any]:
        """Two `dp_ilg.ClippedGrad` of this geometry, added exactly, field by field."""
        return grid.joined(one, other)

    def restored(self, leaves: list[Array]) -> list[Array]:
        """A released mean, given its leaves, out of the geometry's coordinates."""
        if self.coordinates is None:
            return leaves
        return self.of_kept(self.coordinates.restored(leaves))

    def unrestored(self, leaves: list[Array]) -> list[Array]:
        """A released mean as it was before `restored`, to rounding."""
        if self.coordinates is None or self.coordinates.whitened:
            return leaves
        return self.coordinates.entered(leaves)

    def check_plain(self, reader: str) -> None:
        """Raises where a `reader` that knows only groups meets scaled entries."""
        if self.coordinates is not None and not self.coordinates.whitened:
            raise ValueError(
                f"{reader} knows the noise by layer, but the gradients were clipped in "
                "coordinates of their own; leave out it or what scales coordinates."
            )

    def check_whole(self, reader: str) -> None:
        """Raises where a `reader` that follows every group meets dropped ones."""
        if self.drops:
            raise ValueError(
                f"{reader} follows every layer at every step, but the rule top_k drops "
                "some; take adam='plain', or another rule."
            )

    def noise_scale(self) -> Float[Array, " groups"]:
        """How much larger the noise of a group is on the gradient, root mean square.

        Returns:
            The weights, times the root mean square of the coordinates' scale, or of
            the lengths of their maps' rows.
        """
        if self.coordinates is None:
            return self.weights
        return self.weights * jnp.sqrt(self.coordinates.noise_squares(self.groups))

    def noise_energies(self) -> Float[Array, " groups"]:
        """Expected squared length of each group's noise on the gradient, at weight 1.

        Returns:
            The number of entries, times the mean square of the coordinates' scale: what
            a rule calls the size of a group.
        """
        sizes = jnp.array(self.groups.sizes, jnp.float32)
        if self.coordinates is None:
            return sizes
        return sizes * self.coordinates.noise_squares(self.groups)


def public_values(name: str, values: Any, groups: Groups) -> Float[Array, " groups"]:
    """Reads one positive public number a group from a mapping or a sequence.

    Args:
        name: what the caller calls them.
        values: mapping from group name to number, or numbers in group order.
        groups: the groups.

    Returns:
        float32 ``[groups]``.

    Raises:
        ValueError: for missing, unknown, non-positive or non-finite entries.

    Example:
        >>> import jax.numpy as jnp
        >>> public_values("weights", [2.0], group({"w": jnp.ones(3)})).tolist()
        [2.0]
    """
    if isinstance(values, Mapping):
        if set(values) != set(groups.names):
            raise ValueError(
                f"{name} name the groups {sorted(values)}, but the model has "
                f"{sorted(groups.names)}; give each group one number."
            )
        values = [values[n] for n in groups.names]
    try:
        array = jnp.asarray(values, jnp.float32)
    except (TypeError, OverflowError):
        raise ValueError(f"{name} are {shown(values)}, but must be numbers.") from None
    if array.shape != (len(groups.names),):
        raise ValueError(
            f"{name} have shape {array.shape}, but the model has "
            f"{len(groups.names)} groups; give each group one number."
        )
    if not bool(jnp.all(jnp.isfinite(array) & (array > 0))):
        raise ValueError(f"{name} are {array.tolist()}, but must be positive.")
    return array


def scaled_to_profile(
    raw: Float[Array, " groups"],
    shares: Float[Array, " groups"],
    drops: bool = False,
) -> Float[Array, " groups"]:
    """Scales weights so that an example of average profile keeps its L2 norm.

    ``sum_j shares_j / w_j^2 = 1``, hence C keeps its meaning under every rule.
    Weights are first held within a factor of 10,000 of the largest, so that a
    rule cannot leave the range in which the norm is exact.

    Args:
        raw: positive weights up to a factor.
        shares: importance shares, summing to 1.
        drops: whether a raw weight of 0 stays 0; the average example then keeps the
            L2 norm of its kept groups. If False, it is raised like any small one.

    Returns:
        The scaled weights.

    Example:
        >>> import jax.numpy as jnp
        >>> scaled_to_profile(jnp.array([3.0, 3.0]), jnp.array([0.5, 0.5])).tolist()
        [1.0, 1.0]
    """
    usable = jnp.where(jnp.isfinite(raw) & (raw > 0), raw, 0.0)
    usable = jnp.where(jnp.max(usable) > 0, usable, jnp.ones_like(usable))
    relative = jnp.maximum(usable / jnp.max(usable), 1 / LARGEST_RATIO)
    if not drops:
        return relative * jnp.sqrt(jnp.sum(shares / jnp.square(relative)))
    kept = raw != 0
    own = jnp.where(kept, shares, 0)
    scale = jnp.sum(own / jnp.square(relative)) / jnp.sum(own)
    return jnp.where(kept, relative * jnp.sqrt(scale), 0)
