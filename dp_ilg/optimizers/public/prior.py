"""Public priors over the entries of leaves, as a source of importance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dp_ilg import validation
from dp_ilg.base import Params, PrivateTransformation
from dp_ilg.geometry import priors
from dp_ilg.geometry.geometry import Geometry, public_values, scaled_to_profile
from dp_ilg.geometry.groups import Groups
from dp_ilg.geometry.layers import group, matches, paths
from dp_ilg.geometry.maps import AxisMaps
from dp_ilg.geometry.rules import Rule, as_rule, check_rule, drops, of_entries
from dp_ilg.optimizers.public.axis_scale import GIVEN, axis_scale
from dp_ilg.optimizers.public.readings import as_reading

GROUPS = ("public", "scores")


@dataclasses.dataclass(frozen=True, eq=False)
class Prior:
    """Public vectors that say which entries of a leaf receive how much gradient.

    Pass it as ``source=``. With ``s_r`` the expected share of slice r in the squared
    gradient of its leaf, noise is scaled by ``b_r``, which the rule makes of
    ``I_r = sqrt(s_r)``: under "min_noise_energy" ``b_r`` is in proportion to
    ``s_r^(1/4)``, under "paper" and "equal_snr" to ``s_r^(1/2)``. Vectors for several
    axes multiply. An example with just these shares keeps its norm.

    Attributes:
        shares: name of a leaf, as in `dp_ilg.layers.blocks`, to a vector for its first
            axis, or a tuple with a vector or None for each of its first axes. Up to a
            factor: relative frequencies will do, see `dp_ilg.priors`. A function of
            the length of the axis, such as `dp_ilg.priors.zipf`, stands for a vector.
        rule: from share to scale, as `importance`; None takes the optimizer's own, and
            "given" takes the vectors as the scales b themselves.
        groups: where the weights of whole groups come from beside: "public" (constants,
            free) or "scores" (released and charged).
        steps: what the optimizer is given: "restored" (an ordinary gradient whose noise
            has the scales b), "whitened" (it trains ``z = b w``, exactly as a linear
            model on features divided by b), or "preconditioned" (the gradient over b).

    Raises:
        ValueError: for no vectors, an unknown rule, source of groups or reading;
            vectors of another length than their axis, negative or NaN, and a leaf that
            does not exist, once parameters are known.
        TypeError: for `dp_ilg.priors.PrivateCounts`.

    Privacy: free, if every vector is a public fact. What was counted in the training
    data is not, and no epsilon here covers it. Steps are the plan's Gaussian whatever
    the vectors, for adding or removing one example.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10, score_budget=0)
        >>> prior = dp_ilg.Prior({"embedding": dp_ilg.priors.zipf(4)})
        >>> tx = dp_ilg.dp_adam_ilg(0.1, plan, key=jax.random.key(0), source=prior)
        >>> state = tx.init({"embedding": jnp.zeros((4, 2))})
        >>> [round(float(b), 2) for b in tx.geometry(state).coordinates.back[0][0]]
        [1.16, 0.97, 0.88, 0.82]

    Reference: the rules and their exponents, docs/idea.md.
    """

    shares: Any
    rule: Any = None
    groups: str = "public"
    steps: str = "restored"

    def __post_init__(self) -> None:
        """Checks all that can be known without parameters."""
        if not isinstance(self.shares, Mapping) or not self.shares:
            raise ValueError(
                f"shares are {validation.shown(self.shares)}, but must name at least "
                "one leaf and its vector, such as {'embedding': dp_ilg.priors.zipf(n)}."
            )
        for name, given in self.shares.items():
            for one in given if isinstance(given, tuple) else (given,):
                if one is not None and not callable(one):
                    priors.vector(f"The prior's entries of {name}", one)
        if self.rule is not None and self.rule != GIVEN:
            as_rule(self.rule)
        if self.groups not in GROUPS:
            raise ValueError(
                f"groups is {validation.shown(self.groups)}, but must be one of "
                f"{sorted(GROUPS)}."
            )
        as_reading(self.steps)

    def spends_scores(self) -> bool:
        """Whether the weights of groups are released and charged."""
        return self.groups == "scores"

    def knowing(self, **facts: Any) -> Prior:
        """The same: a prior has no use for what a run knows."""
        del facts
        return self

    def maps(self, params: Params, rule: Rule) -> AxisMaps:
        """The maps of a parameter tree.

        Args:
            params: only shapes are read.
            rule: of the optimizer, for a prior without one of its own.

        Returns:
            One scale an axis that was spoken of.

        Raises:
            ValueError: for unknown leaves, and vectors that do not fit.
        """
        leaves = paths(params)
        lost = [n for n in self.shares if not any(matches(n, p) for p, _ in leaves)]
        if lost:
            known = ["/".join(path) for path, _ in leaves]
            known = sorted({*known, *(path[-1] for path, _ in leaves)})
            raise ValueError(
                f"The prior names {lost[0]!r}, which is no parameter; "
                f"{validation.nearest(lost[0], known)}"
            )
        own = rule if self.rule is None else self.rule
        own = own if own == GIVEN else of_entries(as_rule(own))
        with jax.ensure_compile_time_eval():  # constants, also within a trace
            scales = self._scales(own, leaves)
            whitened = as_reading(self.steps).whitened
            return AxisMaps.of(params, scales, whitened=whitened)

    def _scales(self, rule: Any, leaves: list[Any]) -> dict[str, Any]:
        """Scales of each axis of each leaf that is spoken of."""
        scales = {}
        for path, leaf in leaves:
            name = next((n for n in self.shares if matches(n, path)), None)
            if name is not None:
                text, shape = "/".join(path), tuple(jnp.shape(leaf))
                axes = priors.per_axis(text, self.shares[name], shape)
                scales[text] = _scales(rule, axes, shape)
        return scales


def _scales(rule: Any, axes: tuple[Any, ...], shape: tuple[int, ...]) -> tuple:
    size = math.prod(shape)
    pairs = zip(axes, shape, strict=True)
    return tuple(
        None if x is None else axis_scale(rule, x, size // n) for x, n in pairs
    )


class SetPriorState(NamedTuple):
    """Constants: the weights, and the maps with them."""

    geometry: Geometry
    shares: Any


def set_prior(
    prior: Any,
    rule: str | Rule = "min_noise_energy",
    *,
    layers: Any = "module",
    values: Any = None,
) -> PrivateTransformation:
    """Fixes the scales of entries by public vectors; a link between clip and noise.

    Where the prior's `groups` are "scores", put `score_layer_importance` beside it: the
    scorer weighs groups, this link the entries in them. Else it also weighs groups, by
    constants. Group sizes in the rule are then noise energies: ``sum b^2`` over the
    entries of the group, which is n where all scales are 1.

    Args:
        prior: the vectors.
        rule: for groups, and for entries where the prior has none.
        layers: what a group is.
        values: importance of each group, as in `set_layer_importance`.

    Returns:
        A transformation that lets everything through and holds the geometry.

    Raises:
        TypeError: for what is no `Prior`.
        ValueError: as `Prior` and `set_layer_importance`.

    Privacy: free, if vectors and constants are public.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> k1, k2 = jax.random.split(jax.random.key(0))
        >>> prior = dp_ilg.Prior({"w": [3.0, 1.0]}, groups="scores")
        >>> tx = dp_ilg.chain(
        ...     dp_ilg.clip_per_example(plan.l2_clip_norm),
        ...     dp_ilg.set_prior(prior),
        ...     dp_ilg.score_layer_importance("min_noise_energy", plan, key=k1),
        ...     dp_ilg.add_importance_noise(plan, key=k2))
        >>> tx.geometry(tx.init({"w": jnp.ones(2)})).coordinates.back[0][0].shape
        (2,)
    """
    if not isinstance(prior, Prior):
        raise TypeError(
            f"prior is {type(prior).__name__}, but must be a dp_ilg.Prior of public "
            "vectors."
        )
    chosen = as_rule(rule)

    def init(params: Params) -> SetPriorState:
        groups = group(params, layers)
        maps = prior.maps(params, chosen)
        maps.check(groups)
        constants = jnp.ones(len(groups.names), jnp.float32)
        if values is not None:
            constants = public_values("values", values, groups)
        check_rule(chosen, groups.sizes)
        geometry, shares = weighed(jnp.square(constants), chosen, groups, maps)
        return SetPriorState(geometry, shares)

    def update(
        updates: Any, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        del params, extra
        return updates, state

    facts: dict[str, Any] = dict(maps=lambda state: state.geometry.coordinates)
    if not prior.spends_scores():
        facts["geometry"] = lambda state: state.geometry
        facts["importance"] = lambda state: state.shares
    return PrivateTransformation(init, update, role="map", **facts)


def weighed(
    squares: Any, rule: Rule, groups: Groups, maps: Any
) -> tuple[Geometry, Any]:
    """Weights of groups from their squared importance, in maps of their leaves.

    Args:
        squares: positive, ``[groups]``, up to a factor.
        rule: of the groups.
        groups: of the model.
        maps: of its leaves, or None.

    Returns:
        The geometry, and the shares ``[groups]``.

    Example:
        >>> from dp_ilg.geometry.rules import RULES
        >>> groups = group({"a": jnp.ones(3), "b": jnp.ones(3)})
        >>> found, shares = weighed(jnp.array([4.0, 4.0]), RULES["paper"], groups, None)
        >>> found.weights.round(3).tolist(), shares.tolist()
        ([1.0, 1.0], [0.5, 0.5])
    """
    shares = squares / jnp.sum(squares)
    sizes = Geometry(jnp.ones_like(shares), groups, maps).noise_energies()
    dropping = drops(rule)
    weights = scaled_to_profile(rule(jnp.sqrt(shares), sizes), shares, dropping)
    weights = weights.astype(jnp.float32)
    return Geometry(weights, groups, maps, drops=dropping), shares
