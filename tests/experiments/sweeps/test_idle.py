"""Columns of a grid that are one, code that is another run, cells that are not done."""

import dataclasses
import tomllib

import pytest

from dp_ilg.experiments.cli import compare as compare_command
from dp_ilg.experiments.config.schema import (
    Config,
    config_from_mapping,
    config_to_toml,
)
from dp_ilg.experiments.sweeps.check import check_sweep
from dp_ilg.experiments.sweeps.idle import IDLE, idle_because
from dp_ilg.experiments.sweeps.report import Comparison
from dp_ilg.experiments.sweeps.runs import cells, config_key, grid_of
from dp_ilg.experiments.sweeps.sweep import (
    Method,
    Sweep,
    Task,
    Tuning,
    merged,
    nested,
)


def test_values_of_a_parameter_that_does_nothing_are_one_column():
    """DP-Adam that normalises: the clip norm scales what Adam divides out again."""
    changed = {"optimizer": {"importance": "uniform"}}
    idle = changed | {"privacy": {"clip_mode": "normalize"}}
    methods = (
        Method("dp_adam", {"optimizer": {"method": "dp_adam"}}),
        Method("normalize", idle),
        Method("one value", idle, parameter="privacy.l2_clip_norm", values=(1.0,)),
    )
    tuning = Tuning(learning_rates=(0.1, 0.3), values=(0.3, 1.0))
    sweep = Sweep(tasks=(Task("digits"),), methods=methods, tuning=tuning)
    check_sweep(sweep)
    values = {cell.method: grid_of(sweep, cell).values for cell in cells(sweep)}
    assert values == {"dp_adam": (0.3, 1.0), "normalize": (0.3,), "one value": (1.0,)}
    lines = Comparison(sweep, {}, ()).columns()
    assert (
        len(lines) == 2 and "digits, normalize: privacy.l2_clip_norm does" in lines[0]
    )
    active = dataclasses.replace(methods[2], overrides=changed)
    with pytest.raises(ValueError, match="has 1 values of privacy.l2_clip_norm but"):
        check_sweep(dataclasses.replace(sweep, methods=(*methods[:2], active)))


def test_every_case_of_an_idle_parameter_holds_somewhere_and_not_everywhere():
    plain = {"optimizer": {"method": "dp_adam"}}
    uniform = {"optimizer": {"importance": "uniform"}}
    normal = uniform | {"privacy": {"clip_mode": "normalize"}}
    chosen = {"privacy.l2_clip_norm": normal, "privacy.score_budget": plain}
    for case in IDLE:
        base = nested({"privacy.epsilon": 1.0})
        where = merged(base, chosen.get(case.parameter, uniform))
        whole = merged(tomllib.loads(config_to_toml(Config())), where)
        assert idle_because(config_from_mapping(whole), case.parameter) == case.why
        assert not idle_because(Config(), case.parameter)


def test_other_code_is_another_run():
    config = dataclasses.asdict(Config())
    assert config_key(config, {}) == config_key(config)
    assert len({config_key(config, {"source of a": d}) for d in "123"}) == 3


def test_what_is_not_done_is_said_with_why():
    assert compare_command._not_done([]) == []
    assert compare_command._not_done(["a: failed. No."]) == [
        "1 cell is not done:",
        "a: failed. No.",
    ]
    many = compare_command._not_done([str(n) for n in range(9)])
    assert many[0] == "9 cells are not done:" and many[-1].startswith("And 4 more")
