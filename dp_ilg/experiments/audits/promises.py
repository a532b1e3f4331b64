"""Checks of what a step must keep to, whatever the data: clip, geometry, release.

Each looks at the trainer's own parts with inputs made to break them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg.base import ClippedGrad, Params
from dp_ilg.experiments.audits.checks import Finding
from dp_ilg.experiments.audits.residuals import Observer, draws, inner_product
from dp_ilg.experiments.audits.subject import release_of, taken
from dp_ilg.geometry.facts import ClipFacts
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.groups import pieces_of

MARGIN = 1e-6  # over the bound, for the float32 the bound itself is kept in
_EXACT = 1e-4  # of the clip norm, between two ways of summing
_ENTRIES = 2e6  # gradient entries made at once
_CASES, _EXAMPLES = 64, 6


def exact_sum(observer: Observer, seed: int) -> Finding:
    """The trainer's clipped sum against plain per-example gradients, on its data.

    Args:
        observer: of the trainer.
        seed: unused.

    Returns:
        Fails for a clip that is not of single examples, or in another geometry.
    """
    trainer, params = observer.trainer, observer.trainer.params
    state = observer.init(jax.random.key(seed))
    rows = jnp.arange(min(trainer.plan.num_examples, 3 * trainer.plan.batch_size))
    geometry = _skewed(observer.tx.geometry(state), seed)
    batch = taken(trainer.examples, rows)
    one, other = (
        jax.jit(clip(trainer.loss_fn))(params, batch, geometry=geometry)
        for clip in (trainer.clip, trainer.oracle)
    )
    gaps = jax.tree.map(
        lambda a, b: np.asarray(a - b, np.float64)[None], one.gradients, other.gradients
    )
    length = norm_in(geometry, jax.tree.leaves(gaps))[0]
    worst = float(length / trainer.plan.l2_clip_norm)
    return Finding(
        f"{worst:.2e} of the clip norm apart", f"{_EXACT:.0e}", worst <= _EXACT
    )


def norm_in(geometry: Geometry, leaves: list[np.ndarray]) -> np.ndarray:
    """Norms of trees with a leading axis in a geometry, in float64.

    Args:
        geometry: weights; coordinates are not applied, a clipped sum is in them.
        leaves: ``[batch, *shape]`` each.

    Returns:
        ``[batch]``.

    Example:
        >>> geometry = Geometry.of({"a": jnp.ones(1), "b": jnp.ones(1)}, [1.0, 2.0])
        >>> norm_in(geometry, [np.full((1, 1), 3.0), np.full((1, 1), 8.0)]).tolist()
        [5.0]
    """
    weights = np.asarray(geometry.weights, np.float64)
    total = np.zeros(len(leaves[0]))
    for leaf, value in zip(geometry.groups.leaves, leaves, strict=True):
        wide = np.asarray(value, np.float64)
        for start, stop, owner in pieces_of(leaf):
            cut = (slice(None),) * (1 + leaf.axis) + (slice(start, stop),)
            part = (wide[cut] if leaf.edges else wide) / weights[owner]
            total += np.sum(part.reshape(len(wide), -1) ** 2, axis=1)
    return np.sqrt(total)


def _skewed(geometry: Geometry, seed: int) -> Geometry:
    """The same groups with unlike weights, as importance makes them."""
    rng = np.random.default_rng(seed)
    weights = np.exp(rng.uniform(-2, 2, len(geometry.weights)))
    facts = ClipFacts(score=geometry.facts and geometry.facts.score)
    weights = jnp.asarray(weights, jnp.float32)
    return dataclasses.replace(geometry, weights=weights, facts=facts)


def sensitivity(observer: Observer, seed: int) -> Finding:
    """How far one example can move the clipped sum, at worst.

    Batches made to break the bound: gradients of all sizes, pairs that cancel, layers
    that are huge or zero, in a geometry with unlike weights. Each is clipped with and
    without its last example.

    Args:
        observer: of the trainer.
        seed: of the batches.

    Returns:
        Fails where the distance exceeds the clip norm, or a score's or metrics' own.
    """
    trainer = observer.trainer
    state = observer.init(jax.random.key(seed))
    geometry = _skewed(observer.tx.geometry(state), seed)
    clip = trainer.clip(inner_product)
    size = sum(np.size(p) for p in jax.tree.leaves(trainer.params))
    cases = int(np.clip(_ENTRIES // (size * _EXAMPLES), 8, _CASES))
    batches = _batches(trainer.params, cases, np.random.default_rng(seed))

    def both(batch: Any) -> Any:
        last = jnp.arange(_EXAMPLES) == _EXAMPLES - 1
        run = lambda mask: clip(  # noqa: E731
            trainer.params, batch, geometry=geometry, is_padding_example=mask
        )
        one, other = run(jnp.zeros(_EXAMPLES, bool)), run(last)
        return jax.tree.map(jnp.subtract, _parts(one), _parts(other))

    gradient, shares, fits, metrics = jax.jit(jax.vmap(both))(batches)
    moved = norm_in(geometry, [np.asarray(x) for x in jax.tree.leaves(gradient)])
    ratios = {
        "gradient": np.max(moved) / trainer.plan.l2_clip_norm,
        "layer shares": np.max(np.linalg.norm(np.asarray(shares, np.float64), axis=1)),
        "counts": 2 * np.max(np.abs(np.asarray(fits))),
        "metrics": np.max(np.linalg.norm(np.asarray(metrics, np.float64), axis=1)),
    }
    worst = max(ratios, key=lambda name: np.nan_to_num(ratios[name], nan=np.inf))
    return Finding(
        f"{ratios[worst]:.7f} of the sensitivity ({worst}, {cases} batches)",
        f"{1 + MARGIN:.6f}",
        bool(ratios[worst] <= 1 + MARGIN),
    )


def _parts(clipped: ClippedGrad) -> Any:
    fits = jnp.zeros(1) if clipped.fits is None else clipped.fits
    metrics = jnp.zeros(1) if clipped.metrics is None else clipped.metrics.total
    return clipped.gradients, clipped.layer_shares, fits, metrics


def _batches(params: Params, cases: int, rng: Any) -> Params:
    """Gradients ``[cases, examples, ...]``: the last pairs cancel or point away."""
    sizes = 10 ** rng.uniform(-3, 3, (cases, _EXAMPLES))
    toward = rng.choice([-1.0, 1.0], (cases, _EXAMPLES))
    toward[::2, -1], sizes[::2, -1] = -1, 2e3  # outweighs what the others sum to
    toward[::2, :-1] = 1

    def leaf(p: Any) -> Any:
        shared = rng.normal(size=(cases, 1, *p.shape))
        own = rng.normal(size=(cases, _EXAMPLES, *p.shape))
        own = own * 10 ** rng.uniform(-4, 0, (cases, 1) + (1,) * p.ndim)
        layer = 10 ** rng.choice([-3.0, 0.0, 3.0], (cases, 1) + (1,) * p.ndim)
        factor = (sizes * toward).reshape(cases, _EXAMPLES, *[1] * p.ndim)
        return jnp.asarray((shared + own) * layer * factor, jnp.float32)

    return jax.tree.map(leaf, params)


def absent(observer: Observer, seed: int) -> Finding:
    """Whether NaN, infinite and padding examples leave no trace (law: zero is absent).

    Args:
        observer: of the trainer.
        seed: of the batch.

    Returns:
        Fails where one of them changes the sum, or makes it no number.
    """
    trainer, bad = observer.trainer, (np.nan, np.inf, -np.inf)
    geometry = observer.tx.geometry(observer.init(jax.random.key(seed)))
    clip = jax.jit(trainer.clip(inner_product))
    rng = np.random.default_rng(seed)
    good = jax.tree.map(lambda p: rng.normal(size=(4, *p.shape)), trainer.params)
    padding = np.arange(4) == 3
    run = lambda batch: clip(  # noqa: E731
        trainer.params,
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch),
        geometry=geometry,
        is_padding_example=jnp.asarray(padding),
    )
    one_less = jax.tree.map(lambda x: _with(x, 2, 0.0), good)
    expected = jax.tree.leaves(run(one_less).gradients)
    worst = 0.0
    for value in (*bad, 1e30):
        place = 2 if value != 1e30 else 3  # 1e30 is a number: only where it is padding
        spoilt = jax.tree.map(lambda x: _with(x, place, value), one_less)  # noqa: B023
        found = jax.tree.leaves(run(spoilt).gradients)
        gaps = [np.max(np.abs(a - b)) for a, b in zip(found, expected, strict=True)]
        worst = max(worst, float(np.max(np.nan_to_num(gaps, nan=np.inf))))
    return Finding(f"the sum moves by {worst:g}", "0", worst == 0)


def _with(values: np.ndarray, row: int, value: float) -> np.ndarray:
    changed = np.array(values)
    changed[row] = value
    return changed


def past_releases(observer: Observer, seed: int) -> Finding:
    """Whether clip norm and geometry are the same for any batch.

    Args:
        observer: of the trainer.
        seed: of the runs.

    Returns:
        Fails where something computed from the current batch steers its clip.
    """
    trainer = observer.trainer
    key = jax.random.key(seed)
    rows, masks, _ = draws(trainer, jax.random.split(key, 1), lambda row: row)
    params, state = trainer.params, observer.init(key)
    clipped, step = jax.jit(observer.others), jax.jit(observer.step)
    first = clipped(params, state, rows[0, 0], masks[0, 0])
    state = step(params, state, first)[1]
    promised = jax.tree.leaves(observer.tx.geometry(state).forgetting())
    bound = np.float32(trainer.plan.l2_clip_norm)
    same = True
    width = len(rows[0, 0])
    for draw in (rows[0, 0], np.arange(width) % 3, np.full(width, 2)):
        mask = np.arange(width) >= max(1, width // 2)
        found = clipped(params, state, draw, mask)
        leaves = jax.tree.leaves(found.geometry)
        same &= len(leaves) == len(promised)
        same &= all(map(np.array_equal, leaves, promised))
        same &= bool(np.float32(found.l2_clip_norm) == bound)
    words = "the same" if same else "not that of earlier releases and the plan"
    return Finding(f"geometry and clip norm are {words}", "the same", same)


def expected_size(observer: Observer, seed: int) -> Finding:
    """Whether a release is divided by the expected batch size, not the drawn one.

    Args:
        observer: of the trainer.
        seed: of the noise.

    Returns:
        Fails where batches of zero gradients that differ in size release anything
        different under the same key.
    """
    trainer = observer.trainer
    state, step = observer.init(jax.random.key(seed)), jax.jit(observer.step)
    clip = jax.jit(trainer.clip(inner_product))
    count, geometry = trainer.plan.batch_size + 5, observer.tx.geometry(state)
    nothing = jax.tree.map(lambda p: jnp.zeros((count, *p.shape)), trainer.params)
    found = []
    for there in (0, 1, count):
        mask = jnp.arange(count) >= there
        total = clip(
            trainer.params, nothing, geometry=geometry, is_padding_example=mask
        )
        after = step(trainer.params, state, total)[1]
        found.append(jax.tree.leaves(release_of(after)))
    same = all(
        np.array_equal(a, b, equal_nan=True)
        for other in found[1:]
        for a, b in zip(found[0], other, strict=True)
    )
    words = "the same" if same else "another"
    return Finding(f"{words} noise for 0, 1 and {count} examples", "the same", same)
