"""Parts from outside in whole runs: trained, recorded, resumed, refused."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import dp_ilg
from dp_ilg.baselines.made_of import parts_of
from dp_ilg.baselines.table import baseline
from dp_ilg.experiments.cli.main import main
from dp_ilg.experiments.config.schema import config_from_mapping, config_to_toml
from dp_ilg.experiments.models.networks import build_model
from dp_ilg.experiments.models.sizes import Facts
from dp_ilg.experiments.runs.job import build_job
from dp_ilg.experiments.runs.keys import program_digest
from dp_ilg.experiments.runs.outside.parts import check_for_workers, sources
from dp_ilg.experiments.sweeps.bench import Bench
from dp_ilg.experiments.sweeps.worker import answer
from dp_ilg.geometry.rules import RULES
from dp_ilg.registry.source import forget
from dp_ilg.training.checkpoints import load_checkpoint, save_checkpoint

CODE = """
import dp_ilg
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from dp_ilg.base import PrivateTransformation
from flax import nnx
from sklearn.datasets import load_digits


def steep(importance, sizes):
    return importance**0.75 * sizes**-0.25


def negative(importance, sizes):
    return -importance


def rises(step):
    return 1 + step / 100


def lion(learning_rate, plan, *, key):
    return dp_ilg.chain(
        dp_ilg.clip_per_example(plan.l2_clip_norm, clip_mode="normalize"),
        dp_ilg.set_layer_importance("uniform", None),
        dp_ilg.add_importance_noise(plan, key=key),
        optax.lion(learning_rate),
    )


def scored(rate, plan, *, key, importance="paper", layers="module"):
    return dp_ilg.dp_adam_ilg(rate, plan, key=key, importance=importance, layers=layers)


def no_noise(learning_rate, plan, *, key):
    return optax.adam(learning_rate)


def own_key(learning_rate, plan, *, key):
    return lion(learning_rate, plan, key=jax.random.key(7))


def own_plan(learning_rate, plan, *, key):
    other = dp_ilg.plan_privacy(noise_multiplier=0.1, delta=1e-5, num_examples=1000,
        batch_size=100, num_steps=9, score_budget=0)
    return lion(learning_rate, other, key=key)


def peeks(learning_rate, plan, *, key):
    return dp_ilg.chain(
        dp_ilg.clip_per_example(plan.l2_clip_norm),
        PrivateTransformation(
            lambda params: (),
            lambda updates, state, params=None, **extra: (updates, state),
            role="score",
            geometry=lambda state: None,
        ),
        dp_ilg.add_importance_noise(plan, key=key),
    )


def broken(learning_rate, plan, *, key):
    return optax.adam(learning_rate, b7=3)


class Tiny(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(x.reshape(len(x), -1))


class TinyNnx(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.layer(x.reshape(len(x), -1))


def sized(facts, hidden=(8,)):
    layers = [nn.Dense(width) for width in hidden]
    flat = lambda x: x.reshape(len(x), -1)
    return nn.Sequential([flat, *layers, nn.Dense(facts.num_classes)])


def apart(facts):
    init = lambda key: {"w": jnp.zeros((64, facts.num_classes))}
    return init, lambda params, xs: xs.reshape(len(xs), -1) @ params["w"]


def number(facts):
    return 3


def flipped():
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    return x[360:, ::-1], y[360:], x[:360], y[:360]


def raises():
    raise RuntimeError("no disk")


def wrong():
    return 3


def halves(x):
    return x.reshape(len(x), -1)[:, ::2]


def mixes(x):
    return x.reshape(len(x), -1) - x.reshape(len(x), -1).mean(0)


def fewer(x):
    return x.reshape(len(x), -1)[:2]
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A folder with a file of parts, which is the current one."""
    (tmp_path / "mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    forget()
    yield tmp_path
    forget()


def config(**changes):
    found = {
        "data": {"name": "digits"},
        "model": {"name": "linear"},
        "privacy": dict(
            epsilon=4.0, delta=1e-5, batch_size=64, num_steps=3, accountant="rdp"
        ),
        "optimizer": {"learning_rate": 0.02},
        "run": {"seed": 0},
    }
    for name, value in changes.items():
        section, _, field = name.partition("_of_")
        found[section][field] = value
    return config_from_mapping(found)


ALL = {
    "data_of_name": "./mine.py:flipped",
    "data_of_num_classes": 10,
    "data_of_features": "./mine.py:halves",
    "model_of_name": "./mine.py:sized",
    "privacy_of_schedule": {"name": "./mine.py:rises"},
    "optimizer_of_method": "./mine.py:scored",
    "optimizer_of_importance": "./mine.py:steep",
}


@pytest.mark.slow
def test_six_parts_in_one_run_that_resumes_with_the_same_code(here, capsys):
    (here / "run.toml").write_text(config_to_toml(config(**ALL), seed=True))
    command = ["train", "run.toml", "--run-dir", "run", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["outside"].keys() == {
        f"source of ./mine.py:{name}"
        for name in ("flipped", "halves", "sized", "rises", "scored", "steep")
    }
    assert "is not stated" in found["data_note"]
    assert found["made_of"].startswith("clip_per_example, score_layer_importance, ")
    assert found["noise_multipliers"][-1] > found["noise_multipliers"][0]
    assert main([*command[:4], "--resume", "--json"]) == 0
    assert (
        json.loads(capsys.readouterr().out)["params_sha256"] == found["params_sha256"]
    )
    (here / "mine.py").write_text(CODE + "\n\nmore = 1\n")
    forget()
    assert main([*command[:4], "--resume"]) == 2
    said = capsys.readouterr().err
    assert "with another source of ./mine.py:" in said and "put the code back" in said
    assert said.count("\n") == 1


def test_other_code_is_another_program_with_other_keys(here):
    first = build_job(config(optimizer_of_importance="./mine.py:steep"))
    (here / "mine.py").write_text(CODE.replace("0.75", "0.5"))
    forget()
    second = build_job(config(optimizer_of_importance="./mine.py:steep"))
    assert program_digest(first) != program_digest(second)
    assert sources(config()) == {}


def test_a_checkpoint_of_other_code_is_refused(here):
    name = "source of ./mine.py:steep"
    save_checkpoint(here / "c", 3, {"w": jnp.ones(2)}, {name: "abc"})
    like = {"w": jnp.zeros(2)}
    assert load_checkpoint(here / "c", like, {name: "abc"})[0] == 3
    with pytest.raises(ValueError, match="steep .abc, not xyz.; put the code back"):
        load_checkpoint(here / "c", like, {name: "xyz"})


def test_a_worker_process_finds_the_same_parts_and_refuses_other_code(monkeypatch):
    text = config_to_toml(config(**ALL), seed=True)
    known = sources(config(**ALL))
    request = {"config": text, "group": "a", "sources": known}
    asked = []

    def run(self, given, group):
        asked.append(given)
        return {"status": "done"}

    monkeypatch.setattr(Bench, "run", run)
    assert answer(Bench(None), request) == {"status": "done"}
    assert asked[0] == config(**ALL)
    found = answer(Bench(None), request | {"sources": {k: "0" for k in known}})
    assert found["status"] == "failed" and "changed while the sweep" in found["error"]


def test_a_row_that_only_this_process_has_is_refused_where_workers_run(monkeypatch):
    monkeypatch.setitem(RULES, "mine", RULES["paper"])
    with pytest.raises(ValueError, match="in this process alone.*give ./file.py:name"):
        check_for_workers(config(optimizer_of_importance="mine"))
    check_for_workers(config(optimizer_of_importance="./mine.py:steep"))


# --- methods -------------------------------------------------------------------


def test_a_method_is_labelled_by_what_it_is_made_of():
    row = baseline("./mine.py:lion")
    assert row.options() == () and not row.spends_scores()
    assert row.clip_mode().name == "normalize"
    scored = baseline("./mine.py:scored")
    assert scored.options() == ("importance", "layers") and scored.spends_scores()
    plan = build_job(config(optimizer_of_method="./mine.py:lion")).plan
    assert plan.score_budget == 0
    tx = row(0.1, plan, key=jax.random.key(0))
    assert parts_of(tx)[:3] == (
        "clip_per_example",
        "set_layer_importance",
        "add_importance_noise",
    )
    assert build_job(config(optimizer_of_method="./mine.py:scored")).plan.score_budget


WRONG = {
    "method no_noise": "makes a GradientTransformationExtraArgs, but must make a",
    "method own_key": "draws noise under a key of its own",
    "method own_plan": "which is the one that is accounted; pass it on",
    "method peeks": "puts .* before the noise, which is none of dp_ilg",
    "method broken": "cannot be made .TypeError: .*b7",
    "method sized": "but a method is a function .learning_rate, plan",
    "importance negative": "but must give one positive finite weight each",
    "importance Tiny": "is the class Tiny, but a rule is a function",
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_a_method_or_a_rule_is_one_sentence(case):
    field, name = case.split()
    with pytest.raises(ValueError, match=WRONG[case]) as caught:
        build_job(config(**{f"optimizer_of_{field}": f"./mine.py:{name}"}))
    assert "\n" not in str(caught.value)


def test_a_method_without_groups_refuses_them():
    with pytest.raises(ValueError, match="lion, which has no option layers"):
        build_job(
            config(optimizer_of_method="./mine.py:lion", optimizer_of_frozen=["w"])
        )


# --- models, data, features ----------------------------------------------------


@pytest.mark.parametrize("name", ["Tiny", "TinyNnx", "sized", "apart"])
def test_a_model_is_a_module_a_function_or_two(name):
    model = build_model(f"./mine.py:{name}", Facts(jnp.zeros((8, 8, 1)), 10))
    params = model.init(jax.random.key(0))
    assert model.predict(params, jnp.zeros((2, 8, 8, 1))).shape == (2,)


def test_a_model_takes_the_sizes_it_has():
    facts = Facts(jnp.zeros((8, 8, 1)), 10)
    wide = build_model("./mine.py:sized", facts, hidden=(5, 4))
    shapes = {x.shape for x in jax.tree.leaves(wide.init(jax.random.key(0)))}
    assert {(64, 5), (5, 4), (4, 10)} <= shapes
    with pytest.raises(ValueError, match="cannot be made .TypeError: .*depth"):
        build_model("./mine.py:sized", facts, depth=3)
    with pytest.raises(ValueError, match="gives an int, but a model is"):
        build_model("./mine.py:number", facts)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data_of_name": "./mine.py:raises"}, "raises RuntimeError: no disk"),
        ({"data_of_name": "./mine.py:wrong"}, "returns an int, but must return a map"),
        ({"data_of_name": "./mine.py:steep"}, "but a dataset is a function without"),
        (
            {"data_of_name": "./mine.py:flipped"},
            "how many classes.*not counted.*num-classes",
        ),
        ({"data_of_features": "./mine.py:mixes"}, "when others stand beside it"),
        ({"data_of_features": "./mine.py:fewer"}, "one row of features each"),
        ({"data_of_num_classes": 7}, "data.num_classes is 7, but digits states 10"),
        ({"data_of_scale": 2.0}, "data.scale is 2, but digits says itself"),
    ],
)
def test_data_that_cannot_be_are_one_sentence(changes, words):
    with pytest.raises(ValueError, match=words) as caught:
        build_job(config(**changes))
    assert "\n" not in str(caught.value)


def test_python_takes_the_same_names():
    facts: Any = dict(delta=1e-5, num_examples=100, batch_size=10, num_steps=4)
    plan = dp_ilg.plan_privacy(
        noise_multiplier=2.0, schedule="./mine.py:rises", **facts
    )
    rule: Any = dict(importance="./mine.py:steep", source="public")
    tx = dp_ilg.dp_adam_ilg(0.1, plan, key=jax.random.key(0), **rule)
    weights = tx.geometry(tx.init({"a": jnp.ones(2), "b": jnp.ones(200)})).weights
    assert weights[0] > weights[1]
