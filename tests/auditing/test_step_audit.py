"""Sound steps pass the audit, and every fault planted in one is found by its check."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.auditing import audit_step
from dp_ilg.auditing.step_checks import NOISE_CHECKS, STEP_CHECKS

PLAN = dp_ilg.plan_privacy(
    noise_multiplier=1.0,
    delta=1e-5,
    num_examples=1000,
    batch_size=100,
    num_steps=10,
    score_budget=0,
)
EXAMPLE = np.linspace(1, 2, 6).astype("float32"), np.float32(5)
PARAMS = {
    "b": jnp.zeros(()),
    "v": jnp.linspace(-1, 1, 4),
    "w": jnp.linspace(-0.2, 0.3, 24).reshape(6, 4),
}


def loss(params, example):
    x, y = example
    return jnp.square(x @ params["w"] @ params["v"] + params["b"] - y)


# --- a step by hand, whose parts can be put in wrong ---------------------------------


def clipped(grads, mask):
    norms = jnp.sqrt(
        sum(jnp.sum(g.reshape(len(g), -1) ** 2, 1) for g in grads.values())
    )
    factor = jnp.where(mask, 0, jnp.minimum(1, 1 / norms))
    return {k: jnp.einsum("b...,b->...", g, factor) for k, g in grads.items()}


def noise(key, like, scale=1.0):
    keys = jax.random.split(key, len(like))
    return {
        k: scale * jax.random.normal(own, x.shape)
        for own, (k, x) in zip(keys, like.items(), strict=True)
    }


def divided(total, drawn, mask):
    return {k: (total[k] + drawn[k]) / PLAN.batch_size for k in total}


def fresh(key):
    return tuple(jax.random.split(key))


def per_example(params, batch):
    return jax.vmap(jax.grad(loss), (None, 0))(params, batch)


def by_hand(
    tx=None, clip=clipped, draw=noise, divide=divided, split=fresh, grads=per_example
):
    """A step of DP-SGD, any part of which may be another."""
    tx = optax.sgd(0.1) if tx is None else tx

    def step(state, batch, is_padding_example):
        params, opt_state, key = state
        key, own = split(key)
        total = clip(grads(params, batch), is_padding_example)
        release = divide(total, draw(own, total), is_padding_example)
        updates, opt_state = tx.update(release, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, key

    return step, (PARAMS, tx.init(PARAMS), jax.random.key(0))


def audited(step, init, plan=PLAN, trials=256, **options):
    return audit_step(step, init, EXAMPLE, plan, trials=trials, **options)


# --- sound steps ---------------------------------------------------------------------


def of_the_library(**options):
    plan = options.pop("plan", PLAN)
    tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(1), **options)
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=plan.l2_clip_norm, engine="vmap")

    def step(state, batch, mask):
        params, state = state
        geometry = tx.geometry(state)
        total = grad_fn(params, batch, geometry=geometry, is_padding_example=mask)
        updates, state = tx.update(total, state, params)
        return optax.apply_updates(params, updates), state

    return step, (PARAMS, tx.init(PARAMS))


SOUND = {
    "sgd": by_hand,
    "adam": lambda: by_hand(optax.adam(0.1)),
    "momentum": lambda: by_hand(optax.sgd(0.1, momentum=0.9)),
    "library": lambda: of_the_library(source="public"),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_step_passes(name):
    found = audited(*SOUND[name]())
    assert found.verdict == "not refuted", str(found)
    assert found.lower_bound <= found.claim
    checks = {x.check: x for x in found.findings}
    assert list(checks) == [*STEP_CHECKS, *NOISE_CHECKS]
    share = float(checks["one example"].found.split()[0])
    assert share == pytest.approx(1, abs=0.06)  # all of the noise is needed


@pytest.mark.slow
def test_a_charged_score_passes():
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0,
        delta=1e-5,
        num_examples=1000,
        batch_size=100,
        num_steps=10,
        score_budget=0.3,
    )
    found = audited(*of_the_library(plan=plan), plan=plan)
    assert found.verdict == "not refuted", str(found)


def test_the_key_of_dropout_is_told_from_that_of_noise():
    def step(state, batch, mask):
        params, key, own = state
        x, y = batch
        kept = jax.random.bernoulli(own, 0.5, x.shape)
        total = clipped(per_example(params, (x * kept, y)), mask)
        key, fresh_key = jax.random.split(key)
        release = divided(total, noise(fresh_key, total), mask)
        after = jax.tree.map(lambda p, r: p - 0.1 * r, params, release)
        return after, key, jax.random.split(own)[0]

    found = audited(step, (PARAMS, jax.random.key(0), jax.random.key(1)), trials=128)
    assert found.verdict == "not refuted", str(found)


def test_the_aggregate_of_optax_passes_under_its_raw_key():
    aggregate = optax.contrib.differentially_private_aggregate(1.0, 1.0, 0)

    def step(state, batch, mask):
        params, state = state
        grads = per_example(params, batch)
        grads = jax.tree.map(lambda g: jnp.einsum("b...,b->b...", g, ~mask), grads)
        release, state = aggregate.update(grads, state, params)
        return optax.apply_updates(params, release), state

    found = audited(step, (PARAMS, aggregate.init(PARAMS)))
    assert found.verdict == "not refuted", str(found)


def test_a_function_of_a_key_and_a_step_without_mask():
    whole, state = by_hand()

    def step(state, batch):
        mask = jnp.zeros(len(batch[1]), bool)
        key = jax.random.wrap_key_data(state["key"].ravel())
        params, _, _ = whole(
            (state["params"], (optax.EmptyState(),) * 2, key), batch, mask
        )
        return {"params": params, "key": state["key"]}

    def init(key):  # of a state whose keys cannot be told
        return {"params": PARAMS, "key": jax.random.key_data(key)[None]}

    found = audit_step(
        step, init, EXAMPLE, PLAN, trials=256, params_of=lambda s: s["params"]
    )
    assert found.verdict == "not refuted", str(found)


def test_a_step_that_cannot_be_traced_is_run_key_by_key():
    step, state = by_hand()
    compiled = jax.jit(step)

    def looking(state, batch, mask):
        assert float(state[0]["v"][0]) < 0
        return compiled(state, batch, mask)

    once = dp_ilg.plan_privacy(
        noise_multiplier=1.0,
        delta=1e-5,
        num_examples=1000,
        batch_size=100,
        num_steps=1,
        score_budget=0,
    )
    found = audited(looking, state, once, trials=128)
    assert found.verdict == "not refuted", str(found)


# --- planted faults ------------------------------------------------------------------


def jointly(grads, mask):
    """Optax's clip of a gradient, on the whole batch of them."""
    kept = jax.tree.map(lambda g: jnp.einsum("b...,b->b...", g, ~mask), grads)
    joined, _ = optax.clip_by_global_norm(1.0).update(kept, optax.EmptyState())
    return jax.tree.map(lambda g: jnp.sum(g, 0), joined)


def group_by_group(grads, mask):
    """Each leaf to C, not to C / sqrt(leaves)."""
    return {k: clipped({k: g}, mask)[k] for k, g in grads.items()}


def mean_first(total, drawn, mask):
    """The mean of the rows that are there, then noise."""
    count = jnp.maximum(jnp.sum(~mask), 1)
    return {k: total[k] / count + drawn[k] / PLAN.batch_size for k in total}


def mean_last(total, drawn, mask):
    """Sum and noise, by the number of rows that are there."""
    count = jnp.maximum(jnp.sum(~mask), 1)
    return {k: (total[k] + drawn[k]) / count for k in total}


def normed(params, batch):
    """The loss of rows that a batch statistic has mixed."""
    x, y = batch

    def losses(params):
        h = x @ params["w"]
        h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-3)
        return jnp.square(h @ params["v"] + params["b"] - y)

    return jax.jacobian(losses)(params)


def views(params, batch):
    """Two views of a row, clipped as if they were two examples."""
    one = per_example(params, batch)
    other = per_example(params, (1.1 * batch[0], batch[1]))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), one, other)


def clipped_views(grads, mask):
    return clipped(grads, jnp.concatenate([mask, mask]))


def leaking(value):
    """A sound step that also keeps something of the batch."""
    inner, state = by_hand()

    def step(state, batch, is_padding_example):
        after = inner(state[0], batch, is_padding_example)
        return after, value(state[0][0], batch, is_padding_example)

    return step, (
        state,
        value(PARAMS, (jnp.zeros((1, 6)), jnp.zeros(1)), np.ones(1, bool)),
    )


def mean_loss(params, batch, mask):
    losses = jax.vmap(loss, (None, 0))(params, batch)
    return jnp.sum(jnp.where(mask, 0, losses))


def augmented_once(key):
    """The key is never split."""
    return key, key


def one_key(key, like):
    return {k: jax.random.normal(key, x.shape) for k, x in like.items()}


def one_number(key, like):
    drawn = noise(key, {k: jnp.zeros(()) for k in like})
    return {k: jnp.broadcast_to(drawn[k], x.shape) for k, x in like.items()}


def not_on(name):
    return lambda key, like: noise(key, like) | {name: jnp.zeros_like(like[name])}


def flat(key, like):
    """The right variance, another law."""
    wide = noise(key, like)
    root = 12**0.5
    return {k: root * (jax.scipy.stats.norm.cdf(x) - 0.5) for k, x in wide.items()}


FAULTS = {
    "no clip": (
        dict(
            clip=lambda g, m: (
                clipped(g, m) | {"v": jnp.einsum("b...,b->...", g["v"], ~m)}
            )
        ),
        "one example",
    ),
    "clip over the batch": (dict(clip=jointly), "on its own"),
    "clip of each group to C": (dict(clip=group_by_group), "one example"),
    "mean of the drawn, then noise": (dict(divide=mean_first), "on its own"),
    "mean of the drawn, noise too": (dict(divide=mean_last), "one divisor"),
    "batch statistics": (dict(grads=normed), "on its own"),
    "mask forgotten": (
        dict(clip=lambda g, m: clipped(g, jnp.zeros_like(m))),
        "masked rows",
    ),
    "views one by one": (dict(grads=views, clip=clipped_views), "one example"),
    "no noise": (dict(draw=lambda k, x: noise(k, x, 0.0)), "noise is there"),
    "no noise in a leaf": (dict(draw=not_on("v")), "noise is there"),
    "noise a tenth too small": (
        dict(draw=lambda k, x: noise(k, x, 0.9)),
        "one example",
    ),
    "noise far too small": (dict(draw=lambda k, x: noise(k, x, 0.1)), "trials"),
    "noise that repeats": (dict(split=augmented_once), "fresh noise"),
    "one key for all leaves": (dict(draw=one_key), "fresh noise"),
    "one number for a leaf": (dict(draw=one_number), "fresh noise"),
    "another law": (dict(draw=flat), "law of the noise"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name):
    parts, check = FAULTS[name]
    found = audited(*by_hand(**parts))
    assert check in found.failed, str(found)
    assert found.verdict == "refuted"


LEAKS = {
    "the loss": mean_loss,
    "a count": lambda params, batch, mask: jnp.sum(~jnp.asarray(mask)),
}


@pytest.mark.parametrize("name", LEAKS)
def test_what_the_state_keeps_of_the_batch_is_found(name):
    found = audited(*leaking(LEAKS[name]))
    assert found.failed == ["noise is there"], str(found)


def test_a_leak_out_of_an_adversarys_sight_is_not_one():
    found = audited(*leaking(mean_loss), params_of=lambda state: state[0][0])
    assert found.verdict == "not refuted"


def test_a_nan_example_that_shows_is_remarked():
    step, state = by_hand()
    example = EXAMPLE[0] * 1e18, EXAMPLE[1]
    found = audit_step(
        step,
        state,
        example,
        PLAN,
        trials=128,
        others=(EXAMPLE[0][None], np.full(1, 5, "float32")),
    )
    notes = {x.check: x for x in found.findings if x.holds is None}
    assert "NaN from the example" in notes["not a number"].found


@functools.cache
def sound():
    return by_hand()


def test_what_cannot_be_audited_is_said_in_a_sentence():
    step, state = sound()
    with pytest.raises(TypeError, match="step is int, but must be a function"):
        audit_step(3, state, EXAMPLE, PLAN)
    with pytest.raises(ValueError, match="trials is 5, but must be"):
        audited(step, state, trials=5)
    with pytest.raises(ValueError, match="no PRNG key.*give init as a function"):
        audited(step, state[:2] + (jnp.zeros(2),))
    with pytest.raises(ValueError, match="others has a leaf of shape"):
        audited(step, state, others=EXAMPLE)
    with pytest.raises(ValueError, match="example has no arrays"):
        audit_step(step, state, (), PLAN)
    with pytest.raises(ValueError, match="No part of the state is a sum plus noise"):
        audited(*by_hand(optax.sign_sgd(0.1)))
