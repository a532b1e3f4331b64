"""Configurations: digits by default, a round trip, and one sentence for mistakes."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_ilg.experiments.config.schema import (
    BlockConfig,
    Config,
    LearningRateConfig,
    ModelConfig,
    OptimizerConfig,
    PrivacyConfig,
    RunConfig,
    ScheduleConfig,
    config_from_mapping,
    config_to_toml,
    read_config,
)

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.toml"))


def mapping(**changes):
    """The digits run as TOML sees it, with changed fields (section__field=value)."""
    whole = tomllib.loads(config_to_toml(Config()))
    for place, value in changes.items():
        section, name = place.split("__")
        whole[section][name] = value
    return whole


def test_the_defaults_are_the_digits_file():
    digits = next(path for path in CONFIGS if path.name == "digits.toml")
    assert read_config(digits) == Config()


def test_the_four_runs_are_there():
    names = {path.stem for path in CONFIGS}
    assert names >= {"digits", "mnist_cnn", "imdb_embedding", "adult_mlp"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_survives_being_written(path, tmp_path):
    config = read_config(path)
    copy = tmp_path / "config.toml"
    copy.write_text(config_to_toml(config))
    assert read_config(copy) == config
    assert config.run.seed is None  # a published seed would void the guarantee


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
floats = st.floats(1e-300, 1e300, allow_nan=False)


@given(
    texts,
    st.floats(1e-300, 0.999),
    floats,
    st.lists(st.integers(1, 2**40), max_size=4).map(tuple),
    st.lists(texts, max_size=3).map(tuple),
    st.booleans(),
)
def test_any_values_survive_being_written(name, delta, rate, hidden, frozen, show):
    blocks = (BlockConfig(name, edges=hidden), BlockConfig(name, num_blocks=3))
    config = Config(
        model=ModelConfig(name=name, hidden=hidden),
        privacy=PrivacyConfig(
            delta=delta, schedule=ScheduleConfig(name, values=(1.0,))
        ),
        optimizer=OptimizerConfig(
            learning_rate=rate,
            learning_rate_schedule=LearningRateConfig("cosine", 3),
            blocks=blocks,
            frozen=frozen,
        ),
        run=RunConfig(unprotected_train_loss=show),
    )
    assert config_from_mapping(tomllib.loads(config_to_toml(config))) == config


def test_the_seed_is_written_only_when_asked_for():
    config = Config(run=RunConfig(seed=424242))
    assert "424242" not in config_to_toml(config)
    assert "seed = 424242" in config_to_toml(config, seed=True)


MISTAKES = {
    "unknown section": (
        lambda m: m | {"privcy": {}},
        "unknown section privcy; did you mean privacy?",
    ),
    "unknown section alone": (
        lambda m: {"pirvacy": m["privacy"]},
        "unknown section pirvacy; did you mean privacy?",
    ),
    "unknown section inside the only one": (
        lambda m: {"privacy": m["privacy"] | {"shedule": {"name": "linear"}}},
        "unknown section privacy.shedule; did you mean privacy.schedule?",
    ),
    "unknown field in the only section": (
        lambda m: {"privacy": {"epsilom": 1.0}},
        "unknown field privacy.epsilom; did you mean privacy.epsilon?",
    ),
    "only one section": (
        lambda m: {"privacy": m["privacy"]},
        "lacks the section [data]",
    ),
    "unknown field": (
        lambda m: mapping(privacy__epsilom=1.0),
        "unknown field privacy.epsilom; did you mean privacy.epsilon?",
    ),
    "unknown field, nothing near": (
        lambda m: mapping(data__zzz=1),
        "unknown field data.zzz; known are data.augment, data.features, "
        "data.name, data.num_classes, data.num_tokens, data.projection, data.scale, "
        "data.validation.",
    ),
    "missing section": (
        lambda m: {k: v for k, v in m.items() if k != "data"},
        "lacks the section [data]",
    ),
    "missing field": (
        lambda m: m | {"data": {}},
        "lacks the field data.name",
    ),
    "missing epsilon": (
        lambda m: (
            m | {"privacy": {k: v for k, v in m["privacy"].items() if k != "epsilon"}}
        ),
        "lacks the field privacy.epsilon",
    ),
    "text for a number": (
        lambda m: mapping(privacy__epsilon="2"),
        "privacy.epsilon = '2', but it must be a number",
    ),
    "bool for a whole number": (
        lambda m: mapping(privacy__num_steps=True),
        "must be a whole number",
    ),
    "float for a whole number": (
        lambda m: mapping(privacy__batch_size=1.5),
        "must be a whole number",
    ),
    "number for text": (lambda m: mapping(data__name=3), "must be a string"),
    "number for bool": (
        lambda m: mapping(run__unprotected_train_loss=1),
        "must be true or false",
    ),
    "name of before": (
        lambda m: m | {"run": {"show_private_loss": True}},
        "now called run.unprotected_train_loss",
    ),
    "metrics for nothing": (
        lambda m: m | {"metrics": {"release": True, "budget": 0.0}},
        "metrics.budget",
    ),
    "average of nothing": (
        lambda m: m | {"metrics": {"smooth_steps": 0}},
        "must be at least 1",
    ),
    "no list": (lambda m: mapping(model__hidden=64), "must be a list"),
    "list of text": (
        lambda m: mapping(model__hidden=["a"]),
        "model.hidden[0] = 'a', but it must be a whole number",
    ),
    "no choice": (
        lambda m: mapping(privacy__clip_mode="joined"),
        "one of joint, normalize, per_layer",
    ),
    "no table": (lambda m: mapping(privacy__schedule="linear"), "must be a table"),
    "inside a table": (
        lambda m: mapping(privacy__schedule={"name": "linear", "ends": 1.0}),
        "privacy.schedule.ends; did you mean privacy.schedule.end?",
    ),
    "blocks both ways": (
        lambda m: mapping(
            optimizer__blocks=[{"path": "e", "num_blocks": 2, "edges": [1]}]
        ),
        "exactly one",
    ),
    **{
        f"epsilon {value}": (
            lambda m, v=value: mapping(privacy__epsilon=v),
            "privacy.epsilon",
        )
        for value in (0.0, -1.0, float("nan"), float("inf"))
    },
    **{
        f"delta {value}": (
            lambda m, v=value: mapping(privacy__delta=v),
            "privacy.delta",
        )
        for value in (0.0, 1.0, -0.1, float("nan"))
    },
    "clip": (lambda m: mapping(privacy__l2_clip_norm=0.0), "privacy.l2_clip_norm"),
    "rate": (lambda m: mapping(optimizer__learning_rate=-0.1), "learning_rate"),
    "batch": (lambda m: mapping(privacy__batch_size=0), "privacy.batch_size"),
    "seed": (lambda m: mapping(run__seed=-1), "run.seed"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence(case):
    change, words = MISTAKES[case]
    with pytest.raises(ValueError) as caught:
        config_from_mapping(change(mapping()), source="my.toml")
    message = str(caught.value)
    assert words in message
    assert "\n" not in message


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_config(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_config(tmp_path)
    bad = tmp_path / "bad.toml"
    bad.write_text("[data\n")
    with pytest.raises(ValueError, match="is not valid TOML"):
        read_config(bad)
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not valid TOML"):
        read_config(bad)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().privacy.epsilon = 1.0  # type: ignore[misc]
