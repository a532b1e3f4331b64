"""Canaries: examples made to be noticed, and the runs of a trainer with and without.

The adversary of the definition knows everything but whether the canary is in the data
and the noise: every release of every step, the other examples and which of them were
drawn. Its best test (Neyman and Pearson) adds up, over the steps, the log-likelihood
ratio of the canary's place in the release, drawn with probability q. A second, weaker
adversary sees the final model alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg.base import Params
from dp_ilg.experiments.audits.blocks import Blocks
from dp_ilg.experiments.audits.residuals import (
    Observer,
    Seen,
    draws,
    inner_product,
)
from dp_ilg.experiments.audits.subject import AuditedTrainer, taken
from dp_ilg.geometry.geometry import Geometry

_LOUD, _FAINT = 1e3, 1e-6  # a canary's norm in clip norms: clipped, or nearly nothing
_ENTRIES = 3e6  # parameters, times runs, held at once
_RUNS = 2048  # runs held at once at most
ADVERSARIES = ("releases", "model")  # all releases of all steps, or the last model


class Family(NamedTuple):
    """Canaries that share a loss.

    Attributes:
        names: rows of the audit.
        loss_fn: of one canary.
        examples: the canaries, stacked.
        rivals: what stands in their place where one record is replaced, stacked.
    """

    names: tuple[str, ...]
    loss_fn: Callable[[Params, Any], Any]
    examples: Any
    rivals: Any


@dataclass(frozen=True)
class Attack:
    """The scores of one canary.

    Attributes:
        canary: its name.
        adversary: one of `ADVERSARIES`, by what it sees.
        inside: of the runs with it, ``[runs]``.
        outside: of the runs without.
    """

    canary: str
    adversary: str
    inside: np.ndarray
    outside: np.ndarray


# name -> geometry -> direction by group, and the canary's norm in clip norms
GRADIENT_CANARIES: dict[str, Callable[[Geometry], tuple[np.ndarray, float]]] = {
    "least noised layer": lambda g: (_one(g, least=True), _LOUD),
    "most noised layer": lambda g: (_one(g, least=False), _LOUD),
    "all layers": lambda g: (_noise(g), _LOUD),
    "score": lambda g: (_one(g, least=True), _FAINT),
}


def _noise(geometry: Geometry) -> np.ndarray:
    return np.asarray(geometry.noise_scale(), np.float64)


def _one(geometry: Geometry, *, least: bool) -> np.ndarray:
    scales = _noise(geometry)
    place = np.argmin(scales) if least else len(scales) - 1 - np.argmax(scales[::-1])
    return np.eye(len(scales))[place]


def families(observer: Observer, seed: int) -> list[Family]:
    """The canaries of a trainer: gradients of known direction, and a wrong label.

    Args:
        observer: of the trainer.
        seed: of the directions, and of the pilot run that finds out which layers get
            most and least noise.

    Returns:
        Two families. A canary for the score is left out where nothing is scored.

    Example:
        >>> from dp_ilg.experiments.config.schema import Config
        >>> from dp_ilg.experiments.audits.subject import audited_trainer
        >>> from dp_ilg.experiments.audits.residuals import observe
        >>> found = families(observe(audited_trainer(Config(), max_steps=2)), 0)
        >>> [name for family in found for name in family.names][-2:]
        ['score', 'wrong label']
    """
    geometry = _pilot(observer, seed)
    rng = np.random.default_rng(seed)
    names = [
        name
        for name in GRADIENT_CANARIES
        if observer.place is not None or name != "score"
    ]
    trees = [
        _direction(observer, geometry, rng, *GRADIENT_CANARIES[n](geometry))
        for n in names
    ]
    examples = jax.tree.map(lambda *parts: jnp.stack(parts), *trees)
    rivals = jax.tree.map(jnp.negative, examples)
    gradients = Family(tuple(names), inner_product, examples, rivals)
    return [gradients, _mislabelled(observer.trainer)]


def _pilot(observer: Observer, seed: int) -> Geometry:
    """The geometry after one run."""
    keys = jax.random.split(jax.random.key(seed), 2)
    rows, masks, _ = draws(observer.trainer, keys[1:], lambda row: row)
    params, state = observer.trainer.params, observer.init(keys[0])

    @jax.jit
    def step(params: Params, state: Any, rows: Any, mask: Any) -> tuple:
        return observer.step(params, state, observer.others(params, state, rows, mask))

    for row, mask in zip(rows[:, 0], masks[:, 0], strict=True):
        params, state = step(params, state, row, mask)
    return observer.tx.geometry(state)


def _direction(
    observer: Observer, geometry: Geometry, rng: Any, by_group: Any, norm: float
) -> Params:
    """A gradient whose groups have norms in these proportions."""
    groups, plan = geometry.groups, observer.trainer.plan
    params, treedef = jax.tree.flatten(observer.trainer.params)
    draw = [jnp.asarray(rng.normal(size=p.shape), jnp.float32) for p in params]
    scale = jnp.asarray(by_group / np.linalg.norm(by_group), jnp.float32)
    factors = groups.expand(scale / groups.norms(draw))
    size = norm * plan.l2_clip_norm
    if norm > 1:
        size *= float(np.max(_noise(geometry)))
    leaves = [x * f * size for x, f in zip(draw, factors, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


def _mislabelled(trainer: AuditedTrainer) -> Family:
    x, y = taken(trainer.examples, jnp.array([trainer.plan.num_examples - 1]))
    wrong = (y + 1) % trainer.num_classes
    return Family(("wrong label",), trainer.loss_fn, (x, wrong), (x, y))


def attacks(
    observer: Observer, runs: int, seed: int, told: Callable[[str], Any] | None = None
) -> list[Attack]:
    """Makes runs with and without every canary and scores them.

    Args:
        observer: of the trainer.
        runs: of each kind; the runs without a canary serve all canaries.
        seed: of batches and noise.
        told: called with a line after every kind of run.

    Returns:
        Two attacks a canary, one for each adversary.

    Privacy: bounds hold for the plan's neighbouring relation: a canary that is there
        or not, or one that takes another's place.

    Example:
        >>> import inspect
        >>> list(inspect.signature(attacks).parameters)
        ['observer', 'runs', 'seed', 'told']
    """
    kinds = families(observer, seed)
    replaced = observer.trainer.plan.neighboring_relation == "replace_one"
    if replaced:
        both = lambda a, b: jnp.concatenate([a, b])  # noqa: E731
        kinds = [
            k._replace(examples=jax.tree.map(both, k.examples, k.rivals)) for k in kinds
        ]
    places, count = _places(kinds, replaced)
    step = _compiled(observer, kinds)
    worlds = {world for pair in places.values() for world in pair}
    scores = {}
    for number, world in enumerate(sorted(worlds)):
        key = jax.random.fold_in(jax.random.key(seed), number)
        scores[world] = _world(observer, kinds, step, (key, runs, world, count))
        if told is not None:
            told(f"runs {number + 1} of {len(worlds)} kinds done")
    return list(_compared(places, scores))


def _places(kinds: list[Family], replaced: bool) -> tuple[dict, int]:
    """The worlds each canary is seen in and not; world -1 is without any."""
    places, start = {}, 0
    for kind in kinds:
        for place, name in enumerate(kind.names):
            inside = start + place
            places[name] = (inside, inside + len(kind.names) if replaced else -1)
        start += len(kind.names) * (2 if replaced else 1)
    return places, start


def _compared(places: dict, scores: dict) -> Iterator[Attack]:
    for name, (inside, outside) in places.items():
        for adversary in ADVERSARIES:
            with_it, without = (
                _difference(scores[world][adversary], inside, outside)
                for world in (inside, outside)
            )
            yield Attack(name, adversary, with_it, without)


def _difference(scores: np.ndarray, inside: int, outside: int) -> np.ndarray:
    """For the canary, and against what stands in its place, if anything does."""
    return scores[:, inside] - (scores[:, outside] if outside >= 0 else 0)


def _world(
    observer: Observer, kinds: list[Family], step: Any, which: tuple
) -> dict[str, np.ndarray]:
    """Scores ``[runs, canaries]`` of runs in which one canary, or none, is present."""
    key, runs, world, count = which
    held = _parameters(observer) * observer.trainer.plan.bands
    size = int(np.clip(_ENTRIES // held, 1, _RUNS))
    found = []
    for start in range(0, runs, size):
        length = min(size, runs - start)
        keys = jax.random.split(jax.random.fold_in(key, start), (2, length))
        found.append(_runs(observer, kinds, step, keys, np.arange(count) == world))
    return {name: np.concatenate([f[name] for f in found]) for name in found[0]}


def _runs(
    observer: Observer, kinds: list[Family], step: Any, keys: Any, present: np.ndarray
) -> dict[str, np.ndarray]:
    trainer = observer.trainer
    last = trainer.plan.num_examples - 1
    rows, masks, drawn = draws(trainer, keys[0], lambda row: row[row != last])
    params = observer.many_params(len(keys[0]))
    state, blocks = (
        observer.states(keys[1]),
        Blocks(trainer.plan, _parts(trainer, keys[0])),
    )
    for t in range(trainer.plan.num_steps):
        joins = jnp.asarray(drawn[t][:, None] & present)
        params, state, told = step(params, state, rows[t], masks[t], joins)
        blocks.add(*told)
    final = [
        jax.vmap(lambda p, k=k: jax.vmap(lambda e: -k.loss_fn(p, e))(k.examples))(
            params
        )
        for k in kinds
    ]
    last_scores = np.asarray(jnp.concatenate(final, axis=1), np.float64)
    seen, model = ADVERSARIES
    return {seen: blocks.total(), model: last_scores}


def _compiled(observer: Observer, kinds: list[Family]) -> Any:
    """One step of many runs: parameters, states, and what `Blocks` is told."""
    trainer = observer.trainer

    def one(params: Params, state: Any, rows: Any, mask: Any, joins: Any) -> tuple:
        geometry = observer.tx.geometry(state)
        known = observer.others(params, state, rows, mask)
        total, moved, start = known, [], 0
        for kind in kinds:
            clip = trainer.clip(kind.loss_fn)
            count = jax.tree.leaves(kind.examples)[0].shape[0]
            absent = ~joins[start : start + count]
            total = total + clip(
                params, kind.examples, geometry=geometry, is_padding_example=absent
            )
            start += count

            def alone(example: Any, clip: Any = clip) -> Seen:
                batch = jax.tree.map(lambda x: x[None], example)
                return observer.moved(state, clip(params, batch, geometry=geometry))

            moved.append(jax.vmap(alone)(kind.examples))
        params, after = observer.step(params, state, total)
        left = observer.left(state, after, known)
        noise = observer.tau(state), observer.metrics_multiplier(state)
        shifts = jax.tree.map(lambda *parts: jnp.concatenate(parts), *moved)
        beside = _beside(left, shifts, noise)
        return params, after, (left.gradient, shifts.gradient, beside)

    return jax.jit(observer.over_runs(one))


def _beside(left: Seen, moved: Seen, noise: tuple[Any, Any]) -> Any:
    """Log of how much likelier score and metrics are with each canary, if drawn."""

    def ratio(canary: Seen) -> Any:
        pairs = zip(left[1:], canary[1:], noise, strict=True)
        scaled = [(own / sigma, other / sigma) for own, other, sigma in pairs]
        return sum(jnp.vdot(w, m) - jnp.vdot(m, m) / 2 for w, m in scaled)

    return jax.vmap(ratio)(moved)


def _parts(trainer: AuditedTrainer, keys: Any) -> np.ndarray:
    """The part that the canary, the last example, belongs to in each run."""
    if trainer.plan.bands == 1:
        return np.zeros(len(keys), int)
    last = np.array([trainer.plan.num_examples - 1])
    samplers: list[Any] = [trainer.sampler(key) for key in keys]
    return np.array([int(sampler.part_of(last)[0]) for sampler in samplers])


def _parameters(observer: Observer) -> int:
    return sum(np.size(p) for p in jax.tree.leaves(observer.trainer.params))
