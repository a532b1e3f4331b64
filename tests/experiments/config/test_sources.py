"""The sections `prior` and `probe` of a file: what they build, and what they refuse."""

import tomllib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_ilg import priors
from dp_ilg.experiments.cli.main import main
from dp_ilg.experiments.config.schema import (
    Config,
    config_from_mapping,
    config_to_toml,
)
from dp_ilg.experiments.config.sources import LAWS, LawConfig
from dp_ilg.experiments.runs.job import build_job
from dp_ilg.experiments.runs.recipe import make_plan, method_options

PATH = "hidden_0/kernel"


def config(**sections):
    whole = tomllib.loads(config_to_toml(Config()))
    for name, values in sections.items():
        whole.setdefault(name, {}).update(values)
    return config_from_mapping(whole)


def with_prior(**prior):
    given = dict(laws=[dict(path=PATH)]) | prior
    return config(optimizer=dict(source="prior"), prior=given)


def test_a_file_that_says_nothing_of_them_has_no_such_section():
    assert "[prior]" not in config_to_toml(Config())
    assert "[probe]" not in config_to_toml(Config())


def test_both_come_back_from_toml():
    probe = config(optimizer=dict(source="probe"), probe=dict(depth="kronecker"))
    laws = [dict(path="a", law="cardinality", sizes=[2, 3]), dict(path="b", axis=1)]
    for found in (probe, with_prior(laws=laws, groups="scores")):
        text = config_to_toml(found)
        assert config_from_mapping(tomllib.loads(text)) == found


@pytest.mark.parametrize("law", LAWS)
def test_every_law_is_a_helper(law):
    given: dict[str, Any] = dict(
        sizes=(2, 4), values=(1.0,) * 6, exponent=1.2, first=2, length=50.0
    )
    found = LawConfig(path="x", law=law, **given).vector(6)
    zipf = priors.zipf([1, 1, 1, 2, 3, 4], 1.2)
    there = priors.occurrence(zipf, 50)
    by_hand = dict(
        zipf=zipf, occurrence=there, idf=1 / priors.idf(there),
        cardinality=priors.cardinality([2, 4]), values=np.ones(6),
    )  # fmt: skip
    assert np.allclose(found, by_hand[law])


def test_a_prior_of_a_file_is_that_of_the_library():
    laws = [dict(path=PATH, axis=1), dict(path=PATH, law="values", values=[1.0] * 64)]
    job = build_job(with_prior(laws=laws, rule="paper", steps="whitened"))
    tx = job.make_optimizer(jax.random.key(0))
    params = job.model.init(jax.random.key(0))
    geometry = tx.geometry(tx.init(params))
    pairs = zip(geometry.groups.leaves, geometry.coordinates.back, strict=True)
    back = {leaf.path: own for leaf, own in pairs}
    ratio = np.asarray(back[PATH][1]) ** 2 / priors.zipf(64)
    assert np.allclose(ratio, ratio[0], rtol=1e-4) and geometry.coordinates.whitened
    assert np.allclose(back[PATH][0], 1)


@pytest.mark.parametrize(("groups", "spent"), [("public", 0.0), ("scores", 0.01)])
def test_scores_are_charged_where_they_are_asked_for(groups, spent):
    found = with_prior(groups=groups)
    assert make_plan(found, 1437).score_budget == spent


def test_a_probe_of_a_file_knows_the_run():
    found = config(optimizer=dict(source="probe"), probe=dict(depth="diagonal"))
    job = build_job(found)
    tx = job.make_optimizer(jax.random.key(0))
    geometry = tx.geometry(tx.init(job.model.init(jax.random.key(0))))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(geometry))
    assert geometry.coordinates is not None
    assert method_options(found)["source"].loss_fn is None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--optimizer.source", "prior"], "the file has no prior.laws"),
        (["--probe.depth", "diagonal"], "is for optimizer.source = 'probe'"),
        (["--optimizer.source", "probe", "--probe.every", "0"], "every is 0"),
        (["--optimizer.source", "probe", "--probe.batch", "red"], "'red', which is"),
        (["--optimizer.source", "probe", "--probe.batch", "zipf_tokens"], "fills rows"),
        (["--optimizer.source", "prior", "--prior.laws",
          '[{"path": "embedding"}]'], "no parameter"),
        (["--optimizer.source", "prior", "--prior.laws",
          f'[{{"path": "{PATH}", "law": "idf"}}]'], 'prior.rule = "given"'),
        (["--optimizer.source", "prior", "--prior.laws",
          f'[{{"path": "{PATH}", "law": "values"}}]'], "needs values"),
        (["--optimizer.source", "prior", "--prior.laws",
          f'[{{"path": "{PATH}", "law": "values", "values": [1.0]}}]'],
         "has 1 entries, but axis 0"),
        (["--optimizer.method", "dp_sgd", "--optimizer.source", "probe"],
         "has no option source"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_exit_2(args, words, capsys):
    with pytest.raises(SystemExit) as exit:
        raise SystemExit(main(["train", *args]))
    error = " ".join(capsys.readouterr().err.split())
    assert exit.value.code == 2 and words in error and "Traceback" not in error
