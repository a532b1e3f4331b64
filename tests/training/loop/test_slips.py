"""What one does by accident in the loop: refused on the host, in one sentence."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.accounting.ledger import BudgetExhausted
from dp_ilg.training.loop.lots import Lot
from tests.training.loop import scene


@pytest.fixture(scope="module")
def run():
    """A run that has taken a step: itself, its state and lots, and an older state."""
    train = scene.training()
    first = train.init(scene.start())
    lots = list(train.batches(scene.data(), ledger=None))
    state = train.step(first, lots[0])
    return dataclasses.make_dataclass("Run", ["train", "state", "lots", "first"])(
        train, state, lots, first
    )


@pytest.fixture(scope="module")
def other():
    """Another run, with a state and a lot of its own."""
    train = scene.training(seed=1)
    state = train.init(scene.start())
    return train, state, next(iter(train.batches(scene.data(), ledger=None)))


def changed(state):
    """The same state with other parameters, as one does in an ordinary loop."""
    params = jax.tree.map(lambda x: x + 1, state.params)
    return dataclasses.replace(state, params=params)


STEPS = {
    "the same lot twice": (lambda r: (r.state, r.lots[0]), "was taken already"),
    "a lot left out": (lambda r: (r.state, r.lots[2]), "lot 1 is next"),
    "an older state": (lambda r: (r.first, r.lots[1]), "was stepped already"),
    "other parameters": (lambda r: (changed(r.state), r.lots[1]), "is not the one"),
    "parameters alone": (lambda r: (r.state.params, r.lots[1]), "state is dict"),
    "a bare batch": (lambda r: (r.state, scene.data()), "lot is tuple"),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_slip_of_the_loop_is_refused_before_anything_is_computed(run, name):
    arguments, words = STEPS[name]
    state, lot = arguments(run)
    before = scene.bits(run.state.params)
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        run.train.step(state, lot)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert scene.bits(run.state.params) == before
    assert run.train._at.step == 1 and not run.lots[1]._taken()


def test_a_state_or_a_lot_of_another_run_is_refused(run, other):
    train, state, lot = other
    with pytest.raises(ValueError, match="handed out by another run"):
        run.train.step(run.state, lot)
    with pytest.raises(ValueError, match="state is of another run"):
        run.train.step(state, run.lots[1])
    twin = scene.training()  # the same seed and plan are another run all the same
    twin.init(scene.start())
    with pytest.raises(ValueError, match="state is of another run"):
        twin.step(run.state, run.lots[1])


def test_under_jit_and_scan_it_is_refused(run):
    step = run.train.step
    with pytest.raises(TypeError, match="compiled already"):
        jax.jit(lambda state: step(state, run.lots[1]))(run.state)
    with pytest.raises(TypeError, match="compiled already"):
        jax.lax.scan(lambda s, _: (step(s, run.lots[1]), None), run.state, length=2)
    with pytest.raises(TypeError, match="lots.Lot"):
        jax.jit(step)(run.state, run.lots[1])


LOOKS = {
    "len": len,
    "iteration": list,
    "unpacking": lambda lot: (lambda x, y: x)(*lot),
    "an item": lambda lot: lot[0],
    "numpy": np.asarray,
    "jax": jnp.asarray,
    "a mean": jnp.mean,
    "tree.map": lambda lot: jax.tree.map(jnp.asarray, lot),
    "device_put": jax.device_put,
    "jit": lambda lot: jax.jit(lambda x: x)(lot),
    "arithmetic": lambda lot: lot / 2,
    "pickle": pickle.dumps,
    "copy": copy.deepcopy,
}


@pytest.mark.parametrize("name", LOOKS)
def test_nothing_looks_into_a_lot(run, name):
    with pytest.raises(TypeError, match="lot"):
        LOOKS[name](run.lots[1])
    assert not run.lots[1]._taken()


def test_a_copy_with_the_same_bits_is_the_same_state():
    """`device_put`, copies and round trips change nothing, and are taken."""
    train = scene.training(optimizer=optax.sgd(0.5))
    state = train.init(scene.start())
    for lot in train.batches(scene.data(), ledger=None):
        state = jax.device_put(jax.tree.map(jnp.copy, state))
        if lot.step == 2:
            state = copy.deepcopy(state)
        state = train.step(state, lot)
    other = scene.trained(scene.training(optimizer=optax.sgd(0.5)))
    assert scene.bits(state.params) == scene.bits(other.params)


def test_state_changed_in_place_is_found(run):
    kept = run.state.params["b"]
    run.state.params["b"] = kept + 1  # a dictionary can be written to
    with pytest.raises(ValueError, match="is not the one"):
        run.train.step(run.state, run.lots[1])
    run.state.params["b"] = kept


def test_a_second_start_and_a_second_loop_are_refused(run):
    with pytest.raises(ValueError, match="has handed out 4 lots"):
        run.train.init(scene.start())
    with pytest.raises(ValueError, match="there are no epochs"):
        run.train.batches(scene.data(), ledger=None)
    rows = scene.data()[0] + 1, scene.data()[1]
    with pytest.raises(ValueError, match="The data are not those"):
        run.train.batches(rows, ledger=None, resume=True)


def test_the_plan_ends_the_loop_and_nothing_follows():
    train = scene.training(plan=scene.made_plan(2), optimizer=optax.sgd(0.1))
    state = scene.trained(train)
    assert list(train.batches(scene.data(), ledger=None, resume=True)) == []
    spare = Lot(2, train, [], lambda: None)
    with pytest.raises(BudgetExhausted, match="all 2 steps"):
        train.step(state, spare)
    with pytest.raises(TypeError, match="are not pickled"):
        pickle.dumps(state)
    assert np.isfinite(state.params["w"]).all()


CALLS = {
    "batches before init": (
        lambda t: t.batches(scene.data(), ledger=None),
        "comes after init",
    ),
    "no ledger named": (
        lambda t: (t.init(scene.start()), t.batches(scene.data())),
        "needs ledger=PATH",
    ),
    "too few examples": (
        lambda t: (t.init(scene.start()), t.batches(scene.data()[0][1:], ledger=None)),
        "hold 59 examples, but the plan is for 60",
    ),
    "parts of unequal length": (
        lambda t: (
            t.init(scene.start()),
            t.batches((scene.data()[0], scene.data()[1][1:]), ledger=None),
        ),
        "give every part the same number",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_loop_that_cannot_be_is_refused(name):
    act, words = CALLS[name]
    with pytest.raises((TypeError, ValueError), match=words):
        act(scene.training())


DOORS = {
    "no plan": (dict(plan=3), TypeError, "must be a PrivacyPlan"),
    "no loss": (dict(loss=3), TypeError, "loss_fn is int"),
    "no optimizer": (dict(optimizer=3.0), TypeError, "must be"),
    "a private optimizer": (
        dict(
            optimizer=dp_ilg.dp_adam_ilg(0.1, scene.made_plan(), key=jax.random.key(0))
        ),
        ValueError,
        "private already",
    ),
    "views of none": (dict(views=0), ValueError, "views is 0"),
    "half a micro-batch": (dict(microbatch_size=0.5), ValueError, "microbatch_size"),
    "no memory": (dict(memory_mib=0), ValueError, "memory_mib is 0"),
    "an unknown mode": (dict(clip_mode="hard"), ValueError, "hard"),
    "a seed below 0": (dict(seed=-1), ValueError, "seeds are secrets"),
    "a word for a seed": (dict(seed="x"), ValueError, "seeds are secrets"),
    "augmentation by name": (dict(augment="flip"), TypeError, "augment is str"),
}


@pytest.mark.parametrize("name", DOORS)
def test_what_cannot_be_is_refused_at_the_door(name):
    facts, kind, words = DOORS[name]
    with pytest.raises(kind, match=words):
        scene.training(**facts).init(scene.start())


def test_a_function_of_a_key_makes_any_private_optimizer():
    make = lambda key: dp_ilg.dp_adam_ilg(0.1, scene.made_plan(), key=key)  # noqa: E731
    state = scene.trained(scene.training(optimizer=make))
    assert np.isfinite(state.params["w"]).all()
    wrong = lambda key: dp_ilg.dp_adam_ilg(0.1, scene.made_plan(7), key=key)  # noqa: E731
    with pytest.raises(ValueError, match="another plan"):
        scene.training(optimizer=wrong).init(scene.start())
    with pytest.raises(TypeError, match="must make a whole private"):
        scene.training(optimizer=lambda key: optax.adam(0.1)).init(scene.start())


def test_epsilon_of_a_state_that_was_given_away_says_so(run):
    with pytest.raises(ValueError, match="was stepped already"):
        run.train.epsilon(run.first)


class Flipping:
    """A data set whose reader augments by itself, from a generator of its own."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __len__(self):
        return scene.N

    def __getitem__(self, index):
        x, y = scene.data()
        return x[index] * np.float32(self.rng.choice([-1.0, 1.0])), y[index]


def resumed(tmp_path, first, second, **facts):
    """Three steps, a save, a fourth that is lost, and on from the save in a new run."""
    book, folder = tmp_path / "run" / "ledger.jsonl", tmp_path / "saved"
    train = scene.training(seed=3, **facts)
    state = train.init(scene.start())
    with train.batches(first, ledger=book) as lots:
        for lot in lots:
            state = train.step(state, lot)
            if lot.step == 1:
                train.save(folder, state)
            if lot.step == 2:
                break
    again = scene.training(seed=3, **facts)
    again.init(scene.start())
    state = again.restore(folder)
    with again.batches(second, ledger=book, resume=True) as lots:
        return again.step(state, next(lots))


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_rows_that_are_others_when_they_are_read_again_are_refused(
    tmp_path, chunk_size
):
    facts = {"chunk_size": chunk_size}
    resumed(tmp_path / "same", scene.data(), scene.data(), **facts)
    with pytest.raises((ValueError, RuntimeError), match="other|differs"):
        resumed(tmp_path / "flip", Flipping(), Flipping(), **facts)


def test_data_written_to_while_training_are_found_when_resumed(tmp_path):
    written, labels = scene.data()
    train = scene.training(seed=3, ahead=0)
    state = train.init(scene.start())
    book, folder = tmp_path / "run" / "ledger.jsonl", tmp_path / "saved"
    with train.batches((written, labels), ledger=book) as lots:
        for lot in lots:
            written[:] = -written
            state = train.step(state, lot)
            if lot.step == 1:
                train.save(folder, state)
            if lot.step == 3:
                break
    again = scene.training(seed=3)
    again.init(scene.start())
    state = again.restore(folder)
    lots = again.batches(scene.data(), ledger=book, resume=True)
    with pytest.raises(ValueError, match="released from other"):
        for lot in lots:
            state = again.step(state, lot)


def test_another_runs_state_has_another_epsilon():
    one, two = scene.training(seed=1), scene.training(seed=2)
    state = one.init(scene.start())
    two.init(scene.start())
    for ask in (two.epsilon, two.statement, two.metrics):
        with pytest.raises(ValueError, match="of another run"):
            ask(state)
        with pytest.raises(TypeError):
            ask(None)
