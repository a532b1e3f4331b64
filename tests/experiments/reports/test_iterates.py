"""The error bar from the last iterates: which evaluations, and what it says."""

import dataclasses
import json

import numpy as np
import pytest

from dp_ilg.experiments.cli.commands import TRAIN_ROWS
from dp_ilg.experiments.config.run import RunConfig
from dp_ilg.experiments.reports.card import render_card
from dp_ilg.experiments.reports.iterates import LEAST, MOST, last_iterates, of_metrics
from dp_ilg.experiments.reports.page import render_report
from dp_ilg.experiments.reports.record import read_run
from dp_ilg.experiments.runs.runner import run_training
from tests.experiments.runs.test_trainer import tiny


def test_the_last_five_of_the_second_half_count():
    steps = np.arange(1, 21) * 10.0
    values = np.linspace(0.1, 0.9, 20)
    found = last_iterates(steps, values)
    assert found is not None and found.evaluations == MOST
    assert (found.first_step, found.last_step) == (160, 200)
    assert found.mean == pytest.approx(np.mean(values[-5:]))
    assert found.std == pytest.approx(np.std(values[-5:], ddof=1))
    early = last_iterates(steps[:5], values[:5])  # 30, 40, 50 of 50
    assert early is not None and (early.evaluations, early.first_step) == (3, 30)


@pytest.mark.parametrize("count", range(LEAST + 1))
def test_too_few_or_broken_evaluations_have_no_spread(count):
    """Two of four lie before the middle: no spread of two numbers is shown."""
    assert last_iterates(np.arange(1.0, count + 1), [0.5] * count) is None
    assert last_iterates([10, 20, 30, 31], [0.5, 0.5, np.nan, 0.6]) is None


def test_a_step_told_twice_and_damaged_lines_count_once_or_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [(s, a) for s, a in zip((8, 9, 9, 10), (0.1, 0.9, 0.2, 0.3), strict=True)]
    lines = [json.dumps({"step": s, "test_accuracy": a}) for s, a in rows]
    path.write_text("\n".join([*lines, '{"step": 11, "test_acc']))
    found = of_metrics(path)
    assert found is not None and found.mean == pytest.approx(0.2)


def test_folder_table_page_and_card_say_it(tmp_path):
    config = tiny()
    often = RunConfig(seed=0, eval_every=2, checkpoint_every=100)
    config = dataclasses.replace(config, run=often)
    path = tmp_path / "run"
    summary = run_training(config, path)
    lines = [json.loads(x) for x in (path / "metrics.jsonl").read_text().splitlines()]
    last = [line["test_accuracy"] for line in lines][-MOST:]
    assert summary["iterates"]["mean"] == pytest.approx(np.mean(last))
    assert summary["iterates"]["std"] == pytest.approx(np.std(last, ddof=1))
    said = summary["iterates_in_words"]
    assert "not how much another seed would" in said
    assert TRAIN_ROWS["iterates_in_words"][1].format(said) == said
    record = read_run(path)
    assert said in render_report(record) and "Over the last iterates" in (
        render_card(record)
    )
