"""Every fault planted in a sound trainer is found, by the check meant for it."""

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting import pld

import dp_ilg
from dp_ilg.base import PrivateTransformation
from dp_ilg.clipping.bookkeeping import factors
from dp_ilg.experiments.audits.report import CHECKS, gather
from dp_ilg.experiments.runs.keys import derived_keys
from dp_ilg.noise.add_noise import (
    AddImportanceNoiseState,
    add_importance_noise,
    noise_stddev,
)
from dp_ilg.optimizers.importance import score_layer_importance
from dp_ilg.optimizers.metrics import release_metrics
from dp_ilg.training.step import make_train_step
from tests.helpers.audit_scene import scene_plan, trainer, with_links

SOUND = trainer()
PLAN = SOUND.plan
METRICS = {
    "loss": dp_ilg.Metric(lambda loss, aux: loss, high=3.0),
    "low": dp_ilg.Metric(lambda loss, aux: loss < 1),
}
MEASURED_PLAN = scene_plan(metric_budget=0.2)


def replaced(**parts):
    return dataclasses.replace(SOUND, **parts)


def swapped(role, make):
    """The chain with one link made anew."""
    return with_links(
        SOUND,
        lambda links, key: [
            make(link, key) if getattr(link, "role", "") == role else link
            for link in links
        ],
    )


# --- noise ---------------------------------------------------------------------------


def less_noise(factor):
    quieter = dataclasses.replace(
        PLAN, stages=tuple((n, factor * z) for n, z in PLAN.stages)
    )

    def make(link, key):
        noise = add_importance_noise(quieter, key=jax.random.fold_in(key, 7))
        return renamed(noise, PLAN)

    return swapped("noise", make)


def renamed(link, plan):
    """A link that says it follows another plan than it does."""
    facts = {n: getattr(link, n) for n in ("role", "key", "geometry", "importance")}
    return PrivateTransformation(link.init, link.update, plan=plan, **facts)


def unnoised_score():
    silent = scene_plan(stages=((6, 1e-9),))

    def make(link, key):
        key = jax.random.fold_in(key, 8)
        score = score_layer_importance("paper", silent, key=key, layers="leaf")
        return renamed(score, PLAN)

    return swapped("score", make)


def uncharged_score():
    """All of the budget for the gradient, and a score on top of it."""
    charged = scene_plan(score_budget=0.0)
    base = trainer(charged, importance="uniform")
    scored = scene_plan(score_budget=0.1)

    def change(links, key):
        score = score_layer_importance("paper", scored, key=key, layers="leaf")
        return [
            renamed(score, charged) if getattr(link, "role", "") == "score" else link
            for link in links
        ]

    return with_links(base, change)


def measured():
    """A sound trainer that releases metrics."""
    return trainer(MEASURED_PLAN, metrics=METRICS)


def other_metrics(plan, base, claim):
    """Metrics released by another plan than the trainer claims."""

    def change(links, key):
        own = release_metrics(plan, METRICS, key=jax.random.fold_in(key, 9))
        facts = {"role": "metric", "metrics": own.metrics, "key": own.key}
        verb = PrivateTransformation(own.init, own.update, plan=claim, **facts)
        links = [x for x in links if getattr(x, "role", "") != "metric"]
        return [links[0], verb, *links[1:]]

    return with_links(base, change)


def unnoised_metrics():
    silent = scene_plan(stages=((6, 1e-9),), metric_budget=0.2)
    return other_metrics(silent, measured(), MEASURED_PLAN)


def uncharged_metrics():
    """Gradient and scores have the whole budget, and metrics come on top."""
    bare = trainer()
    clip: Any = measured().clip
    oracle = functools.partial(clip, engine="vmap")
    base = dataclasses.replace(bare, clip=clip, oracle=oracle)
    return other_metrics(MEASURED_PLAN, base, PLAN)


def metrics_with_the_noise_of_the_score():
    def change(links, key):
        (score,) = [x for x in links if getattr(x, "role", "") == "score"]
        own = release_metrics(MEASURED_PLAN, METRICS, key=key)

        def update(updates, state, params=None, **extra):
            _, scored = score.update(updates, score.init(params), params)
            _, after = own.update(updates, state, params, **extra)
            tau = MEASURED_PLAN.score_noise_multipliers[0]
            drawn = scored.average * 10 * MEASURED_PLAN.batch_size
            drawn = (drawn - updates.layer_shares)[:2] / tau
            noise = drawn * MEASURED_PLAN.metric_noise_multipliers[0]
            total = updates.metrics.total + noise
            unit = MEASURED_PLAN.batch_size * 2**-0.5
            return updates, after._replace(value=total / unit)

        facts = {"role": "metric", "metrics": own.metrics, "key": own.key}
        verb = PrivateTransformation(own.init, update, plan=MEASURED_PLAN, **facts)
        links = [x for x in links if getattr(x, "role", "") != "metric"]
        return [links[0], verb, *links[1:]]

    return with_links(measured(), change)


def same_key_every_step():
    def make(link, key):
        def update(updates, state, params=None, **extra):
            release, after = link.update(updates, state, params, **extra)
            again, _ = link.update(updates, state._replace(step=0 * state.step), params)
            return again, after

        return PrivateTransformation(
            link.init, update, role="noise", key=link.key, plan=link.plan
        )

    return swapped("noise", make)


def same_key_for_every_leaf():
    def make(link, key):
        def update(updates, state, params=None, **extra):
            release, after = link.update(updates, state, params, **extra)
            sigma = PLAN.gradient_noise_multipliers[0] * PLAN.l2_clip_norm
            step_key = jax.random.fold_in(state.key, state.step)
            weights = updates.geometry.groups.expand(updates.geometry.weights)
            leaves, tree = jax.tree.flatten(updates.gradients)
            noised = [
                (
                    x
                    + sigma
                    * w
                    * jax.random.normal(step_key, (x.size,)).reshape(x.shape)
                )
                / PLAN.batch_size
                for x, w in zip(leaves, weights, strict=True)
            ]
            return jax.tree.unflatten(tree, noised), after

        return PrivateTransformation(
            link.init, update, role="noise", key=link.key, plan=link.plan
        )

    return swapped("noise", make)


# --- clip ----------------------------------------------------------------------------


def clip_before_scaling():
    """Clipped in the plain norm, then taken for clipped in the weighted one."""

    def clip(loss):
        sound = SOUND.clip(loss)

        def run(params, batch, *, geometry, is_padding_example=None):
            plain = dataclasses.replace(
                geometry, weights=jnp.ones_like(geometry.weights)
            )
            found = sound(
                params, batch, geometry=plain, is_padding_example=is_padding_example
            )
            return dataclasses.replace(found, geometry=geometry)

        return run

    return replaced(clip=clip)


def clip_of_micro_batches():
    """Each pair of examples is summed first and clipped as if it were one."""

    def clip(loss):
        sound, bound = SOUND.clip(loss), PLAN.l2_clip_norm

        def run(params, batch, *, geometry, is_padding_example=None):
            size = jax.tree.leaves(batch)[0].shape[0]
            mask = jnp.zeros(size, bool)
            mask = (
                mask if is_padding_example is None else jnp.asarray(is_padding_example)
            )
            honest = sound(params, batch, geometry=geometry, is_padding_example=mask)
            grads = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
            pair = lambda g: jax.ops.segment_sum(  # noqa: E731
                jnp.where(mask.reshape(-1, *[1] * (g.ndim - 1)), 0, g),
                jnp.arange(size) // 2,
                (size + 1) // 2,
            )
            pairs = jax.tree.map(pair, grads)
            summed, _ = dp_ilg.clip_per_example(bound).update(
                pairs, optax.EmptyState(), params, geometry=geometry
            )
            return dataclasses.replace(honest, gradients=summed.gradients)

        return run

    return replaced(clip=clip)


def geometry_of_the_batch():
    """Weights from the norms of the very batch that is clipped in them."""

    def clip(loss):
        sound = SOUND.clip(loss)

        def run(params, batch, *, geometry, is_padding_example=None):
            extra = dict(is_padding_example=is_padding_example)
            first = sound(params, batch, geometry=geometry, **extra)
            shares = first.layer_shares / (jnp.sum(first.layer_shares) + 1e-9) + 0.1
            own = dataclasses.replace(geometry, weights=shares)
            return sound(params, batch, geometry=own, **extra)

        return run

    return replaced(clip=clip)


def divided_by_the_drawn_size():
    """Sum and noise over the number drawn, which `fits` counts where all is short."""

    def make(link, key):
        def update(updates, state, params=None, **extra):
            release, after = link.update(updates, state, params, **extra)
            drawn = jnp.maximum(2 * jnp.abs(updates.fits[0]), 1)
            factor = PLAN.batch_size / drawn
            return jax.tree.map(lambda g: g * factor, release), after

        return PrivateTransformation(
            link.init, update, role="noise", key=link.key, plan=link.plan
        )

    return swapped("noise", make)


def nan_let_through():
    """No look at whether a gradient is a number."""

    def clip(loss):
        sound = SOUND.clip(loss)

        def run(params, batch, *, geometry, is_padding_example=None):
            extra = dict(is_padding_example=is_padding_example)
            found = sound(params, batch, geometry=geometry, **extra)
            grads = jax.vmap(jax.grad(loss), (None, 0))(params, batch)
            mask = is_padding_example
            there = 1.0 if mask is None else 1.0 - mask
            spoilt = jax.tree.map(
                lambda g, s: s + 0 * jnp.tensordot(there * jnp.ones(len(g)), g, 1),
                grads,
                found.gradients,
            )
            return dataclasses.replace(found, gradients=spoilt)

        return run

    return replaced(clip=clip)


# --- sampler, plan, resume -----------------------------------------------------------


class Shuffling:
    """Epochs of disjoint batches of one size."""

    def __init__(self, key):
        self.seed = int(jax.random.bits(key))

    def indices(self, step):
        if step >= PLAN.num_steps:
            raise ValueError("past the plan")
        epoch, place = divmod(step, PLAN.num_examples // PLAN.batch_size)
        order = np.random.default_rng([self.seed, epoch]).permutation(PLAN.num_examples)
        return np.sort(order[place * PLAN.batch_size :][: PLAN.batch_size])


class FixedSize(Shuffling):
    """Independent batches, all of the expected size."""

    def indices(self, step):
        if step >= PLAN.num_steps:
            raise ValueError("past the plan")
        rng = np.random.default_rng([self.seed, step])
        return np.sort(rng.choice(PLAN.num_examples, PLAN.batch_size, replace=False))


def longer_plan():
    return dataclasses.replace(PLAN, num_steps=7, stages=((7, 1.0),))


def reuse_after_resume():
    """A resumed run that counts its noise from the start again."""

    def resume(position):
        params, state, draw = SOUND.resume(position)
        again = jax.tree.map(
            lambda part: (
                part._replace(step=jnp.zeros((), jnp.int32))
                if isinstance(part, AddImportanceNoiseState)
                else part
            ),
            state,
            is_leaf=lambda part: isinstance(part, AddImportanceNoiseState),
        )
        return params, again, draw

    return replaced(resume=resume)


def fresh_batches_after_resume():
    """A resumed run that draws other batches under the noise it had."""

    def resume(position):
        params, state, draw = SOUND.resume(position)
        return params, state, jax.random.fold_in(draw, 1)

    return replaced(resume=resume)


# --- the last bits -------------------------------------------------------------------


def short_tailed_noise():
    """Draws from 23 random bits, as `jax.random.normal` makes them."""

    def make(link, key):
        def update(updates, state, params=None, **extra):
            release, after = link.update(updates, state, params, **extra)
            stddev = noise_stddev(
                PLAN, state.step, updates.geometry, updates.l2_clip_norm
            )
            scales = updates.geometry.groups.expand(stddev)
            leaves, tree = jax.tree.flatten(updates.gradients)
            keys = jax.random.split(jax.random.fold_in(state.key, state.step), 9)
            noised = [
                (x + scale * jax.random.normal(own, x.shape)) / PLAN.batch_size
                for x, scale, own in zip(leaves, scales, keys, strict=False)
            ]
            return jax.tree.unflatten(tree, noised), after

        return PrivateTransformation(
            link.init, update, role="noise", key=link.key, plan=link.plan
        )

    return swapped("noise", make)


def float32_lots():
    """Sums of batches that round as they are added."""

    def clip(loss):
        sound = SOUND.clip(loss)

        def run(*args, **facts):
            found = sound(*args, **facts)
            return dp_ilg.ClippedGrad(
                found.gradients,
                found.layer_shares,
                found.geometry,
                found.l2_clip_norm,
                found.fits,
            )

        return run

    return replaced(clip=clip)


def guard_of_a_quarter():
    """Norms with the guessed allowance for rounding that they once had."""

    def norms(squares, scale):
        value, size = (
            jnp.stack(
                [
                    x.value if k == 0 else 0 * x.value if x.size is None else x.size
                    for x in squares
                ],
                axis=1,
            )
            for k in (0, 1)
        )
        slack = 0.25 * jnp.finfo(value.dtype).eps * size
        root = jnp.sqrt(jnp.maximum(value, 0) + slack)
        return jnp.where(scale == 0, 0, scale * root), 0 * root

    def clip(loss):
        sound = SOUND.clip(loss)

        def run(*args, **facts):
            with mock.patch.object(factors, "norms", norms):
                return sound(*args, **facts)

        return run

    return replaced(clip=clip)


def a_loss_that_sees_its_neighbours():
    """A gradient that is scaled by what the whole batch holds, by very little."""

    def clip(loss):
        def run(params, batch, **facts):
            top = sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(batch))
            near = lambda p, e: loss(p, e) * (1 + 1e-6 * top)  # noqa: E731
            return SOUND.clip(near)(params, batch, **facts)

        return run

    return replaced(clip=clip)


class FftPlan(dp_ilg.PrivacyPlan):
    """A plan that asks dp_accounting's privacy loss distributions for any delta."""

    def epsilon(self, steps=None):
        accountant = pld.PLDAccountant()
        accountant.compose(self.event(steps))
        return accountant.get_epsilon(self.delta)


def fft_accountant():
    facts = dict(num_examples=10_000, num_steps=3000, stages=((3000, 1.0),))
    plan = scene_plan(**facts, delta=1e-13, score_budget=0.0)
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
    return replaced(plan=FftPlan(**fields))


# --- noise that meets other data -----------------------------------------------------


def an_update_for_every_chunk():
    """Chunks of a lot noised one by one on the state that the step began with."""

    def make(grad_fn, tx):
        @jax.jit
        def part(params, state, batch, mask):
            geometry = tx.geometry(state)
            total = grad_fn(params, batch, geometry=geometry, is_padding_example=mask)
            return tx.update(total, state, params)

        def step(params, state, chunks):
            found = [part(params, state, *chunk) for chunk in chunks]
            for updates, _ in found:
                params = optax.apply_updates(params, updates)
            return params, found[-1][1]

        return step

    return replaced(step=make)


def a_state_that_is_not_kept():
    def make(grad_fn, tx):
        sound = make_train_step(grad_fn, tx)

        def step(params, state, chunks):
            before = jax.tree.map(jnp.array, state)
            return sound(params, state, chunks)[0], before

        return step

    return replaced(step=make)


def keys_of_the_seed_alone():
    return replaced(keys=lambda plan: derived_keys(3, {}))


def noise_of_the_seed_alone():
    def keys(plan):
        own = derived_keys(3, {"plan": plan.digest()})
        return own._replace(optimizer=derived_keys(3, {}).optimizer)

    return replaced(keys=keys)


def batches_of_the_seed_alone():
    def keys(plan):
        own = derived_keys(3, {"plan": plan.digest()})
        return own._replace(sampler=derived_keys(3, {}).sampler)

    return replaced(keys=keys)


# fault -> (trainer, the check that must find it)
FAULTS = {
    "noise 10 % too small": (lambda: less_noise(0.9), "noise of the gradient"),
    "noise 1 % too small": (lambda: less_noise(0.99), "noise of the gradient"),
    "score not noised": (unnoised_score, "noise of the score"),
    "score not charged": (uncharged_score, "noise against the charge"),
    "metrics not noised": (unnoised_metrics, "noise of the metrics"),
    "metrics charged nothing": (uncharged_metrics, "noise against the charge"),
    "metrics with the noise of the score": (
        metrics_with_the_noise_of_the_score,
        "independence of the noise",
    ),
    "geometry from the current batch": (
        geometry_of_the_batch,
        "geometry of past releases",
    ),
    "same noise key in two steps": (same_key_every_step, "independence of the noise"),
    "same noise key in two leaves": (
        same_key_for_every_leaf,
        "independence of the noise",
    ),
    "key reused after resume": (reuse_after_resume, "resumed run"),
    "old noise on a new batch": (fresh_batches_after_resume, "resumed run"),
    "clip before scaling only": (clip_before_scaling, "sensitivity"),
    "per-micro-batch clipping": (clip_of_micro_batches, "sensitivity"),
    "noise divided by the drawn size": (
        divided_by_the_drawn_size,
        "expected batch size",
    ),
    "NaN example let through": (nan_let_through, "absent examples"),
    "two updates on one state": (an_update_for_every_chunk, "one release a state"),
    "a state that is not kept": (a_state_that_is_not_kept, "one release a state"),
    "one key for two plans": (keys_of_the_seed_alone, "one key a plan"),
    "one noise for two plans": (noise_of_the_seed_alone, "one key a plan"),
    "one draw of batches for two plans": (batches_of_the_seed_alone, "one key a plan"),
    "sampler that shuffles": (lambda: replaced(sampler=Shuffling), "batch size"),
    "disjoint batches": (
        lambda: replaced(sampler=Shuffling),
        "independence of batches",
    ),
    "batches of one size": (lambda: replaced(sampler=FixedSize), "batch size"),
    "one step past the plan, ledger": (
        lambda: replaced(ledger=lambda path: dp_ilg.PrivacyLedger(path, longer_plan())),
        "end of the plan",
    ),
    "one step past the plan, sampler": (
        lambda: replaced(
            sampler=lambda key: dp_ilg.PoissonSampler.for_plan(longer_plan(), key=key)
        ),
        "end of the plan",
    ),
    "one step past the plan, noise": (
        lambda: swapped(
            "noise",
            lambda link, key: renamed(
                add_importance_noise(longer_plan(), key=link.key), PLAN
            ),
        ),
        "end of the plan",
    ),
    "noise without tails": (short_tailed_noise, "tail of the noise"),
    "a guard of a quarter": (guard_of_a_quarter, "repeated terms"),
    "a loss that sees its neighbours": (a_loss_that_sees_its_neighbours, "rows apart"),
    "float32 lots": (float32_lots, "any order"),
    "accountant of round-off at a tiny delta": (fft_accountant, "claimed epsilon"),
}


@pytest.fixture(scope="module")
def sound():
    return gather(SOUND, seed=1)


@pytest.mark.parametrize("check", CHECKS)
def test_every_promise_of_the_sound_trainer_holds(sound, check):
    finding = CHECKS[check](sound)
    assert finding.holds, finding


@pytest.fixture(scope="module")
def sound_and_measured():
    return gather(measured(), seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_every_promise_holds_where_metrics_are_released(sound_and_measured, check):
    finding = CHECKS[check](sound_and_measured)
    assert finding.holds and "no metric" not in finding.found, finding


SLOW = (  # each compiles a thousand runs, or repeats a fast one's kind
    "noise 1 % too small",
    "score not charged",
    "metrics charged nothing",
    "metrics with the noise of the score",
    "same noise key in two leaves",
    "same noise key in two steps",
    "old noise on a new batch",
    "disjoint batches",
    "one step past the plan, noise",
)
CASES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in FAULTS
]


@pytest.mark.parametrize("fault", CASES)
def test_the_fault_is_found(fault):
    plant, check = FAULTS[fault]
    finding = CHECKS[check](gather(plant(), seed=1))
    assert not finding.holds, finding
