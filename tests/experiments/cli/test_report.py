"""`dp-ilg report`: a page, its check against the files, and several runs."""

import json

import pytest

from dp_ilg.experiments.cli import main as cli
from dp_ilg.experiments.reports.page import write_report
from dp_ilg.experiments.runs.evaluation import params_sha256
from tests.experiments.reports.test_page import a_plan, fake_run

TINY = [
    *("--num-steps", "2", "--batch-size", "32", "--privacy.accountant", "rdp"),
    *("--model.hidden", "4", "--run.eval-every", "2"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run, with somebody who answers for it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    named = ["--report.responsible", "A. Person", "--report.contact", "a@b.org"]
    assert cli.main(["train", "--run-dir", str(folder), "--json", *TINY, *named]) == 0
    return folder


def answer(capsys, *command):
    capsys.readouterr()
    assert cli.main([*map(str, command), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def complaint(capsys, *command):
    capsys.readouterr()
    assert cli.main([*map(str, command)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith(".\n")
    return err


def test_a_page_and_its_files_belong_together(trained, capsys):
    found = answer(capsys, "report", trained, "--check")
    summary = json.loads((trained / "summary.json").read_text())
    assert found["model_sha256"] == summary["params_sha256"]
    assert found["ledger_sha256"] == summary["ledger_sha256"]
    page = (trained / "report.html").read_text()
    assert "A. Person" in page and "a@b.org" in page
    assert "responsible" in (trained / "config.toml").read_text()


def test_whoever_answers_may_change_while_a_run_is_resumed(trained, capsys):
    resumed = [
        "train",
        "--run-dir",
        trained,
        "--resume",
        "--report.contact",
        "new@b.org",
    ]
    before = json.loads((trained / "summary.json").read_text())
    assert answer(capsys, *resumed)["params_sha256"] == before["params_sha256"]
    assert "new@b.org" in (trained / "report.html").read_text()


@pytest.mark.parametrize("kind", ["model", "ledger"])
def test_a_page_of_another_model_or_ledger_is_found(trained, capsys, kind):
    path = trained / "report.html"
    text = path.read_text()
    digest = json.loads((trained / "summary.json").read_text())[
        {"model": "params_sha256", "ledger": "ledger_sha256"}[kind]
    ]
    try:
        path.write_text(text.replace(digest, "0" * 64))
        assert f"of the {kind}" in complaint(capsys, "report", trained, "--check")
        path.write_text(text.replace(f'id="{kind}-sha256"', ""))
        assert "no digest" in complaint(capsys, "report", trained, "--check")
    finally:
        path.write_text(text)


def test_a_summary_of_another_model_is_found(trained, capsys):
    path = trained / "summary.json"
    text = path.read_text()
    try:
        other = json.loads(text) | {"params_sha256": params_sha256({})}
        path.write_text(json.dumps(other))
        write_report(trained)
        assert "of the model" in complaint(capsys, "report", trained, "--check")
    finally:
        path.write_text(text)
        write_report(trained)


def test_an_unfinished_run_is_checked_by_its_ledger(tmp_path, capsys):
    run = fake_run(tmp_path / "run", charged=20)
    assert "cannot be read" in complaint(capsys, "report", run, "--check")
    write_report(run)
    assert "unfinished" in answer(capsys, "report", run, "--check")["verdict"]


def test_several_runs_are_one_page_and_one_object(tmp_path, capsys):
    plans = a_plan(((30, 3.22),)), a_plan(((30, 3.22),), delta=1e-6)
    runs = [fake_run(tmp_path / f"{i}", plan) for i, plan in enumerate(plans)]
    out = tmp_path / "c.html"
    found = answer(capsys, "report", *runs, "--out", out)
    assert found["report"] == str(out) and out.read_text().startswith("<!doctype")
    assert [run["comparable"] for run in found["runs"]] == [True, False]
    assert cli.main(["report", *map(str, runs), "--out", str(out)]) == 0
    assert "not comparable with the first run" in capsys.readouterr().out
    assert "absent is not a folder" in complaint(capsys, "report", runs[0], "absent")
    assert "needs the folder" in complaint(capsys, "report")
