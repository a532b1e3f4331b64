"""Released metrics: their law, their band, and one Gaussian with all else of a step."""

import contextlib
import dataclasses
import functools
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

import dp_ilg
from dp_ilg.baselines.table import BASELINES
from dp_ilg.clipping.adding.metric_sums import MetricSums, no_metrics, sum_metrics
from dp_ilg.noise.exact import ExactNoise
from dp_ilg.noise.secure import SecureNoise
from dp_ilg.optimizers.metrics import METRIC_TAG
from dp_ilg.training.certificate import sensitivity_certificate
from tests.helpers.baseline_cases import ROWS
from tests.helpers.models import plan
from tests.noise.test_add_noise import chi_square_accepts

LOSS = dp_ilg.Metric(lambda loss, aux: loss, high=4.0)
RIGHT = dp_ilg.Metric(lambda loss, aux: loss < 1)
METRICS = {"loss": LOSS, "right": RIGHT}
FACTS = (("loss", 0.0, 4.0), ("right", 0.0, 1.0))
PARAMS = {"w": jnp.zeros(3), "b": jnp.zeros(())}
KEY = jax.random.key(0)
make_plan = functools.partial(plan, metric_budget=0.04)


def loss_fn(params, x):
    return jnp.square(params["w"] @ x + params["b"] - 1)


def optimizer(the_plan=None, metrics=METRICS, **options):
    return dp_ilg.dp_adam_ilg(
        0.1, the_plan or make_plan(), key=KEY, metrics=metrics, **options
    )


def clipped(tx, state, batch, metrics=METRICS, params=PARAMS):
    grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=1.0, metrics=metrics)
    return grad_fn(params, batch, geometry=tx.geometry(state))


def empty(facts=FACTS, **changes):
    """What a batch of nobody is clipped to."""
    geometry = dp_ilg.Geometry.uniform(PARAMS)
    bound, none = jnp.float32(1.0), jnp.zeros(1)
    nothing = dp_ilg.ClippedGrad(
        PARAMS, none, geometry, bound, metrics=no_metrics(facts)
    )
    return dataclasses.replace(nothing, **changes)


# --- the law of the noise -------------------------------------------------------


@pytest.mark.parametrize("budgets", [(0.01, 0.04), (0.0, 0.5)])
def test_noise_has_the_multiplier_of_the_plan(budgets):
    """At a level of 1e-6; it rejects 3 % more and less."""
    the_plan = make_plan(score_budget=budgets[0], metric_budget=budgets[1])
    facts = tuple((f"m{k:02d}", -1.0, 1.0) for k in range(32))
    metrics = {name: dp_ilg.Metric(max, low, high) for name, low, high in facts}
    verb = dp_ilg.release_metrics(the_plan, metrics, key=KEY)
    start = verb.init(PARAMS)

    @jax.jit
    @jax.vmap
    def value(key):
        _, state = verb.update(empty(facts), start._replace(key=key))
        return state.value

    draws = np.asarray(value(jax.random.split(KEY, 1250)), np.float64).ravel()
    tau = the_plan.noise_multipliers[0] / np.sqrt(budgets[1])
    whitened = draws * the_plan.batch_size / np.sqrt(32) / tau
    assert len(whitened) == 40_000 and chi_square_accepts(whitened)
    assert not chi_square_accepts(whitened, 0.97)
    assert not chi_square_accepts(whitened, 1.03)
    assert scipy.stats.kstest(whitened[:10_000], "norm").pvalue > 1e-6


def test_noise_has_nothing_to_do_with_that_of_scores_and_gradients():
    """Of one optimizer's key; correlations at a level of 1e-6."""
    the_plan = make_plan(score_budget=0.2, metric_budget=0.2)
    roles = [getattr(t, "role", "") for t in optimizer(the_plan).links]
    places = {role: roles.index(role) for role in ("score", "metric", "noise")}

    @jax.jit
    @jax.vmap
    def draws(key):
        keyed = dp_ilg.dp_adam_ilg(0.1, the_plan, key=key, metrics=METRICS)
        state = keyed.init(PARAMS)
        updates = empty(geometry=keyed.geometry(state), layer_shares=jnp.zeros(2))
        found = {}
        for name in ("metric", "score", "noise"):
            link = keyed.links[places[name]]
            out, after = link.update(updates, state[places[name]], PARAMS)
            found[name] = after, out
        score, metric = found["score"][0].average, found["metric"][0].value
        release = jnp.concatenate(
            [x.ravel() for x in jax.tree.leaves(found["noise"][1])]
        )
        return score, metric, release

    count = 4000
    parts = [np.asarray(x) for x in draws(jax.random.split(jax.random.key(5), count))]
    score, metric, release = parts
    tests = 0
    worst = 0.0
    for other in (score, release):
        for a in metric.T:
            for b in other.T:
                worst = max(worst, abs(np.corrcoef(a, b)[0, 1]) * np.sqrt(count))
                tests += 1
    assert worst < scipy.stats.norm.isf(1e-6 / tests / 2)
    assert np.abs(np.corrcoef(metric[:, 0], metric[:, 0])[0, 1]) == pytest.approx(1)


def test_keys_are_apart():
    tx = optimizer()
    keys = [t.key for t in tx.links if getattr(t, "key", None) is not None]
    data = {jax.random.key_data(k).tobytes() for k in keys}
    assert len(data) == len(keys) == 3
    assert METRIC_TAG > 1  # fold_in of 0 or 1 may be what split gives


def test_steps_have_noise_of_their_own_and_a_resumed_one_repeats():
    verb = dp_ilg.release_metrics(make_plan(), METRICS, key=KEY)
    state = verb.init(PARAMS)
    _, one = verb.update(empty(), state)
    _, again = verb.update(empty(), state)
    _, two = verb.update(empty(), one)
    assert (one.value == again.value).all() and not (one.value == two.value).any()


# --- one Gaussian with gradient and scores --------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_all_that_a_step_releases_is_one_gaussian_of_the_plans_multiplier(count):
    """Squared shifts over variances of one example: at most z^-2, which is reached."""
    metrics = {
        f"m{k}": dp_ilg.Metric(lambda loss, aux: jnp.float32(9.0)) for k in range(count)
    }
    the_plan = make_plan(score_budget=0.1, metric_budget=0.3)
    tx = optimizer(the_plan, metrics)
    state = tx.init(PARAMS)
    rows = np.random.default_rng(0).normal(size=(50, 3)) * 10.0 ** np.arange(-3, 47)[
        :, None
    ].clip(-3, 3)

    @jax.jit
    @jax.vmap
    def shifts(row):
        one = clipped(tx, state, row[None], metrics)
        lengths = [jnp.sum(x**2) for x in jax.tree.leaves(one.gradients)]
        return sum(lengths), jnp.sum(one.layer_shares**2), jnp.sum(one.metrics.total**2)

    parts = [np.asarray(x, np.float64) for x in shifts(jnp.float32(rows))]
    noise = [
        the_plan.gradient_noise_multipliers[0] * the_plan.l2_clip_norm,
        the_plan.score_noise_multipliers[0],
        the_plan.metric_noise_multipliers[0],
    ]
    known = sum(x / s**2 for x, s in zip(parts, noise, strict=True))
    share = known * the_plan.noise_multipliers[0] ** 2
    assert 0.9999 < share.max() <= 1


def test_noise_that_is_charged_nothing_would_be_seen():
    """The sum above, for a verb whose noise the plan did not pay for."""
    paid, unpaid = make_plan(metric_budget=0.3), make_plan(metric_budget=0.0)
    shares = [
        p.gradient_noise_multipliers[0] ** -2 + p.score_noise_multipliers[0] ** -2
        for p in (paid, unpaid)
    ]
    own = paid.metric_noise_multipliers[0] ** -2
    accounted = paid.noise_multipliers[0] ** -2
    assert shares[0] + own == pytest.approx(accounted, rel=1e-12)
    assert shares[1] + own > 1.2 * accounted


# --- the band --------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_releases():
    """Means of Poisson draws of a small population, with noise, 4,000 times over."""
    whole, size, runs = 400, 100, 4000
    the_plan = make_plan(num_examples=whole, batch_size=size)
    verb = dp_ilg.release_metrics(the_plan, METRICS, key=KEY, smooth_steps=3)
    rng = np.random.default_rng(0)
    right = rng.random(whole) < 0.9
    values = np.stack([rng.uniform(-0.9, 0.2, whole), 2.0 * right - 1], 1)

    @jax.jit
    @jax.vmap
    def run(key, drawn):
        state = verb.init(PARAMS)._replace(key=key)
        for mask in drawn:
            sums = sum_metrics(jnp.float32(values), mask, FACTS)
            _, state = verb.update(empty(metrics=sums), state)
        return verb.metrics(state)

    drawn = rng.random((runs, 4, whole)) < size / whole
    found = run(jax.random.split(KEY, runs), jnp.asarray(drawn))
    true = {"loss": 2 + 2 * values[:, 0].mean(), "right": right.mean()}
    return found, true, runs


@pytest.mark.parametrize("kind", ["value", "smoothed"])
def test_means_are_right_on_average(kind, many_releases):
    found, true, runs = many_releases
    for name in METRICS:
        released = np.asarray(getattr(found[name], kind), np.float64)
        error = released.std() / np.sqrt(runs)
        assert abs(released.mean() - true[name]) < 5 * error


@pytest.mark.parametrize("kind", ["value", "smoothed"])
def test_the_band_holds_the_true_mean_as_often_as_it_says(kind, many_releases):
    """95 % for a metric of two values, at least as much for others; level 1e-6."""
    found, true, runs = many_releases
    inside = {}
    for name in METRICS:
        released = np.asarray(getattr(found[name], kind))
        errors = np.asarray(
            getattr(found[name], {"value": "stderr"}.get(kind, "smoothed_stderr"))
        )
        assert np.ptp(errors) < 1e-6 * errors[0]
        inside[name] = np.mean(np.abs(released - true[name]) < 1.96 * errors)
        if name == "right":
            ratio = released.std() / errors[0]
            low, high = np.sqrt(
                scipy.stats.chi2.ppf([5e-7, 1 - 5e-7], runs - 1) / (runs - 1)
            )
            assert low < ratio < high
    slack = scipy.stats.norm.isf(5e-7) * np.sqrt(0.95 * 0.05 / runs)
    assert abs(inside["right"] - 0.95) < slack
    assert inside["loss"] > 0.95 - slack


def test_without_the_chance_of_the_draw_the_band_would_be_too_narrow(many_releases):
    found, true, _ = many_releases
    the_plan = make_plan(num_examples=400, batch_size=100)
    bare = np.sqrt(2) * the_plan.metric_noise_multipliers[0] / the_plan.batch_size / 2
    gaps = np.abs(np.asarray(found["right"].value) - true["right"])
    assert bare < found["right"].stderr[0] and np.mean(gaps < 1.96 * bare) < 0.94


def test_a_draw_that_is_cut_is_divided_by_what_is_left_of_it():
    whole, size = 40, 20
    the_plan = make_plan(num_examples=whole, batch_size=size, max_batch_size=size)
    verb = dp_ilg.release_metrics(the_plan, {"right": RIGHT}, key=KEY)
    rng = np.random.default_rng(1)
    values = jnp.asarray(2.0 * (rng.random((whole, 1)) < 0.9) - 1, jnp.float32)
    sizes = np.minimum(rng.binomial(whole, size / whole, 4000), size)
    order = rng.permuted(np.tile(np.arange(whole), (4000, 1)), axis=1)

    @jax.jit
    @jax.vmap
    def run(key, mask):
        state = verb.init(PARAMS)._replace(key=key)
        sums = sum_metrics(values, mask, FACTS[1:])
        return verb.metrics(verb.update(empty(metrics=sums), state)[1])["right"]

    drawn = jnp.asarray(order < sizes[:, None])
    found = run(jax.random.split(KEY, 4000), drawn)
    released = np.asarray(found.value, np.float64)
    true = float((values.mean() + 1) / 2)
    assert abs(released.mean() - true) < 5 * released.std() / np.sqrt(4000)
    assert released.std() < 1.05 * float(found.stderr[0])


def test_at_one_percent_of_a_plan_of_multiplier_one():
    """What one may publish: half a point by noise alone, a tenth over 25 steps."""
    the_plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0,
        delta=1e-5,
        num_examples=60_000,
        batch_size=2048,
        num_steps=400,
        metric_budget=0.01,
    )
    verb = dp_ilg.release_metrics(the_plan, {"right": RIGHT}, key=KEY)
    state, update = verb.init(PARAMS), jax.jit(verb.update)
    for _ in range(200):
        _, state = update(empty(FACTS[1:]), state)
    found = verb.metrics(state)["right"]
    noise = 0.5 * 10 / 2048
    chance = 0.5 * np.sqrt((1 - 2048 / 60_000) / 2048)
    assert noise < 0.005 and noise / 5 < 0.001
    assert float(found.stderr) == pytest.approx(np.hypot(noise, chance), rel=1e-3)
    assert float(found.stderr / found.smoothed_stderr) == pytest.approx(5, rel=1e-3)


def test_the_smoothed_mean_starts_at_the_first_value():
    verb = dp_ilg.release_metrics(make_plan(), METRICS, key=KEY)
    state = verb.init(PARAMS)
    before = verb.metrics(state)["loss"]
    assert all(np.isnan(x) for x in before)
    _, state = verb.update(empty(), state)
    first = verb.metrics(state)["loss"]
    assert first.value == pytest.approx(float(first.smoothed), rel=1e-5)
    assert first.stderr == pytest.approx(float(first.smoothed_stderr), rel=1e-5)
    assert "±" in str(first)


# --- never without noise ---------------------------------------------------------


def test_past_the_plan_nothing_is_released():
    verb = dp_ilg.release_metrics(make_plan(num_steps=2), METRICS, key=KEY)
    state = verb.init(PARAMS)
    for expected in (True, True, False, False):
        _, state = verb.update(empty(), state)
        found = verb.metrics(state)["loss"]
        assert all(bool(np.isfinite(x)) == expected for x in found)


def test_a_sum_whose_seal_is_broken_is_not_released():
    verb = dp_ilg.release_metrics(make_plan(), METRICS, key=KEY)
    state = verb.init(PARAMS)
    with pytest.raises(ValueError, match="Arithmetic was done"):
        verb.update(jax.tree.map(lambda x: x / 2, empty()), state)
    is_whole = lambda x: np.asarray(x).dtype == np.int32  # noqa: E731
    seal = jax.tree.map(lambda x: x + 1 if is_whole(x) else x, empty().seal)
    summed = empty(seal=seal)
    assert np.isnan(jax.jit(verb.update)(summed, state)[1].value).all()
    for bound in (0.0, np.nan, -1.0):
        broken = empty(l2_clip_norm=jnp.float32(bound))
        assert np.isnan(verb.update(broken, state)[1].value).all()


@pytest.mark.parametrize("source", [SecureNoise, ExactNoise])
def test_draws_from_outside_are_the_noise(source):
    exact = source is ExactNoise
    the_plan = make_plan(exact_noise=exact)
    verb = dp_ilg.release_metrics(the_plan, METRICS, key=KEY)
    state, geometry = verb.init(PARAMS), dp_ilg.Geometry.uniform(PARAMS)
    given = [source(secret=bytes(32)).draws(t, PARAMS, geometry) for t in (0, 1)]
    _, after = verb.update(empty(), state, noise=given[0])
    sigma = the_plan.metric_noise_multipliers[0] * np.sqrt(2) / the_plan.batch_size
    expected = np.asarray(given[0].metrics[:2]) * 2.0**-27 * sigma
    np.testing.assert_allclose(after.value, expected, rtol=1e-3)
    _, wrong = verb.update(empty(), state, noise=given[1])
    assert np.isnan(wrong.value).all()
    assert not np.array_equal(given[0].metrics, given[1].metrics)
    if exact:
        with pytest.raises(TypeError, match="exact noise needs ExactDraws"):
            verb.update(empty(), state)


def test_a_whole_optimizer_takes_exact_draws():
    tx = optimizer(make_plan(exact_noise=True))
    state = tx.init(PARAMS)
    source = ExactNoise(secret=bytes(32))
    draws = source.draws(0, PARAMS, tx.geometry(state))
    sums = clipped(tx, state, jnp.ones((20, 3)))
    _, state = jax.jit(tx.update)(sums, state, PARAMS, noise=draws)
    assert np.isfinite(tx.metrics(state)["loss"].value)


def test_the_numbers_that_a_step_draws_are_paid_for():
    """4 parameters, 2 scores, 2 metrics."""
    tx = optimizer(make_plan(num_parameters=7))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="draws 8 numbers .* pays for 7"):
        tx.update(clipped(tx, state, jnp.ones((20, 3))), state, PARAMS)


def test_the_certificate_counts_them():
    grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=1.0, metrics=METRICS)
    given = grad_fn, PARAMS, jnp.ones((20, 3))
    assert sensitivity_certificate(*given, make_plan(num_parameters=8)).sensitivity == 1
    with pytest.raises(ValueError, match="draws up to 8 numbers"):
        sensitivity_certificate(*given, make_plan(num_parameters=7))


# --- budget and verb belong together ----------------------------------------------


def test_a_budget_without_verb_and_a_verb_without_budget_are_refused():
    with pytest.raises(ValueError, match="metric_budget is 0.04, but the chain"):
        optimizer(metrics=None).init(PARAMS)
    with pytest.raises(ValueError, match="metric_budget is 0; make the plan"):
        optimizer(plan())
    k1, k2, k3, k4 = jax.random.split(KEY, 4)
    parts = [
        dp_ilg.clip_per_example(1.0),
        dp_ilg.score_layer_importance("uniform", make_plan(), key=k1),
        dp_ilg.release_metrics(make_plan(), METRICS, key=k2),
        dp_ilg.add_importance_noise(make_plan(), key=k3),
    ]
    again = dp_ilg.release_metrics(make_plan(), METRICS, key=k4)
    with pytest.raises(ValueError, match="has 2 release_metrics"):
        dp_ilg.chain(*parts[:3], again, parts[3])
    other = dp_ilg.release_metrics(make_plan(metric_budget=0.5), METRICS, key=k2)
    with pytest.raises(ValueError, match="different plans"):
        dp_ilg.chain(*parts[:2], other, parts[3])
    same_key = dp_ilg.release_metrics(make_plan(), METRICS, key=k3)
    with pytest.raises(ValueError, match="the same key"):
        dp_ilg.chain(*parts[:2], same_key, parts[3])
    with pytest.raises(ValueError, match="before add_importance_noise"):
        dp_ilg.chain(*parts[:2], parts[3], parts[2])
    with pytest.raises(TypeError, match="not a ClippedGrad"):
        parts[2].update(PARAMS, parts[2].init(PARAMS))


def test_sums_and_verb_have_the_same_metrics():
    tx = optimizer()
    state = tx.init(PARAMS)
    other = (("loss", 0.0, 5.0), FACTS[1])
    for sums, words in (
        (empty(metrics=None), "has no metrics"),
        (empty(FACTS[:1]), "give both the same metrics"),
        (empty(other), "the same"),
    ):
        with pytest.raises(ValueError, match=words):
            tx.update(sums, state, PARAMS)
    without = dp_ilg.dp_adam_ilg(0.1, plan(), key=KEY)
    with pytest.raises(ValueError, match="the optimizer releases none"):
        without.update(empty(), without.init(PARAMS), PARAMS)


BAD = {
    "none": (dict(metrics={}), "got no metrics"),
    "steps": (dict(smooth_steps=0.5), "at least 1"),
    "plan": (dict(plan=plan()), "metric_budget is 0"),
}


@pytest.mark.parametrize("changes, words", BAD.values(), ids=BAD)
def test_what_cannot_be_released_is_refused(changes, words):
    given = dict(plan=make_plan(), metrics=METRICS, key=KEY) | changes
    with pytest.raises(ValueError, match=words):
        dp_ilg.release_metrics(**given)


# --- through optimizers -------------------------------------------------------------


def test_metrics_do_not_change_a_step_but_for_its_share_of_the_noise():
    """Without noise, with and without metrics: the same parameters, to the bit."""
    quiet = functools.partial(plan, noise_multiplier=0.0, batch_size=50)
    batch = jnp.ones((20, 3))
    found = []
    for metrics, budget in ((METRICS, 0.04), (None, 0.0)):
        tx = optimizer(quiet(metric_budget=budget), metrics)
        state = tx.init(PARAMS)
        sums = clipped(tx, state, batch, metrics)
        updates, state = tx.update(sums, state, PARAMS)
        found.append(updates)
        if metrics:
            told = tx.metrics(state)
            assert told["loss"].value == pytest.approx(20 / 50 * 1 + 30 / 50 * 2)
    assert all(map(np.array_equal, *map(jax.tree.leaves, found)))


@pytest.mark.parametrize("name", [r for r in ROWS if r.values != ("dp_sgd_decay",)])
def test_every_method_releases_metrics(name):
    row = BASELINES[name]
    the_plan = make_plan(score_budget=0.1 if row.spends_scores() else 0.0)
    tx = row(0.1, the_plan, key=KEY, metrics=METRICS)
    with pytest.raises(ValueError, match="metric_budget is 0.04"):
        row(0.1, the_plan, key=KEY).init(PARAMS)
    state = tx.init(PARAMS)
    grad_fn = dp_ilg.clipped_grad(
        loss_fn, l2_clip_norm=1.0, clip_mode=row.clip_mode(), metrics=METRICS
    )
    sums = grad_fn(PARAMS, jnp.ones((20, 3)), geometry=tx.geometry(state))
    _, state = tx.update(sums, state, PARAMS)
    assert np.isfinite(tx.metrics(state)["right"].value)
    assert "metrics" not in row.options()


def test_state_travels():
    """Through averages, a jitted loop, donation and Flax's serialization."""
    tx = dp_ilg.average_iterates(optimizer())
    start = tx.init(PARAMS)
    batch = jnp.ones((20, 3))

    def step(carry, _):
        params, state = carry
        sums = clipped(tx, state, batch, params=params)
        updates, state = tx.update(sums, state, params)
        return (optax.apply_updates(params, updates), state), tx.metrics(state)

    (_, state), curve = jax.jit(lambda c: jax.lax.scan(step, c, None, 3))(
        (PARAMS, start)
    )
    assert curve["loss"].value.shape == (3,)
    told = tx.metrics(state)["loss"]
    assert told.value == curve["loss"].value[-1]
    own = [s for s in state.inner if hasattr(s, "average_variance")][0]
    bare = own._replace(key=None)
    back: Any = flax.serialization.from_bytes(bare, flax.serialization.to_bytes(bare))
    assert (back.value == own.value).all()


def test_a_tree_map_over_what_was_released_is_harmless():
    released = dp_ilg.Released(0.5, 0.6, 0.1, 0.02)
    assert jax.tree.map(lambda x: 2 * x, released).value == 1.0
    with pytest.raises(TypeError):
        _ = MetricSums(jnp.ones(1), jnp.zeros(1), FACTS[:1]) + 1


@contextlib.contextmanager
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


SETTINGS = {
    "plain": contextlib.nullcontext,
    "strict": strict,
    "x64": lambda: jax.enable_x64(True),
    "no NaN": lambda: jax.debug_nans(True),
}
KINDS = {
    "loss": LOSS,
    "integer": dp_ilg.Metric(lambda loss, aux: aux, 0, 3),
    "constant": dp_ilg.Metric(lambda loss, aux: 1.0),
    "right": dp_ilg.Metric(lambda loss, aux: aux > 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_kind_of_number_under_any_setting(setting, dtype):
    """Without noise, of 8 examples where 8 are expected: the mean itself."""

    def loss(params, x):
        hidden = x.astype(dtype) @ params["w"]
        return (hidden * hidden).sum(), hidden.argmax().astype(jnp.int32)

    the_plan = plan(noise_multiplier=0.0, metric_budget=0.1, batch_size=8)
    rows = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32) / 2
    with SETTINGS[setting]():
        params = {"w": jnp.eye(3, 4, dtype=dtype)}
        tx = optimizer(the_plan, KINDS)
        state = tx.init(params)
        grad_fn = dp_ilg.clipped_grad(
            loss, l2_clip_norm=1.0, has_aux=True, metrics=KINDS, microbatch_size=3
        )
        sums = grad_fn(params, jnp.asarray(rows), geometry=tx.geometry(state))
        _, state = jax.jit(tx.update)(sums, state, params)
        found = {name: float(x.value) for name, x in tx.metrics(state).items()}
    best = np.pad(rows, ((0, 0), (0, 1))).argmax(1)
    true = {"loss": (rows**2).sum(1).clip(0, 4).mean(), "integer": best.mean()}
    true |= {"constant": 1.0, "right": (best > 1).mean()}
    assert found == pytest.approx(true, abs=1e-5 if dtype == "float32" else 0.02)
