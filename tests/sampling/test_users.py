"""Users: drawn as examples are, a few of each, and clipped as one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import dp_ilg
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.accounting.statements.groups import group_guarantee
from dp_ilg.sampling.poisson import PoissonSampler
from dp_ilg.sampling.users import UserTable, mean_over_user
from tests.helpers.models import plan

RNG = np.random.default_rng(0)
IDS = np.array([f"u{i:02}" for i in RNG.permutation(np.repeat(np.arange(20), 3))])
IDS = np.concatenate([IDS, ["u00"] * 9, ["solo"]])
DATA = {
    "x": RNG.normal(size=(len(IDS), 4)).astype(np.float32),
    "y": RNG.integers(0, 2, len(IDS)),
}
TABLE = UserTable(IDS)
PARAMS = {"w": jnp.asarray(RNG.normal(size=4), jnp.float32), "b": jnp.zeros(())}


def loss(p, example):
    logit = example["x"] @ p["w"] + p["b"]
    return jax.nn.softplus((1 - 2 * example["y"]) * logit)


def everybody(size=None):
    sampler = PoissonSampler(TABLE.num_users, 1.0, key=0, chunk_size=size)
    return sampler.chunks(0)


def test_the_table_knows_who_owns_what():
    assert TABLE.num_users == 21 and TABLE.num_examples == len(IDS)
    names = np.unique(IDS)
    for user in range(21):
        own = np.flatnonzero(IDS == names[user])
        np.testing.assert_array_equal(TABLE.examples_of(user), own)


@pytest.mark.parametrize("per_user", [1, 2, 5, 40])
def test_rows_are_distinct_examples_of_the_user(per_user):
    (chunk,) = everybody(24)
    rows = TABLE.rows(chunk, per_user=per_user, step=3, key=1)
    for user, row in zip(chunk.indices, rows, strict=True):
        own = row[row >= 0]
        if user < 0:
            assert not own.size
            continue
        mine = TABLE.examples_of(int(user))
        assert set(own) <= set(mine) and len(set(own)) == len(own)
        assert len(own) == min(per_user, len(mine))


def test_which_examples_is_uniform_and_a_function_of_key_step_and_user():
    (chunk,) = everybody()
    again = [TABLE.rows(chunk, per_user=1, step=5, key=2) for _ in range(2)]
    np.testing.assert_array_equal(again[0], again[1])
    steps = [TABLE.rows(chunk, per_user=1, step=t, key=2)[:, 0] for t in range(600)]
    user = int(np.flatnonzero(np.unique(IDS) == "u00")[0])
    counts = np.unique([row[user] for row in steps], return_counts=True)[1]
    assert len(counts) == 12 and scipy.stats.chisquare(counts).pvalue > 1e-4
    other = np.array([row[user + 1] for row in steps])
    places = [np.argsort(np.argsort(TABLE.examples_of(u))) for u in (user, user + 1)]
    assert all(len(p) for p in places) and len(set(other.tolist())) == 3


@pytest.mark.parametrize("engine", ["auto", "vmap"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_sum_is_of_clipped_mean_gradients(engine, compiled):
    (chunk,) = everybody(24)
    batch = TABLE.take(DATA, chunk, per_user=5, step=0, key=4)
    grad_fn = dp_ilg.clipped_grad(mean_over_user(loss), l2_clip_norm=0.3, engine=engine)
    geometry = dp_ilg.Geometry.uniform(PARAMS)
    call = lambda b: grad_fn(PARAMS, b, geometry=geometry).gradients  # noqa: E731
    found = (jax.jit(call) if compiled else call)(batch)
    total = {"w": np.zeros(4), "b": 0.0}
    for row in TABLE.rows(chunk, per_user=5, step=0, key=4):
        own = row[row >= 0]
        if not own.size:
            continue
        some = jax.tree.map(lambda a, o=own: jnp.asarray(a[o]), DATA)
        grads = jax.vmap(jax.grad(loss), (None, 0))(PARAMS, some)
        mean = jax.tree.map(lambda g: np.asarray(g, np.float64).mean(0), grads)
        norm = np.sqrt(np.sum(mean["w"] ** 2) + mean["b"] ** 2)
        for name in total:
            total[name] = total[name] + mean[name] * min(1, 0.3 / norm)
    for name in total:
        np.testing.assert_allclose(found[name], total[name], rtol=3e-5, atol=1e-5)


def test_a_user_with_a_thousand_examples_moves_the_sum_by_the_clip_norm():
    ids = np.array(["a"] * 1000 + ["b"])
    data = {"x": np.full((1001, 4), 1e6, np.float32), "y": np.zeros(1001, int)}
    (chunk,) = PoissonSampler(2, 1.0, key=0).chunks(0)
    batch = UserTable(ids).take(data, chunk, per_user=1000, step=0, key=0)
    grad_fn = dp_ilg.clipped_grad(mean_over_user(loss), l2_clip_norm=1.0)
    call = jax.jit(
        lambda mask: grad_fn(
            PARAMS,
            batch.examples,
            geometry=dp_ilg.Geometry.uniform(PARAMS),
            is_padding_example=mask,
        )
    )
    both, one = (
        call(jnp.array(mask)).gradients for mask in ([False, False], [True, False])
    )
    gap = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, both, one)
    assert np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(gap))) <= 1 + 2e-6


@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_padding_never_makes_a_user_vanish(engine):
    """A loss without a value at zero: what stands for the absent must not be read."""
    loss = mean_over_user(lambda p, x: jnp.log(p["p"] * x))
    params = {"p": jnp.float32(2.0)}
    users = jnp.array([[3.0, 0.0], [3.0, 5.0], [0.0, 7.0]])
    there = jnp.array([[True, False], [True, True], [False, True]])
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=100.0, engine=engine)
    geometry = dp_ilg.Geometry.uniform(params)
    found = jax.jit(lambda b: grad_fn(params, b, geometry=geometry))((users, there))
    assert float(found.gradients["p"]) == pytest.approx(1.5, rel=1e-4)  # 3 of 1 / 2


def test_a_plan_for_examples_is_taken_if_asked_for():
    TABLE.check_plan(plan(num_examples=70), examples_asked=True)
    with pytest.raises(ValueError, match="or pass examples_asked=True"):
        TABLE.check_plan(plan(num_examples=70))


def test_words_of_any_kind_are_ids():
    for ids in (["b", "a", "b"], np.array([b"b", b"a", b"b"]), [2, 1, 2]):
        table = UserTable(ids)
        assert table.num_users == 2 and table.examples_of(1).tolist() == [0, 2]
    assert UserTable(np.array(["b", "a"], object)).num_users == 2
    assert UserTable(np.array([2**63 + 1, 3, 3], np.uint64)).num_users == 2


def test_a_run_through_the_front_door_takes_users(tmp_path):
    import optax

    the_plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0, delta=1e-5, num_examples=21, batch_size=7, num_steps=4,
        unit="user",
    )  # fmt: skip
    TABLE.check_plan(the_plan)
    users = TABLE.views(DATA, per_user=3, key=5)
    assert len(users) == 21 and users[0][1].shape == (3,)
    train = dp_ilg.private_training(
        mean_over_user(loss), optax.adam(0.1), the_plan, seed=0
    )
    state = train.init(PARAMS)
    for lot in train.batches(users, ledger=tmp_path / "ledger.jsonl"):
        state = train.step(state, lot)
    assert train.epsilon(state) == the_plan.epsilon()
    assert np.isfinite(state.params["w"]).all()


def test_the_unit_is_in_plan_statement_and_json():
    users, records = plan(unit="user"), plan()
    assert users.epsilon() == records.epsilon() and users != records
    assert plan(unit="example") == records and "unit" not in records.to_json()
    assert PrivacyPlan.from_json(users.to_json()) == users
    assert users.digest() != records.digest()
    text = str(users.statement())
    for words in ("one user with all of their examples", "1,000 users takes part"):
        assert words in text, text
    assert "training example" not in text.split("not cover")[0]
    assert users.statement().as_dict()["unit_of_privacy"].startswith("one user")


def test_record_level_plans_are_refused_where_ids_repeat():
    with pytest.raises(ValueError, match='70 examples belong to 21 users.*unit="user"'):
        TABLE.check_plan(plan(num_examples=70))
    with pytest.raises(ValueError, match="for 1,000 users, but the ids name 21"):
        TABLE.check_plan(plan(unit="user"))
    UserTable(np.arange(1000)).check_plan(plan())


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda: UserTable([]), "one id an example"),
        (lambda: UserTable([[1, 2]]), "one id an example"),
        (lambda: UserTable([1.0, np.nan]), "none of them missing"),
        (lambda: UserTable(["a", ""]), "none of them missing"),
        (lambda: UserTable(["a", np.nan, "b", np.nan]), "none of them missing"),
        (lambda: UserTable(["a", None]), "none of them missing"),
        (lambda: UserTable(np.array(["a", np.nan])), "none of them missing"),
        (lambda: UserTable(np.array(["a", "NaN "])), "none of them missing"),
        (lambda: UserTable([b"a", b""]), "none of them missing"),
        (lambda: UserTable([1, "1"]), "none of them missing"),
        (lambda: UserTable([True, False]), "none of them missing"),
        (
            lambda: UserTable(np.ma.array([1, 2], mask=[False, True])),
            "none of them missing",
        ),
        (lambda: UserTable([1, 2]).views(np.ones(3), per_user=1, key=0), "one id an"),
        (
            lambda: TABLE.rows(everybody()[0], per_user=0, step=0, key=0),
            "per_user is 0",
        ),
        (lambda: plan(unit="household"), "unit is 'household'"),
    ],
)
def test_what_cannot_be_is_refused(act, words):
    with pytest.raises(ValueError, match=words):
        act()


def test_groups_of_gaussians_are_bounded_and_the_bound_is_not_below_the_truth():
    """One unsampled Gaussian: k records move it by k, which has a closed form."""
    known = dp_ilg.plan_privacy(
        noise_multiplier=4.0, delta=1e-6, num_examples=10, batch_size=10, num_steps=1
    )
    alone, pair = (group_guarantee(known, k) for k in (1, 2))
    assert alone.epsilon == pytest.approx(known.epsilon(), rel=1e-9)
    truth = dp_ilg.plan_privacy(
        noise_multiplier=2.0, delta=1e-6, num_examples=10, batch_size=10, num_steps=1
    ).epsilon()
    assert truth <= pair.epsilon < 1.3 * truth
    naive = 2 * known.epsilon()
    assert pair.epsilon > naive  # twice epsilon at the same delta would be too little
    assert pair.epsilon == 2 * pair.record_epsilon
