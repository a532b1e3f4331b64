"""Gaussian noise in the geometry of the clip, drawn once a step.

The standard deviation of group j is ``sigma_t C w_j``: sigma_t from the plan, C and w
from the `ClippedGrad` itself, so that clip and noise cannot disagree (law: one
geometry). Sums are divided by the expected batch size q N, never by the drawn one (law:
expected size).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from dp_ilg import validation
from dp_ilg.accounting.correlated import strategies
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import ClippedGrad, Params, PrivateTransformation
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.grid import float32_view
from dp_ilg.geometry.layers import group
from dp_ilg.geometry.seal import sound
from dp_ilg.noise import correlated
from dp_ilg.noise.normal import normal_steps
from dp_ilg.noise.release import ROUNDING, Grid, check_multiplier, grid_of, noised
from dp_ilg.noise.secure import check_draws, given_leaves


class AddImportanceNoiseState(NamedTuple):
    """All randomness of the noise: the key, and which step comes next."""

    key: Any
    step: Any


def multiplier_at(table: np.ndarray, step: Any) -> Float[Array, ""]:
    """Reads a plan's multiplier for a traced step; NaN past the plan's end.

    Indexing past the end clamps silently in JAX; here it poisons the release instead,
    so that a step without budget shows nothing but NaN (law: never past the plan).

    Example:
        >>> import numpy as np, jax.numpy as jnp
        >>> table = np.array([1.0, 2.0])
        >>> [float(multiplier_at(table, jnp.int32(t))) for t in (1, 2)]
        [2.0, nan]
    """
    return jnp.asarray(table, jnp.float32).at[step].get(mode="fill", fill_value=jnp.nan)


def noise_stddev(
    plan: PrivacyPlan, step: Any, geometry: Geometry, l2_clip_norm: Any
) -> Float[Array, " groups"]:
    """Standard deviation of the noise on each group's clipped sum at a step.

    Args:
        plan: holds sigma_t.
        step: which step, from 0.
        geometry: the weights of that step's clip.
        l2_clip_norm: C of that step's clip.

    Returns:
        ``sigma_t C w_j``, float32 ``[groups]``; with bands what the noise of that step
        amounts to (`dp_ilg.accounting.correlated.strategies.growths`). Divide by
        ``plan.batch_size`` for the noise on the mean. All of it is public.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=2.0, delta=1e-5, score_budget=0,
        ...     num_examples=1000, batch_size=10, num_steps=3)
        >>> geometry = Geometry.of({"w": jnp.ones(3)}, [0.5])
        >>> noise_stddev(plan, jnp.int32(0), geometry, jnp.float32(3.0)).tolist()
        [3.0]
    """
    grown = strategies.growths(plan.strategy, plan.num_steps)
    sigma = multiplier_at(plan.gradient_noise_multipliers * grown, step)
    return sigma * jnp.float32(l2_clip_norm) * geometry.weights


def gaussian_noise(
    clipped: ClippedGrad,
    noise_multiplier: Any,
    key: Array,
    draws: list[Any] | None = None,
    rounding: float = ROUNDING,
) -> Params:
    """The clipped sum plus independent normal noise, one standard deviation a group.

    Sum and draw are integers of one public grid, 2^-27 of the noise's standard
    deviation, and meet as such; see `dp_ilg.noise.release`.

    Args:
        clipped: what to add to.
        noise_multiplier: sigma, perhaps traced; group j's noise has standard deviation
            ``sigma C w_j`` and up to 0.06 % more, which pays for rounding. 0 adds none.
        key: used for this step only; folded with the leaf's index.
        draws: int32 leaves of `dp_ilg.noise.normal.normal_steps` to take instead of
            drawing under the key, or what `dp_ilg.noise.correlated` made of them.
        rounding: as in `dp_ilg.noise.release.grid_of`.

    Returns:
        The noised sum, in float32 or wider; frozen leaves stay exactly 0, and so do
        dropped groups (`dp_ilg.Geometry.kept`). All NaN where
        multiplier, clip norm or a weight is not positive and finite: whatever came
        before, no sum without noise is released (`dp_ilg.geometry.seal`).

    Raises:
        ValueError: for a sum that arithmetic was done on after it was clipped, or a
            multiplier too large for so many coordinates
            (`dp_ilg.noise.release.largest_multiplier`).
    """
    whole = sound(clipped)
    geometry, wanted = clipped.geometry, _noised_leaves(clipped)
    leaves, treedef = float32_view(clipped), jax.tree.structure(clipped.gradients)
    geometry.groups.check(leaves)
    count = sum(x.size for x in wanted if x is not None)
    if not isinstance(noise_multiplier, Tracer):
        check_multiplier(float(noise_multiplier), count, rounding)
    reach = jnp.float32(clipped.l2_clip_norm) * geometry.divisors()
    grid = grid_of(reach, noise_multiplier, count, rounding)
    valid = jnp.all(grid.valid) & whole
    if draws is None:
        draws = normal_steps(key, wanted, valid)
    parts = [geometry.groups.expand(x) for x in (grid.stddev, grid.step)]
    noise = [
        value
        if draw is None
        else noised(value, low, Grid(stddev, step, valid, grid.bare), draw)
        for value, low, draw, stddev, step in zip(
            leaves, _remainders(clipped), draws, *parts, strict=True
        )
    ]
    return jax.tree.unflatten(treedef, geometry.of_kept(noise))


def _remainders(clipped: ClippedGrad) -> list[Any]:
    """What each leaf of the sum was rounded by, None where that is unknown."""
    if clipped.remainder is None:
        return [None] * len(clipped.geometry.groups.leaves)
    return jax.tree.leaves(clipped.remainder)


def _noised_leaves(clipped: ClippedGrad) -> list[Any]:
    """The sum's leaves, None where a leaf is frozen."""
    facts, leaves = clipped.geometry.groups.leaves, float32_view(clipped)
    return [x if leaf.groups else None for leaf, x in zip(facts, leaves, strict=True)]


def released_mean(noised: Params, geometry: Geometry, batch_size: float) -> Params:
    """Divides a noised sum by the expected batch size, in the parameters' dtypes."""
    leaves, treedef = jax.tree.flatten(noised)
    facts = geometry.groups.leaves
    values = geometry.restored([value / batch_size for value in leaves])
    means = [
        value.astype(leaf.dtype) for leaf, value in zip(facts, values, strict=True)
    ]
    return jax.tree.unflatten(treedef, means)


def add_importance_noise(
    plan: PrivacyPlan, *, key: Any, noise: str | None = None, layers: Any = "module"
) -> PrivateTransformation:
    """Adds the plan's noise to a clipped sum and divides by the expected batch size.

    Noise of step t is a function of (key, t) and the leaf: a resumed run repeats a
    release and never draws new noise for the same data (law: keyed by step). Past the
    plan's last step the result is NaN.

    Args:
        plan: sigma_t, number of steps and expected batch size.
        key: PRNG key, secret; not used for anything else.
        noise: "default" draws in the compiled step; "exact" takes nothing but the
            draws of `dp_ilg.noise.exact.ExactNoise`, given to every update. None does
            what the plan says (`exact_noise`).
        layers: as in `dp_ilg.layers`; where the plan has bands, frozen leaves need no
            memory of their noise.

    Returns:
        A transformation from `ClippedGrad` to an ordinary gradient: the release. Its
        update takes ``noise=``, draws of a `dp_ilg.noise.secure.SecureNoise`, in place
        of those under the key.

    Raises:
        TypeError: for a bad key, or an update that was not clipped.
        ValueError: for more coordinates than the plan pays for, or noise so large that
            the grid is too coarse (`dp_ilg.noise.release.largest_multiplier`).
        ValueError: for a clipped sum that ``jax.lax.psum`` or other arithmetic was
            done on; a bound that is not positive and finite releases NaN.

    Privacy: with a clip of the plan's Poisson sample before it, each step is one
    Poisson-subsampled Gaussian with multiplier ``plan.gradient_noise_multipliers[t]``
    for adding or removing one example, whatever the weights. Together with
    `score_layer_importance` on the same sample it is one with
    ``plan.noise_multipliers[t]``, which is what the plan accounts. With bands the noise
    of a step takes back a part of that before (`dp_ilg.noise.correlated`), and a cycle
    of steps is one such Gaussian. Sum and noise
    are integers of a public grid until they are one; the law of the noise is that of
    `dp_ilg.noise.normal`, and its distance to a Gaussian's is in the plan's delta
    (`dp_ilg.accounting.charges`). Bits come from JAX's threefry generator, or from a
    cryptographic one by ``noise=``.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10, score_budget=0)
        >>> params = {"w": jnp.zeros(3)}
        >>> noise = add_importance_noise(plan, key=jax.random.key(0))
        >>> geometry = dp_ilg.Geometry.uniform(params)
        >>> nothing = dp_ilg.ClippedGrad(params, jnp.zeros(1), geometry, 1.0)
        >>> release, state = noise.update(nothing, noise.init(params))
        >>> release["w"].shape, int(state.step)
        ((3,), 1)

    Reference: Abadi et al. 2016, Algorithm 1; Li et al. 2024, Eq. 10 (the idea of
    noise by layer); docs/idea.md (the proof).
    """
    key = validation.key("key", key)
    _check_plan(plan)
    exact = _exact(plan, noise)

    def init(params: Params) -> Any:
        group(params)
        _refuse_ensemble(params, key)
        start = fresh_key(key), jnp.zeros((), jnp.int32)
        if not plan.strategy:
            return AddImportanceNoiseState(*start)
        memory = correlated.empty_memory(params, layers, plan.bands)
        return correlated.CorrelatedNoiseState(*start, memory)

    def update(
        updates: Any,
        state: Any,
        params: Params | None = None,
        *,
        noise: Any = None,
        **extra: Any,
    ) -> tuple[Params, Any]:
        del params, extra
        if not isinstance(updates, ClippedGrad):
            raise TypeError(
                f"add_importance_noise got {type(updates).__name__}, not a ClippedGrad;"
                " put clip_per_example before it in the chain."
            )
        check_draws(noise, exact)
        geometry = updates.geometry
        _check_size(plan, updates)
        sigma = multiplier_at(plan.gradient_noise_multipliers, state.step)
        step_key = jax.random.fold_in(state.key, state.step)
        draws, after = None, state._replace(step=state.step + 1)
        if noise is not None:
            draws, right = given_leaves(noise, state.step, _noised_leaves(updates))
            sigma = jnp.where(right, sigma, jnp.nan)
        if plan.strategy:
            draws, after = _cancelling(plan, updates, state, draws, step_key, sigma)
        rounding = correlated.rounding(plan.strategy)
        noised = gaussian_noise(updates, sigma, step_key, draws, rounding)
        return released_mean(noised, geometry, plan.batch_size), after

    return PrivateTransformation(init, update, role="noise", key=key, plan=plan)


def _cancelling(
    plan: PrivacyPlan, clipped: ClippedGrad, state: Any, draws: Any, key: Array, z: Any
) -> tuple[list[Any], Any]:
    """What the draws of a step leave of the noise before, and the state after it."""
    if clipped.geometry.drops:
        raise ValueError(
            f"The plan has {plan.bands} bands, but a rule such as top_k drops groups, "
            "whose noise would come back uncancelled; plan without bands or use a rule "
            "that keeps all groups."
        )
    if draws is None:
        draws = normal_steps(key, _noised_leaves(clipped), jnp.isfinite(z))
    step = state.step
    noise, memory = correlated.correlated(draws, state.memory, step, plan.strategy)
    return noise, state._replace(step=step + 1, memory=memory)


def _refuse_ensemble(params: Params, key: Any) -> None:
    """Raises where ``jax.vmap`` would give all members of an ensemble one key."""
    own = isinstance(jax.random.key_data(key), Tracer)
    if own or all(type(x).__name__ != "BatchTracer" for x in jax.tree.leaves(params)):
        return
    raise ValueError(
        "jax.vmap of init gives all members one noise key, so that the difference of "
        "two releases shows the data; make each member's optimizer of a key of its "
        "own, jax.vmap(lambda key, params: make(key).init(params))(keys, params)."
    )


def _exact(plan: PrivacyPlan, noise: str | None) -> bool:
    """Whether only exact draws will do."""
    if noise not in (None, "default", "exact"):
        raise ValueError(f"noise is {noise!r}, but must be 'default' or 'exact'.")
    if noise == "default" and plan.exact_noise:
        raise ValueError(
            "noise is 'default', but the plan was made with exact_noise=True and pays "
            "for no other; leave noise out."
        )
    return plan.exact_noise or noise == "exact"


def _check_size(plan: PrivacyPlan, clipped: ClippedGrad) -> None:
    """Raises for more numbers a step than delta has paid for, or too much noise."""
    wanted = [x.size for x in _noised_leaves(clipped) if x is not None]
    most = float(plan.gradient_noise_multipliers.max())
    check_multiplier(most, sum(wanted), correlated.rounding(plan.strategy))
    count = sum(wanted) + len(clipped.geometry.groups.names)
    count += 0 if clipped.metrics is None else clipped.metrics.total.size
    if count > plan.most_parameters and plan.noise_multipliers.any():
        raise ValueError(
            f"A step draws {count:,} numbers (parameters, scores and metrics), but the "
            f"plan pays for {plan.most_parameters:,}; plan with "
            f"num_parameters={count} or exact_noise=True."
        )


def fresh_key(key: Array) -> Array:
    """A copy of a key, so that donating a state does not delete the factory's."""
    data = jnp.array(jax.random.key_data(key), copy=True)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def _check_plan(plan: Any) -> None:
    if not isinstance(plan, PrivacyPlan):
        raise TypeError(
            f"plan is {type(plan).__name__}, but must be a PrivacyPlan; make one with "
            "dp_ilg.plan_privacy."
        )
