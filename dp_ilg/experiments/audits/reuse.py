"""Checks that noise never meets other data: one release a state, one key a plan.

Both faults leave every single release as it should be, so that no attack on one run
sees them. Whoever has both releases takes the noise off: it is the same in both.
"""

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dp_ilg
from dp_ilg.base import Params, PrivateTransformation
from dp_ilg.experiments.audits.checks import Finding, normal_limit
from dp_ilg.experiments.audits.residuals import Observer
from dp_ilg.experiments.audits.subject import padded, taken

_STEPS = 3  # a state that is not kept shows in the second
_LEVEL = 1e-6  # that a sound trainer fails
_LOUDER = 2.0  # the other plan's noise


def one_release_a_state(observer: Observer, seed: int) -> Finding:
    """Whether the run's own step noises one sum under each state (law: keyed by step).

    The step gets its batch in two chunks, and the noise tells on the host what it was
    given, wherever in the program it is called.

    Args:
        observer: of the trainer.
        seed: of the run.

    Returns:
        Fails where two different sums get the same noise: two updates on one state, or
        a state that is not kept.
    """
    trainer, told = observer.trainer, []
    tx = dp_ilg.chain(
        *[_telling(link, told) for link in trainer.optimizer(_key(seed)).links]
    )
    step = trainer.step(trainer.clip(trainer.loss_fn), tx)
    params = jax.tree.map(jnp.array, trainer.params)  # the step donates them
    state = jax.tree.map(jnp.array, tx.init(params))
    for t in range(min(_STEPS, trainer.plan.num_steps)):
        params, state = step(params, state, _chunks(observer, t))
    jax.block_until_ready(params)
    jax.effects_barrier()
    sums: dict[bytes, set[bytes]] = {}
    for noise, total in told:
        sums.setdefault(noise, set()).add(total)
    most = max(map(len, sums.values()), default=0)
    words = f"{len(told)} updates on {len(sums)} states, at most {most} sums on one"
    return Finding(words, "1 sum a state", most == 1)


def _key(seed: int) -> Any:
    return jax.random.fold_in(jax.random.key(seed), 1)


def _telling(link: Any, told: list) -> Any:
    """The noise, which also says which sum it was given under which state."""
    if getattr(link, "role", "") != "noise":
        return link

    def tell(state: Any, sums: Any) -> None:
        told.append((_hash(state), _hash(sums)))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        jax.debug.callback(tell, _words(state), jax.tree.leaves(updates.gradients))
        return link.update(updates, state, params, **extra)

    return PrivateTransformation(
        link.init, update, role="noise", key=link.key, plan=link.plan
    )


def _words(tree: Any) -> list:
    """Leaves of a state; of a key its words, which callbacks can take."""
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return [
        jax.random.key_data(x) if is_key(x) else x
        for x in map(jnp.asarray, jax.tree.leaves(tree))
    ]


def _hash(leaves: Any) -> bytes:
    digest = hashlib.sha256()
    for leaf in leaves:
        digest.update(np.ascontiguousarray(leaf).tobytes() + b"|")
    return digest.digest()


def _chunks(observer: Observer, step: int) -> list:
    """Everybody, in two chunks of other people."""
    count = observer.trainer.plan.num_examples
    halves = np.array_split(np.roll(np.arange(count), step), 2)
    pairs = [padded(rows, -(-count // 2)) for rows in halves]
    return [
        (taken(observer.trainer.examples, rows), jnp.asarray(mask))
        for rows, mask in pairs
    ]


def one_key_a_plan(observer: Observer, seed: int) -> Finding:
    """Whether runs of two plans under one seed have noise and batches of their own.

    Releases s + z C xi of one sum under two multipliers and one xi give s exactly:
    (z' r - z r') / (z' - z). Shared batches make the second run's sampling no secret.

    Args:
        observer: of the trainer.
        seed: unused; the trainer's keys have a seed of their own.

    Returns:
        Fails where the noises of the two runs are correlated, or their batches the
        same.
    """
    del seed
    plan = observer.trainer.plan
    stages = tuple((steps, _LOUDER * z) for steps, z in plan.stages)
    plans = plan, dataclasses.replace(plan, stages=stages)
    one, other = (observer.trainer.keys(p) for p in plans)
    same_batches = bool((one.sampler == other.sampler).all())
    first, second = (_noise(observer, keys.optimizer) for keys in (one, other))
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    found = float(first @ second / lengths)
    limit = float(normal_limit(_LEVEL, 1) / np.sqrt(first.size))
    words = "the same batches" if same_batches else "other batches"
    return Finding(
        f"two plans under one seed: {words}, noises correlated by {found:+.3f}",
        f"other batches, at most {limit:.3f}",
        not same_batches and abs(found) <= limit,
    )


def _noise(observer: Observer, key: Any) -> np.ndarray:
    """The standard normal numbers of a run with nobody in its batches."""
    empty = jnp.zeros(1, int), jnp.ones(1, bool)

    @jax.jit
    def step(params: Params, before: Any) -> tuple:
        total = observer.others(params, before, *empty)
        params, after = observer.step(params, before, total)
        return params, after, observer.left(before, after, total).gradient

    params, state, found = observer.trainer.params, observer.init(key), []
    for _ in range(observer.trainer.plan.num_steps):
        params, state, left = step(params, state)
        found += [np.asarray(x, np.float64).ravel() for x in left]
    return np.concatenate(found)
