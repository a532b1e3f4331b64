"""A task that is measured by its error: the least is chosen, and nothing is percent."""

import json

import pytest

from dp_ilg.experiments.cli.compare import _row
from dp_ilg.experiments.config.kinds import MEASURES, measure_in
from dp_ilg.experiments.sweeps import plots
from dp_ilg.experiments.sweeps.board import choose, run_record
from dp_ilg.experiments.sweeps.compare import _row as as_json
from dp_ilg.experiments.sweeps.report import Comparison, table_of, write_comparison
from dp_ilg.experiments.sweeps.results import _is_run
from dp_ilg.experiments.sweeps.runs import cells, grid_of, tuning_runs
from dp_ilg.experiments.sweeps.statistics import results_of
from dp_ilg.experiments.sweeps.sweep import Method, Sweep, Task, Tuning

ERRORS = {0.01: 1.3, 0.1: 0.9, 1.0: 1.1}  # by learning rate
SWEEP = Sweep(
    tasks=(Task(config="digits"),),
    methods=(
        Method("uniform", {"optimizer": {"importance": "uniform"}}),
        Method("scores"),
    ),
    tuning=Tuning(learning_rates=tuple(ERRORS)),
    reference="uniform",
    seeds=(0, 1, 2),
)


def error_of(run):
    """Made up: 0.01 less with scores, and a little by seed."""
    gain = 0.01 * (run.cell.method == "scores")
    return ERRORS[run.choice.learning_rate] - gain + 0.001 * (run.seed % 10)


def find(run):
    found = {"status": "done", "mse": error_of(run), "train_seconds": 1.0}
    return found | run.described() | {"kind": "run", "seconds": 1.0}


def test_the_least_error_is_chosen():
    cell = cells(SWEEP)[0]
    runs = tuning_runs(SWEEP, cell)
    choice, held = choose(grid_of(SWEEP, cell), runs, find) or (None, None)
    assert choice is not None and choice.learning_rate == 0.1
    assert held == pytest.approx(0.9)


def test_tables_say_the_error_and_its_difference():
    found = results_of(SWEEP, find, {})
    uniform, scores = found.values()
    assert uniform.mean == pytest.approx(0.901) and uniform.measure.name == "mse"
    assert scores.difference is not None
    assert scores.difference.mean == pytest.approx(-0.01)
    shown = table_of([uniform, scores], "uniform")
    assert shown[0]["cells"][0]["mean"] == "0.9010 ± 0.0010"
    assert shown[1]["cells"][0]["gap"].startswith("-0.0100 (")
    assert _row(as_json(scores))["reached"] == "0.8910 ± 0.0010"
    for draw in (plots.accuracy_figure, plots.sensitivity_figure):
        axes = draw([uniform, scores], "uniform").axes[0]
        assert axes.get_ylabel().endswith("MSE")


def test_the_report_says_that_less_is_better(tmp_path):
    write_comparison(Comparison(SWEEP, results_of(SWEEP, find, {}), ()), tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "Test MSE, better where less; mean" in text
        assert "percent" not in text and "accuracy in" not in text


def test_a_line_of_an_error_is_a_record_and_a_negative_one_is_none():
    run = tuning_runs(SWEEP, cells(SWEEP)[0])[0]
    reached = {"epsilon_spent": 1.0, "delta": 1e-5, "plan": "{}", "mse": 1.2}
    reached |= {"status": "done", "seconds": 1.0, "train_seconds": 1.0}
    record = json.loads(json.dumps(run_record(run, reached)))
    assert record["mse_on"] == "held-out training examples" and _is_run(record)
    assert not _is_run(record | {"mse": -0.1})
    with pytest.raises(KeyError):
        _is_run({k: v for k, v in record.items() if k != "mse"})


@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_shows_itself(name):
    measure = MEASURES[name]
    assert measure_in({measure.key: 0.5}, "test_") is measure
    assert measure.is_sound(0.5) and not measure.is_sound(-0.5)
    assert not measure.is_sound(float("nan"))
    worse = 0.6 if measure.least else 0.4
    assert measure.better(0.5) > measure.better(worse)
    assert str(round(measure.scale * 0.5)) in measure.shown(0.5)
