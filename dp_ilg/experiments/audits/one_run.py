"""Auditing in one run: many canaries, half of them in the data, one training run.

Canary k is a gradient along one entry of the parameters, so that canaries do not get
into each other's way; a fair coin decides whether it is in the data, and the trainer's
sampler in which steps it takes part. An auditor who saw all releases guesses the coins.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg.base import Params
from dp_ilg.experiments.audits.blocks import Blocks
from dp_ilg.experiments.audits.residuals import Observer
from dp_ilg.experiments.audits.subject import padded

_LOUD = 1e4  # a canary's norm in clip norms
_ENTRIES = 2e7  # gradient entries held at once, which bounds the number of canaries


@dataclass(frozen=True)
class OneRun:
    """The canaries of one run and how the auditor scored them.

    Attributes:
        inside: scores of the canaries that were in the data.
        outside: of those that were not.
    """

    inside: np.ndarray
    outside: np.ndarray


def one_run(observer: Observer, canaries: int, seed: int) -> OneRun:
    """Trains once with many canaries and scores each.

    Args:
        observer: of the trainer.
        canaries: how many; at most one for every second parameter, and as many as fit.
        seed: of coins, batches and noise.

    Returns:
        Scores: the log-likelihood ratio of each canary's entry, over all steps.

    Privacy: the coins are independent, so what the scores show about them bounds
        epsilon for adding or removing one example.

    Example:
        >>> from dp_ilg.experiments.config.schema import Config
        >>> from dp_ilg.experiments.audits.subject import audited_trainer
        >>> from dp_ilg.experiments.audits.residuals import observe
        >>> found = one_run(observe(audited_trainer(Config(), max_steps=2)), 40, 0)
        >>> len(found.inside) + len(found.outside)
        40

    Reference: Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1)
        training run".
    """
    rng = np.random.default_rng(seed)
    places = _places(observer, canaries, rng)
    coins = rng.random(len(places)) < 0.5
    scores = _scores(observer, places, coins, seed)
    return OneRun(scores[coins], scores[~coins])


def _places(observer: Observer, canaries: int, rng: Any) -> np.ndarray:
    """Which entries of the flattened trained parameters are canaries."""
    geometry = observer.tx.geometry(observer.init(jax.random.key(0)))
    trained = [
        np.full(leaf.shape, bool(leaf.groups)).ravel()
        for leaf in geometry.groups.leaves
    ]
    entries = np.flatnonzero(np.concatenate(trained))
    size = sum(map(len, trained))
    rate = observer.trainer.plan.sampling_prob
    most = min(len(entries) // 2, int(_ENTRIES / size / rate), canaries)
    return rng.choice(entries, max(2, most), replace=False)


def _scores(
    observer: Observer, places: np.ndarray, coins: np.ndarray, seed: int
) -> np.ndarray:
    """Log-likelihood ratios, summed over the steps of one run."""
    trainer = observer.trainer
    plan, count, rounds = trainer.plan, len(places), []
    keys = jax.random.split(jax.random.key(seed), 1 + -(-count // plan.num_examples))
    params, state = trainer.params, observer.init(keys[0])
    samplers = [trainer.sampler(key) for key in keys[1:]]
    drawn = np.stack([_drawn(samplers, t, plan, count) for t in range(plan.num_steps)])
    step = _compiled(observer, jnp.asarray(places))
    width = int(max(1, np.max(np.sum(drawn & coins, axis=1))))
    for who in drawn & coins:
        rows, mask = padded(np.flatnonzero(who), width)
        params, state, *seen = step(params, state, rows, mask)
        rounds.append(seen)
    parts = np.concatenate([_parts(sampler, plan) for sampler in samplers])[:count]
    blocks = Blocks(plan, parts)
    for left, level in rounds:
        moved = jnp.full((count, 1, 1), level)
        blocks.add([left[:, None]], [moved], jnp.zeros((count, 1)))
    return blocks.total()[:, 0]


def _parts(sampler: Any, plan: Any) -> np.ndarray:
    """The part that each example belongs to; 0 where there is one."""
    everybody = np.arange(plan.num_examples)
    return sampler.part_of(everybody) if plan.bands > 1 else 0 * everybody


def _drawn(samplers: list, step: int, plan: Any, count: int) -> np.ndarray:
    """Who takes part, by as many of the trainer's samplers as it takes for all."""
    who = np.zeros((len(samplers), plan.num_examples), bool)
    for row, sampler in zip(who, samplers, strict=True):
        row[np.asarray(sampler.indices(step))] = True
    return who.ravel()[:count]


def _compiled(observer: Observer, places: Any) -> Any:
    """One step with the canaries as its batch."""
    trainer = observer.trainer
    flat = lambda leaves: jnp.concatenate([x.ravel() for x in leaves])  # noqa: E731

    def along(params: Params, place: Any) -> Any:
        entry = flat(jax.tree.leaves(params))[place]
        return _LOUD * trainer.plan.l2_clip_norm * entry

    clip = trainer.clip(along)

    def step(params: Params, state: Any, rows: Any, mask: Any) -> tuple:
        geometry = observer.tx.geometry(state)
        run = lambda batch, absent: clip(  # noqa: E731
            params, batch, geometry=geometry, is_padding_example=absent
        )
        nobody = run(places[rows], jnp.ones_like(mask))
        total = run(places[rows], mask)
        level = _level(observer, state, run, places)
        new, after = observer.step(params, state, total)
        left = _entries(observer, observer.left(state, after, nobody).gradient)[places]
        return new, after, left, level

    return jax.jit(step)


def _entries(observer: Observer, leaves: list) -> Any:
    """Whitened leaves as one array, with zeros for frozen ones."""
    params = jax.tree.leaves(observer.trainer.params)
    whole = [
        jnp.broadcast_to(x, p.shape).ravel() if x.size else jnp.zeros(np.size(p))
        for x, p in zip(leaves, params, strict=True)
    ]
    return jnp.concatenate(whole)


def _level(observer: Observer, state: Any, run: Any, places: Any) -> Any:
    """How far a drawn canary moves its own entry, in units of the noise.

    The least of a few canaries: for the others the score is a little less than best.
    """
    few = places[:: max(1, len(places) // 8)]

    def own(place: Any) -> Any:
        moved = observer.moved(state, run(place[None], jnp.zeros(1, bool)))
        return _entries(observer, moved.gradient)[place]

    return jnp.min(jnp.abs(jax.vmap(own)(few))) * jnp.sign(own(few[0]))
