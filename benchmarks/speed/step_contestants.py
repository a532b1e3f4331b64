"""Who is measured by step.py: one function a family, one line of `FAMILIES`.

A contestant is an optimizer and two gradients: one alone, and one that an optimizer's
state may steer, for the whole step. All clip at norm 1 with noise multiplier 1.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import dp_ilg
from step_models import Row

RATE, NORM, NOISE = 1e-3, 1.0, 1.0


class Contestant(NamedTuple):
    """An optimizer, the gradient alone and the gradient of a step."""

    tx: Any
    alone: Callable[[Any, Any], Any]
    steered: Callable[[Any, Any, Any], Any]


class Variant(NamedTuple):
    """A family with its micro-batch; 0 leaves the micro-batch to the family."""

    family: str
    chunk: int

    @property
    def name(self) -> str:
        return f"{self.family}/{self.chunk or 'own'}"


def split(batch: Any, chunk: int) -> Any:
    """Cuts a batch into micro-batches that divide it."""
    return jax.tree.map(lambda x: x.reshape(-1, chunk, *x.shape[1:]), batch)


def ordinary(row: Row, chunk: int, *, unroll: bool = False) -> Contestant:
    """Adam without privacy, in micro-batches that a scan or unrolled code adds up."""

    def alone(params: Any, batch: Any) -> Any:
        if chunk == row.batch_size:
            return jax.grad(row.mean_loss)(params, batch)

        def body(total: Any, piece: Any) -> Any:
            gradient = jax.grad(row.mean_loss)(params, piece)
            return jax.tree.map(jnp.add, total, gradient), None

        zero = jax.tree.map(jnp.zeros_like, params)
        total = jax.lax.scan(body, zero, split(batch, chunk), unroll=unroll)[0]
        return jax.tree.map(lambda g: g * (chunk / row.batch_size), total)

    return Contestant(optax.adam(RATE), alone, lambda p, _, batch: alone(p, batch))


@functools.cache
def plan(batch_size: int) -> dp_ilg.PrivacyPlan:
    """A plan with the noise that all contestants share."""
    return dp_ilg.plan_privacy(
        noise_multiplier=NOISE,
        delta=1e-6,
        num_examples=max(60_000, 4 * batch_size),
        batch_size=batch_size,
        num_steps=10_000,
        l2_clip_norm=NORM,
    )


def ours(
    row: Row, chunk: int, *, engine: str, importance: str = "min_noise_energy"
) -> Contestant:
    """This library: clip, layer scores, noise and Adam."""
    grad_fn = dp_ilg.clipped_grad(
        row.loss_fn, l2_clip_norm=NORM, engine=engine, microbatch_size=chunk or None
    )
    tx = dp_ilg.dp_adam_ilg(
        RATE, plan(row.batch_size), key=jax.random.key(1), importance=importance
    )

    def alone(params: Any, batch: Any) -> Any:
        return grad_fn(params, batch, geometry=dp_ilg.Geometry.uniform(params))

    def steered(params: Any, state: Any, batch: Any) -> Any:
        return grad_fn(params, batch, geometry=tx.geometry(state))

    return Contestant(tx, alone, steered)


def jax_privacy(row: Row, chunk: int) -> Contestant:
    """jax_privacy from PyPI; its loss takes a batch of one as it likes it."""
    clipping = importlib.import_module("jax_privacy.clipping")
    noise = importlib.import_module("jax_privacy.noise_addition")
    whole = chunk == row.batch_size
    alone = clipping.clipped_grad(
        row.mean_loss, l2_clip_norm=NORM, microbatch_size=None if whole else chunk
    )
    tx = optax.chain(
        noise.gaussian_privatizer(stddev=NOISE * NORM, prng_key=jax.random.key(1)),
        optax.scale(1 / row.batch_size),
        optax.adam(RATE),
    )
    return Contestant(tx, alone, lambda p, _, batch: alone(p, batch))


def optax_contrib(row: Row, chunk: int) -> Contestant:
    """Optax: vmapped gradients into its aggregate; alone without noise and mean."""
    if chunk != row.batch_size:
        raise ValueError("Optax takes the gradients of the whole batch.")

    def vmapped(params: Any, batch: Any) -> Any:
        return jax.vmap(jax.grad(row.loss_fn), (None, 0))(params, batch)

    def alone(params: Any, batch: Any) -> Any:
        gradients, tree = jax.tree.flatten(vmapped(params, batch))
        clipped: Any = optax.per_example_global_norm_clip(gradients, NORM)[0]
        return jax.tree.unflatten(tree, clipped)

    key = jax.random.key(1)
    aggregate = optax.contrib.differentially_private_aggregate(NORM, NOISE, key)
    tx = optax.chain(aggregate, optax.adam(RATE))
    return Contestant(tx, alone, lambda p, _, batch: vmapped(p, batch))


FAMILIES: dict[str, Callable[[Row, int], Contestant]] = {
    "ordinary": ordinary,
    "ordinary_unrolled": functools.partial(ordinary, unroll=True),
    "auto": functools.partial(ours, engine="auto"),
    "auto_uniform": functools.partial(ours, engine="auto", importance="uniform"),
    "bookkeeping": functools.partial(ours, engine="bookkeeping"),
    "vmap": functools.partial(ours, engine="vmap"),
    "jax_privacy": jax_privacy,
    "optax": optax_contrib,
}
PRIVATE = tuple(f for f in FAMILIES if not f.startswith("ordinary"))


def missing(family: str) -> str:
    """Why a family cannot be measured here, or an empty string."""
    if family == "jax_privacy" and importlib.util.find_spec("jax_privacy") is None:
        return "jax-privacy is not installed; pip install 'dp_ilg[audit]'"
    if family == "bookkeeping":
        try:
            dp_ilg.clipped_grad(jnp.vdot, l2_clip_norm=1.0, engine="bookkeeping")
        except ValueError as error:
            return str(error)
    return ""


def variants(row: Row, kind: str, families: list[str]) -> list[Variant]:
    """Every family with every micro-batch it is tried at."""
    sizes = {
        "ordinary_unrolled": list(row.unrolled),
        "auto": [0],
        "auto_uniform": [0] if kind == "step" else [],
        "optax": [row.batch_size],
    }
    every = [row.batch_size, *row.chunks]
    return [Variant(f, c) for f in families for c in sizes.get(f, every)]


def function(contestant: Contestant, kind: str) -> Callable[[Any, Any, Any], Any]:
    """What is compiled: (params, state, batch) to the gradient or to the next step."""

    def gradient(params: Any, state: Any, batch: Any) -> Any:
        del state
        return contestant.alone(params, batch)

    def step(params: Any, state: Any, batch: Any) -> Any:
        gradient = contestant.steered(params, state, batch)
        updates, state = contestant.tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return {"gradient": gradient, "step": step}[kind]


def plain(gradient: Any) -> Any:
    """The tree of a gradient, whoever made it."""
    return gradient.gradients if isinstance(gradient, dp_ilg.ClippedGrad) else gradient
