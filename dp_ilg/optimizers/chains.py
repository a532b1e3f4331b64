"""Chains of the verbs: `chain`, and the optimizers made with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.core import Tracer

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import ClippedGrad, Params, PrivateTransformation
from dp_ilg.clipping.adding.metric_sums import Metric
from dp_ilg.clipping.clip import ClipMode, as_clip_mode, clip_per_example
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.layers import as_layering, group
from dp_ilg.geometry.rules import Rule, as_rule, drops
from dp_ilg.noise.add_noise import add_importance_noise, fresh_key
from dp_ilg.optimizers.adam import scale_by_noise_corrected_adam, scale_by_wide_adam
from dp_ilg.optimizers.arriving import check_state, checked, said_by
from dp_ilg.optimizers.balance import scale_by_balanced_adam
from dp_ilg.optimizers.dropped.adam import scale_by_adam_of_kept
from dp_ilg.optimizers.dropped.still import hold_still
from dp_ilg.optimizers.kept_release import release_reader
from dp_ilg.optimizers.metric_links import (
    check_all_told,
    check_budget_spent,
    metric_links,
    metrics_place,
    metrics_reader,
)
from dp_ilg.optimizers.public.reader import maps_reader
from dp_ilg.optimizers.sources import release_links, row_of, steps_of
from dp_ilg.optimizers.types import apart, like_before, like_parameters
from dp_ilg.optimizers.whitened import check_unwhitened
from dp_ilg.optimizers.wrappers import refuse_wrappers, tell_hidden


def chain(*transformations: optax.GradientTransformation) -> PrivateTransformation:
    """``optax.chain`` that hands the released geometry to the next step's clip.

    The one transformation that holds a geometry (a scorer, or a chain with one inside)
    says after step t what the clip of step t + 1 uses; the noise reads it from the
    clipped sum, and what follows the noise is told which geometry and clip norm it
    had. Any Optax transformation may follow the noise.

    Args:
        *transformations: `clip_per_example`, a scorer and `add_importance_noise`, and
            whatever is to be done with the release.

    Returns:
        A transformation with ``geometry(state)`` and ``importance(state)``, and, where
        `release_metrics` is a part, ``metrics(state)``. Its update takes per-example
        gradients or a `ClippedGrad`, and the extra arguments ``is_padding_example=``,
        ``clipped_grad=`` and ``geometry=``; the last overrides the chain's own and must
        come from public facts or earlier releases. Updates have the parameters' dtypes,
        and every state keeps the dtypes of `init`.

    Raises:
        ValueError: for a missing or repeated clip, geometry or noise, a wrong order,
            one key for two of them, or different plans; in an update for a
            `ClippedGrad` of other groups, weights, clip mode or norm than the chain's
            (where that is traced, the release is NaN).

    Privacy: that of the noise; the chain adds nothing. ``optax.masked``, ``MultiSteps``
    and ``apply_if_finite`` around the whole chain are refused (raw gradients would
    pass, be averaged or decide); behind the noise they are welcome. To freeze
    parameters use ``layers=dp_ilg.layers.by_module(frozen=...)``.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp, optax
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> k1, k2 = jax.random.split(jax.random.key(0))
        >>> tx = dp_ilg.chain(
        ...     dp_ilg.clip_per_example(plan.l2_clip_norm),
        ...     dp_ilg.score_layer_importance("min_noise_energy", plan, key=k1),
        ...     dp_ilg.add_importance_noise(plan, key=k2),
        ...     optax.scale_by_adam(), optax.scale_by_learning_rate(1e-3))
        >>> params = {"w": jnp.zeros(2)}
        >>> state = tx.init(params)
        >>> updates, state = tx.update({"w": jnp.ones((5, 2))}, state, params)
        >>> updates["w"].shape, tx.geometry(state).weights.shape
        ((2,), (1,))

    Reference: the step in docs/idea.md.
    """
    holder = _check_chain(transformations)
    source: Any = transformations[holder]
    links: list[Any] = [optax.with_extra_args_support(t) for t in transformations]
    said = said_by(transformations)
    told = metrics_place(transformations)
    released = release_place(transformations)
    knowing = release_reader(transformations, said.facts)
    mapped = maps_reader(transformations, holder)

    def init(params: Params) -> tuple[Any, ...]:
        check_budget_spent(transformations, told)
        tell_hidden()
        return apart(tuple(link.init(params) for link in links), params)

    def update(
        updates: Any, state: Any, params: Params | None = None, **extra: Any
    ) -> tuple[Any, tuple]:
        own = geometry(state)
        refuse_wrappers(updates, own.groups, extra.get("clipped_grad"))
        updates, extra = checked(updates, extra, own, said.clip_norm(state))
        extra.setdefault("geometry", own)
        check_unwhitened(transformations, extra["geometry"])
        new = []
        for place, (link, part) in enumerate(zip(links, state, strict=True)):
            updates, after = link.update(updates, part, params, **extra)
            if place > released:
                updates, after = hold_still(extra["geometry"], updates, after, part)
            new.append(like_before(after, part))
            if isinstance(updates, ClippedGrad):
                check_all_told(updates, told)
                extra["geometry"] = updates.geometry
                extra["l2_clip_norm"] = updates.l2_clip_norm
        return like_parameters(updates, own.groups), tuple(new)

    def geometry(state: Any) -> Geometry:
        check_state(state, len(links))
        said.check_end(state)
        own = mapped(source.geometry(state[holder]), state)
        return knowing(own.saying(said.facts), state)

    def importance(state: tuple[Any, ...]) -> Any:
        return source.importance(state[holder])

    facts: Any = dict(geometry=geometry, importance=importance)
    facts["metrics"] = metrics_reader(transformations, told)
    return PrivateTransformation(
        init, update, role="private", links=transformations, **facts
    )


def dp_adam_ilg(
    learning_rate: Any,
    plan: PrivacyPlan,
    *,
    key: Any,
    importance: str | Rule = "min_noise_energy",
    source: Any = "scores",
    layers: Any = "module",
    clip_mode: str | ClipMode = "joint",
    adam: str = "plain",
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    ema_decay: Any = 0.9,
    floor: Any = 0.01,
    public_importance: Any = None,
    weight_decay: Any = None,
    noise: str | None = None,
    metrics: Mapping[str, Metric] | None = None,
    score: Any = "l2",
) -> PrivateTransformation:
    """Adam with differential privacy, its noise shaped by layer importance.

    Args:
        learning_rate: a number or an Optax schedule.
        plan: from `plan_privacy`.
        key: PRNG key, secret; scores and noise use different keys made from it.
        importance: "min_noise_energy", "equal_snr", "paper", "sqrt_share", "uniform"
            (which is DP-Adam), "top_k:4" (the four most important groups, the rest
            dropped for the step, see `dp_ilg.geometry.rules.top_k`), or a function
            ``(importance, sizes) -> weights``.
        source: "scores" (charged to the plan's score budget), "released" (past noisy
            gradients, free), "public" (constants, free), a `dp_ilg.Prior` (public
            vectors over the entries of leaves) or a `dp_ilg.Probe` (synthetic
            examples, free).
        layers: "module", "leaf", `dp_ilg.layers.blocks`, a function of the path, or a
            `dp_ilg.layers.Layering`, which can also freeze parameters.
        clip_mode: "joint", "normalize" or "per_layer".
        adam: "plain", "noise_corrected" or "balanced" (larger steps in layers of which
            less is signal, see `scale_by_balanced_adam`).
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: Adam's epsilon.
        ema_decay: how much of the running score a step keeps.
        floor: smallest importance, as a fraction of the whole.
        public_importance: for source "public": a number for each layer (None: equal).
        weight_decay: decoupled weight decay, or None.
        noise: "default", "exact" or None, as in `add_importance_noise`.
        metrics: name -> `dp_ilg.Metric`, released with noise at every step, charged to
            the plan's metric budget; give `dp_ilg.clipped_grad` the same.
        score: for source "scores": "l2" (shares of L2 norms), "l1", "weight" (gradient
            times weight), "signal" (around the last release) or a function of one
            example's statistics; see `score_layer_importance`.

    Returns:
        An Optax transformation with ``geometry(state)`` and ``importance(state)``, and
        ``metrics(state)`` where there are metrics.

    Raises:
        ValueError: for a bad number, rule, source, layering, mode or score.
        TypeError: for a bad key or plan.

    Privacy: (epsilon, delta) of the plan for adding or removing one example (or as the
    plan says), if batches are the plan's Poisson samples and at most ``plan.num_steps``
    updates are made; each further update is NaN. One update a state: its noise is drawn
    from key and step in there, so that two updates on one state with different data
    share their noise, and their difference shows the data. Keep the state that each
    update returns; ``dp-ilg audit`` looks for it.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp, optax
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(0))
        >>> params = {"w": jnp.zeros(2), "b": jnp.zeros(())}
        >>> loss = lambda p, x: jnp.square(p["w"] @ x + p["b"] - 1)
        >>> grads = jax.vmap(jax.grad(loss), (None, 0))(params, jnp.ones((4, 2)))
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["w"].shape
        (2,)

    Reference: Li et al. 2024 (DP-AdamILG), made private as in docs/idea.md;
    Kingma and Ba 2015 (Adam).
    """
    key = validation.key("key", key)
    _check_numbers(learning_rate, weight_decay, b1=b1, b2=b2, eps=eps)
    layers, moments = as_layering(layers), dict(b1=b1, b2=b2, eps=eps)
    scored = dict(layers=layers, ema_decay=ema_decay, floor=floor, score=score)
    score_key, noise_key = jax.random.split(fresh_key(key))
    stage = add_importance_noise(plan, key=noise_key, noise=noise, layers=layers)
    rule = as_rule(importance)
    release = release_links(source, rule, score_key, stage, public_importance, **scored)
    return chain(
        clip_per_example(plan.l2_clip_norm, clip_mode=as_clip_mode(clip_mode)),
        *metric_links(plan, metrics, key),
        *release,
        *steps_of(
            source,
            _adam(adam, plan, layers, moments, drops(rule)),
            *_decay(weight_decay, layers),
            optax.scale_by_learning_rate(learning_rate),
        ),
    )


def _check_numbers(
    learning_rate: Any, weight_decay: Any, *, b1: Any, b2: Any, eps: Any
) -> None:
    if not callable(learning_rate):
        validation.rate("learning_rate", learning_rate)
    validation.fraction("b1", b1, include_zero=True)
    validation.fraction("b2", b2, include_zero=True)
    validation.positive("eps", eps)
    if weight_decay is not None and not callable(weight_decay):
        validation.rate("weight_decay", weight_decay)


def _adam(
    adam: str, plan: PrivacyPlan, layers: Any, moments: dict[str, Any], drops: bool
) -> Any:
    if drops and adam == "plain":
        return scale_by_adam_of_kept(layers=layers, **moments)
    rows: dict[str, Callable[[], Any]] = {
        "plain": lambda: scale_by_wide_adam(**moments),
        "noise_corrected": lambda: scale_by_noise_corrected_adam(
            plan, layers=layers, **moments
        ),
        "balanced": lambda: scale_by_balanced_adam(layers=layers, **moments),
    }
    return row_of("adam", adam, rows)


def _decay(weight_decay: Any, layers: Any) -> list[optax.GradientTransformation]:
    if weight_decay is None:
        return []
    return [optax.add_decayed_weights(weight_decay, mask=_trained(layers))]


def _trained(layers: Any) -> Callable[[Params], Params]:
    """Maps parameters to a tree of bools: False where a leaf is frozen."""

    def mask(params: Params) -> Params:
        trained = [bool(leaf.groups) for leaf in group(params, layers).leaves]
        return jax.tree.unflatten(jax.tree.structure(params), trained)

    return mask


def _check_chain(transformations: tuple[Any, ...]) -> int:
    """Checks order and keys; returns which transformation holds the geometry."""
    roles = [getattr(t, "role", "") for t in transformations]
    whole = roles.count("private") == 1 and not {"clip", "noise"} & set(roles)
    if not whole and (roles.count("clip"), roles.count("noise")) != (1, 1):
        raise ValueError(
            f"The chain has {roles.count('clip')} clip_per_example and "
            f"{roles.count('noise')} add_importance_noise beside "
            f"{roles.count('private')} private optimizers, but needs exactly one each, "
            "or one private optimizer alone: a release needs no second noise."
        )
    if not whole and roles.index("clip") > roles.index("noise"):
        raise ValueError("clip_per_example must stand before add_importance_noise.")
    holders = [
        i
        for i, t in enumerate(transformations)
        if getattr(t, "geometry", None) is not None
    ]
    if len(holders) != 1:
        raise ValueError(
            f"The chain has {len(holders)} sources of layer importance, but needs "
            "exactly one; add score_layer_importance or set_layer_importance."
        )
    _check_first(transformations, roles)
    _check_plans([t.plan for t in transformations if getattr(t, "plan", None)])
    _check_keys([t.key for t in transformations if getattr(t, "key", None) is not None])
    return holders[0]


def release_place(transformations: tuple[Any, ...]) -> int:
    """Which transformation of a chain releases: the noise, or a private chain."""
    roles = [getattr(t, "role", "") for t in transformations]
    return roles.index("noise" if "noise" in roles else "private")


def _check_first(transformations: tuple[Any, ...], roles: list[str]) -> None:
    """Nothing but our own may touch gradients before the noise."""
    for place, role in enumerate(roles[: release_place(transformations)]):
        if not role:
            raise ValueError(
                f"Transformation {place + 1} of the chain comes before the noise and "
                "is none of dp_ilg's; what touches raw gradients may void the "
                "guarantee, so put it behind add_importance_noise."
            )


def _check_plans(plans: list[PrivacyPlan]) -> None:
    """One plan for all: two would account less than score and noise release."""
    if len(set(plans)) > 1:
        digests = " and ".join(sorted({plan.digest() for plan in plans}))
        raise ValueError(
            f"The chain was given different plans ({digests}), so that none accounts "
            "for all it releases; give every transformation the same plan."
        )


def _check_keys(keys: list[Any]) -> None:
    known: set[bytes] = set()
    for key in keys:
        data = jax.random.key_data(key)
        if isinstance(data, Tracer):
            return
        if data.tobytes() in known:
            raise ValueError(
                "Score and noise were given the same key; give each its own, e.g. "
                "k1, k2 = jax.random.split(key)."
            )
        known.add(data.tobytes())
