"""The reproductions: claimed epsilons to the digit, runs that resume, one sentence."""

import dataclasses
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.baselines.published import PublishedSettings
from dp_ilg.experiments.cli import main as cli
from dp_ilg.experiments.cli import studies
from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.models.resnet import ResNet
from dp_ilg.experiments.papers import ilg_accuracies, ilg_epsilons, ilg_runs
from dp_ilg.experiments.papers.reproduce import REPRODUCTIONS, ReproduceOptions, RunLog

QUICK = ReproduceOptions(quick=True, seeds=1, only=("mnist",))


def test_all_fifteen_claimed_epsilons_to_the_last_printed_digit(capsys):
    assert cli.main(["reproduce", "table2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == found["agreeing"] == 15
    for row in found["rows"]:
        assert row["claimed_epsilon_computed"] == row["claimed_epsilon_printed"]
    assert not any(
        "epsilon" in key and "claimed" not in key for key in found["rows"][0]
    )
    assert "NO privacy guarantee" in found["notes"][0]


def test_table2_would_see_a_charge_too_many(monkeypatch):
    rows = {name: ilg_epsilons.METHODS[name] for name in ilg_epsilons.METHODS}
    more = {name: lambda s, n, f=f: f(s, n + 1) for name, f in rows.items()}
    monkeypatch.setattr(ilg_epsilons, "METHODS", more)
    assert ilg_epsilons.table2(ReproduceOptions())["agreeing"] == 0


def test_table2_is_a_table_for_people(capsys):
    assert cli.main(["reproduce", "table2", "--only", "cifar10"]) == 0
    out = capsys.readouterr().out
    assert "9.227" not in out and "8.705" in out and "claimed" in out
    for line in out.splitlines():  # never an epsilon without the word
        assert "epsilon" not in line or "claimed" in line.lower() or "┃" in line


def test_table3_runs_every_method_and_resumes(tmp_path, capsys):
    options = dataclasses.replace(QUICK, out=tmp_path / "runs.jsonl")
    found = ilg_accuracies.table3(options)
    (row,) = found["rows"]
    assert row["paper"] is None and row["seeds"] == 1  # beside digits it says nothing
    assert 0 < row["guaranteed_epsilon"] <= row["claimed_epsilon"]
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    methods = ["published, divided", ilg_accuracies.GUARANTEED, "published, printed"]
    assert [r["method"] for r in records] == methods
    for record in records:
        assert record["quick"] and record["steps"] == 33
        private = record["method"] == ilg_accuracies.GUARANTEED
        assert ("epsilon" in record) == private != ("claimed_epsilon" in record)
        assert {"machine", "versions", "command", "date"} <= record.keys()
    capsys.readouterr()
    assert ilg_accuracies.table3(options) == found  # nothing is run again
    assert capsys.readouterr().err == ""
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines


def test_no_time_is_said_and_gives_no_row(capsys):
    found = ilg_accuracies.table3(dataclasses.replace(QUICK, max_minutes=1e-9))
    assert found["rows"] == []
    assert capsys.readouterr().err.count("no time left") == 3


def problem(size=40):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(size, 3)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32)
    return ilg_runs.Problem(
        apply=lambda params, x: x @ params["w"],
        init=lambda key: {"w": jax.random.normal(key, (3, 2))},
        **dict(x_train=x, y_train=y, x_test=x, y_test=y),
    )


def test_runs_use_exactly_their_budget_and_stop_in_time():
    settings = PublishedSettings(
        noise_multiplier=10, decay=0, batch_size=8, num_examples=40, rho_total=0.011
    )
    fixed = dict(learning_rate=0.1, seed=0)
    found = ilg_runs.run_published(
        problem(),
        settings,
        reading="divided",
        **fixed,  # pyright: ignore
    )
    assert found["finished"] and found["steps"] == 10 and found["epochs"] == 2
    assert len(found["accuracy_by_epoch"]) == 2
    assert found["claimed_epsilon"] == pytest.approx(
        0.01 + 2 * np.sqrt(0.01 * np.log(1e5)), rel=1e-9
    )
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1, delta=1e-5, num_examples=40, batch_size=8, num_steps=6
    )
    ours = ilg_runs.run_guaranteed(problem(), plan, **fixed)  # pyright: ignore
    assert ours["finished"] and ours["steps"] == 6
    assert ours["epsilon"] == plan.epsilon()
    late = ilg_runs.run_guaranteed(
        problem(),
        plan,
        deadline=time.monotonic() - 1,
        **fixed,  # pyright: ignore
    )
    assert not late["finished"] and late["steps"] == 1
    assert late["epsilon"] == plan.epsilon(1) < plan.epsilon()


def test_both_learn_where_the_noise_is_small():
    settings = PublishedSettings(
        noise_multiplier=5, decay=0, batch_size=8, num_examples=40, rho_total=0.9
    )
    plan = dp_ilg.plan_privacy(
        noise_multiplier=0.5, delta=1e-5, num_examples=40, batch_size=8, num_steps=150
    )
    fixed = dict(learning_rate=0.05, seed=1)
    ours = ilg_runs.run_guaranteed(problem(), plan, **fixed)  # pyright: ignore
    theirs = ilg_runs.run_published(
        problem(),
        settings,
        reading="divided",
        **fixed,  # pyright: ignore
    )
    assert ours["test_accuracy"] > 0.9 and theirs["test_accuracy"] > 0.9


def test_batches_of_an_epoch_are_disjoint():
    settings = PublishedSettings(
        noise_multiplier=10, decay=0, batch_size=8, num_examples=43, rho_total=0.011
    )
    rows = list(ilg_runs._shuffled(settings, 0))
    assert len(rows) == 10
    for epoch in (rows[:5], rows[5:]):
        assert len(set(np.concatenate(epoch))) == 40
    assert not np.array_equal(rows[0], rows[5])


def test_principal_components_are_those_of_a_singular_value_decomposition():
    x = np.random.default_rng(0).normal(size=(50, 6)) * np.arange(1, 7)
    mean, directions = ilg_runs.principal_components(x, 3)
    _, _, expected = np.linalg.svd(x - x.mean(0))
    np.testing.assert_allclose(
        np.abs(directions @ expected[:3].T), np.eye(3), atol=1e-9
    )
    np.testing.assert_allclose(mean, x.mean(0))
    with pytest.raises(ValueError, match="num_components is 7, but the data has 6"):
        ilg_runs.principal_components(x, 7)


def test_the_resnet_mixes_no_examples():
    net = ResNet(3, widths=(4, 8), groups=2)
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    rng, shapes = (
        np.random.default_rng(1),
        jax.eval_shape(net.init, jax.random.key(1), x),
    )
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape)), shapes)
    apply = jax.jit(net.apply)
    whole, alone = apply(params, x), apply(params, x.at[1:].set(0))
    np.testing.assert_allclose(whole[0], alone[0], rtol=1e-5, atol=1e-6)
    assert whole.shape == (3, 3) and not jnp.allclose(whole[1], alone[1])


def test_the_log_finds_what_it_wrote(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    RunLog(path).add({"row": "a", "seed": 1}, {"x": 2})
    assert (RunLog(path).find({"row": "a", "seed": 1}) or {})["x"] == 2
    assert RunLog(path).find({"row": "a", "seed": 2}) is None
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"Line 1 of .* is no JSON object; remove it"):
        RunLog(path)


def test_rows_name_functions_that_exist():
    from importlib import import_module

    for row in REPRODUCTIONS.values():
        assert callable(getattr(import_module(row.module), row.function))


def test_an_absent_data_set_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"cifar10 is not in .*; get cifar10.npz"):
        ilg_accuracies.table3(ReproduceOptions(data_dir=tmp_path, only=("cifar10",)))


def test_a_part_of_the_data_is_refused(monkeypatch):
    digits = ilg_accuracies.load_dataset("digits")
    monkeypatch.setattr(ilg_accuracies, "load_dataset", lambda name, folder: digits)
    with pytest.raises(ValueError, match="mnist has 1437 training examples, but the"):
        ilg_accuracies.table3(ReproduceOptions(only=("mnist",)))


@pytest.mark.slow
def test_the_timed_row_runs_on_the_residual_network():
    found = ilg_accuracies.table3(dataclasses.replace(QUICK, only=("cifar10",)))
    (row,) = found["rows"]
    assert row["guaranteed_epsilon"] <= row["claimed_epsilon"]
    assert "not comparable" in found["notes"][-1]


def test_a_table_wider_than_the_terminal_loses_no_letter(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    row = {"method": "a-long-name", **{f"column_number_{i}": i / 7 for i in range(9)}}
    for rows in ([row, row | {"method": "b"}, row], [row] * 9):
        studies.show_rows({"title": "t", "rows": rows, "notes": []}, False)
        out = capsys.readouterr().out
        assert "…" not in out and max(map(len, out.splitlines())) <= 60
        if len(rows) < 9:
            assert "column number 8" in out and "1 a-long-name" in out


def test_the_quick_form_of_table3_says_what_it_is():
    found = ilg_accuracies.table3(dataclasses.replace(QUICK, max_minutes=1e-9))
    assert "the numbers mean nothing" in found["notes"][0]
    log, task = (
        RunLog(None),
        ilg_accuracies._small(
            ilg_accuracies.TASKS["mnist"], ilg_accuracies.load_dataset("digits")
        ),
    )
    log.records.append(
        ilg_accuracies._name(task)
        | {"method": "published, divided", "test_accuracy": 0.1, "epochs": 1}
        | {"claimed_epsilon": 1.0}
    )
    row = ilg_accuracies._row(task, log)
    assert row and row["data_set"] == "digits, for mnist" and row["paper"] is None


def test_what_cannot_be_kept_or_drawn_is_refused_before_the_work(tmp_path, capsys):
    for command, words in (
        (["reproduce", "table2", "--out", "x.jsonl"], "leave it out."),
        (["audit", "digits", "--plot", "x.png"], "end it in .svg."),
        (["audit", "digits", "--out", str(tmp_path / "no" / "x")], "that exists."),
    ):
        assert cli.main(command) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and words in err and "resume" not in err


def test_infinite_epsilon_is_valid_json(capsys):
    sizes = ["--num-examples", "100", "--batch-size", "10", "--num-steps", "1"]
    args = ["epsilon", "--noise-multiplier", "0", "--delta", "1e-5", *sizes, "--json"]
    assert cli.main(args) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["epsilon"] == "inf"
