"""The link of a chain that probes: its geometry is refreshed in the compiled step."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dp_ilg import validation
from dp_ilg.base import Params, PrivateTransformation
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.groups import Groups
from dp_ilg.geometry.layers import group
from dp_ilg.geometry.rules import Rule, as_rule, check_rule, of_entries
from dp_ilg.optimizers.public.prior import weighed
from dp_ilg.optimizers.public.probe import Probe, probe_key
from dp_ilg.optimizers.public.readings import as_reading
from dp_ilg.optimizers.public.statistics import NONE, Found, maps_of, probed


class ProbeImportanceState(NamedTuple):
    """What the last probe said; nothing of any private example.

    Attributes:
        step: which step comes next.
        shares: importance of groups ``[groups]``, summing to 1.
        geometry: for the next steps' clips, with maps but at depth "group".
    """

    step: Any
    shares: Any
    geometry: Geometry


def probe_importance(
    probe: Any,
    rule: str | Rule = "min_noise_energy",
    *,
    layers: Any = "module",
    floor: Any = 0.01,
) -> PrivateTransformation:
    """Sets the geometry by a `Probe`, refreshed every so many steps.

    A link between clip and noise. The first probe is at the initial parameters, in
    ``init``. After step t, where t + 1 is a multiple of ``probe.every``, the next is at
    the parameters that step t began with, inside the compiled step.

    Where the probe's `groups` are "scores", put `score_layer_importance` beside it.

    Args:
        probe: what to send through the network; with a loss.
        rule: for groups, and for entries where the probe has none.
        layers: what a group is.
        floor: least importance of a group, as a part of the whole: what becomes of one
            that gets no gradient in the probe.

    Returns:
        A transformation that lets everything through and holds the geometry. Its
        update needs ``params``.

    Raises:
        TypeError: for what is no `Probe`.
        ValueError: for a bad rule or floor; in ``init`` for a probe without loss, and
            as `Probe`; in an update without parameters.

    Privacy: free: a function of released parameters and public randomness, see `Probe`.
    `params` must be those that this chain's own updates made.

    Example:
        >>> import dp_ilg
        >>> probe = Probe(lambda p, x: p["w"] @ x, example=jnp.zeros(3),
        ...     batch="gaussian", depth="diagonal")
        >>> link = probe_importance(probe)
        >>> state = link.init({"w": jnp.zeros(3)})
        >>> link.geometry(state).coordinates.back[0][0].shape
        (3,)
    """
    if not isinstance(probe, Probe):
        raise TypeError(f"probe is {type(probe).__name__}, but must be a dp_ilg.Probe.")
    chosen = as_rule(rule)
    validation.fraction("floor", floor)

    def init(params: Params) -> ProbeImportanceState:
        groups = group(params, layers)
        check_rule(chosen, groups.sizes)
        probe.check(params)
        first = jax.jit(lambda params: _refreshed(probe, params, 0, groups, facts))
        geometry, shares = first(params)
        return ProbeImportanceState(jnp.zeros((), jnp.int32), shares, geometry)

    def update(
        updates: Any,
        state: ProbeImportanceState,
        params: Params | None = None,
        **extra: Any,
    ) -> tuple[Any, ProbeImportanceState]:
        del extra
        if params is None:
            raise ValueError(
                "A probe needs the parameters; call update(gradients, state, params)."
            )
        step, groups = state.step + 1, state.geometry.groups
        geometry, shares = jax.lax.cond(
            step % probe.every == 0,
            lambda params: _refreshed(probe, params, step, groups, facts),
            lambda params: (state.geometry, state.shares),
            params,
        )
        return updates, ProbeImportanceState(step, shares, geometry)

    facts = (chosen, floor)
    seen: dict[str, Any] = {}
    if not probe.spends_scores():
        seen["geometry"] = lambda state: state.geometry
        seen["importance"] = lambda state: state.shares
    if probe.depth != "group":
        seen["maps"] = lambda state: state.geometry.coordinates
    return PrivateTransformation(init, update, role="map", **seen)


def _refreshed(
    probe: Probe, params: Params, step: Any, groups: Groups, facts: tuple[Rule, Any]
) -> tuple[Geometry, Array]:
    """The geometry that the probe of a step makes, and shares of importance."""
    rule, floor = facts
    batch = probe.generator()(probe_key(probe.seed, step))
    found = _found(probe, params, batch, groups, None)
    if probe.depth == "group":
        return weighed(floored(found.norms, floor), rule, groups, None)
    own = of_entries(rule if probe.rule is None else as_rule(probe.rule))
    whitened = as_reading(probe.steps).whitened
    maps = maps_of(found, groups, own, probe.damping, whitened)
    if probe.spends_scores():
        return weighed(jnp.ones(len(groups.names)), rule, groups, maps)
    inside = _found(probe, params, batch, groups, maps)
    geometry, shares = weighed(floored(inside.norms, floor), rule, groups, maps)
    return _keeping_length(geometry, found, inside), shares


def _found(
    probe: Probe, params: Params, batch: Any, groups: Groups, maps: Any
) -> Found:
    """The first look takes spreads as well, the second lengths alone."""
    kinds = probe.kinds(groups)
    if maps is not None:
        kinds = tuple((NONE,) * len(own) for own in kinds)
    return probed(probe.loss_fn, params, batch, groups, (kinds, probe.at_once(), maps))


def floored(norms: Array, floor: Any) -> Array:
    """Squared importance of groups from lengths, none below the floor.

    Example:
        >>> [round(float(x), 4) for x in floored(jnp.array([1.0, 0.0]), 0.1)]
        [1.0, 0.01]
        >>> floored(jnp.zeros(2), 0.1).tolist()
        [1.0, 1.0]
    """
    total = jnp.sum(jnp.square(norms))
    known = jnp.isfinite(total) & (total > 0)
    shares = jnp.where(known, jnp.square(norms) / jnp.where(known, total, 1), 1.0)
    return jnp.maximum(shares, floor**2)


def _keeping_length(geometry: Geometry, found: Found, inside: Found) -> Geometry:
    """Weights by which an average probe example is as long in the maps as without."""
    before, after = jnp.sum(found.squares), jnp.sum(inside.squares)
    ratio = jnp.sqrt(after / jnp.where(before > 0, before, 1))
    ratio = jnp.where(jnp.isfinite(ratio) & (ratio > 0), ratio, 1)
    return dataclasses.replace(geometry, weights=geometry.weights * ratio)


def silent_groups(probe: Probe, params: Params, layers: Any = "module") -> list[str]:
    """Groups that get no gradient in the probe at these parameters.

    Args:
        probe: with a loss.
        params: public, or released; never a batch.
        layers: what a group is.

    Returns:
        Their names; their weights fall to the floor.

    Raises:
        ValueError: as `probe_importance`.

    Privacy: as `probe_importance`.

    Example:
        >>> probe = Probe(lambda p, x: p["a"] @ x, example=jnp.zeros(2),
        ...     batch="gaussian")
        >>> silent_groups(probe, {"a": jnp.ones(2), "b": jnp.ones(2)})
        ['b']
    """
    groups = group(params, layers)
    probe.check(params)
    key = probe_key(probe.seed, 0)

    def lengths(params: Params) -> Array:
        return _found(probe, params, probe.generator()(key), groups, None).norms

    found = jax.jit(lengths)(params)
    return [n for n, x in zip(groups.names, found.tolist(), strict=True) if not x > 0]
