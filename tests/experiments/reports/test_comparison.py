"""Runs side by side: what differs, what must not be compared, and what is refused."""

import json

import pytest

from dp_ilg.experiments.reports.comparison import (
    compare_runs,
    render_comparison,
    write_comparison,
)
from tests.experiments.reports.test_page import (
    CONFIG,
    HOSTILE,
    Page,
    a_plan,
    fake_run,
)

SHORT = ((30, 3.22),)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders: the first, one with another rate, and ones that are not comparable."""
    root = tmp_path_factory.mktemp("runs")
    plan, rate = a_plan(SHORT), CONFIG.replace("0.1", "0.3")
    private = {"target_epsilon": None}
    return {
        "first": fake_run(root / "first", plan),
        "rate": fake_run(root / "rate", plan, config=rate),
        "delta": fake_run(root / "delta", a_plan(SHORT, delta=1e-6)),
        "data": fake_run(root / "data", plan, config=CONFIG.replace("imdb", "other")),
        "stopped": fake_run(root / "stopped", plan, charged=5),
        "bare": fake_run(root / "bare", a_plan(((30, 0.0),), **private)),
        "hostile": fake_run(
            root / f"a{HOSTILE.replace('/', '')}",
            plan,
            config=CONFIG.replace("imdb", HOSTILE),
        ),
    }


def test_settings_that_differ_are_found_and_no_others(runs):
    found = compare_runs([runs["first"], runs["rate"]])
    assert found.differing == {"optimizer.learning_rate": [0.1, 0.3]}
    assert [run.why_not for run in found.runs] == ["", ""]
    json.dumps(found.as_dict(), allow_nan=False)
    one = found.as_dict()["runs"][1]
    assert one["steps"] == 30 and one["curve"]["steps"] == [10, 20, 30]
    assert one["comparable"] and len(one["curve"]["accuracies"]) == 3


@pytest.mark.parametrize("other", ["delta", "data"])
def test_other_data_or_another_delta_are_not_comparable(runs, other):
    found = compare_runs([runs["first"], runs["rate"], runs[other]])
    assert [bool(run.why_not) for run in found.runs] == [False, False, True]
    assert other in found.runs[2].why_not
    page = Page(render_comparison(found))
    assert "Not comparable" in page.text and found.runs[2].why_not in page.text
    alone = render_comparison(compare_runs([runs["first"]]))
    assert "Not comparable" not in Page(alone).text


def test_runs_without_evaluation_or_privacy_have_a_row(runs):
    found = compare_runs([runs["first"], runs["stopped"], runs["bare"]])
    page = Page(render_comparison(found))
    assert "5 of 30, unfinished" in page.text and "∞" in page.text
    assert found.as_dict()["runs"][2]["epsilon"] is None
    json.dumps(found.as_dict(), allow_nan=False)


def test_what_came_from_a_folder_is_escaped(runs):
    page = Page(render_comparison(compare_runs([runs["first"], runs["hostile"]])))
    assert "script" not in page.tags and HOSTILE in page.text


def test_equal_names_become_paths(tmp_path):
    folders = [fake_run(tmp_path / name / "run", charged=0) for name in "ab"]
    names = [run.name for run in compare_runs(folders).runs]
    assert names == [str(folder) for folder in folders]


def test_a_broken_folder_is_one_sentence(runs, tmp_path):
    broken = fake_run(tmp_path / "run", charged=10)
    (broken / "plan.json").write_text("{")
    for wrong in (broken, tmp_path / "absent"):
        with pytest.raises(ValueError) as caught:
            compare_runs([runs["first"], wrong])
        assert str(wrong) in str(caught.value) and "\n" not in str(caught.value)


def test_only_a_comparison_is_replaced(runs, tmp_path):
    found, path = compare_runs([runs["first"], runs["rate"]]), tmp_path / "c.html"
    write_comparison(found, path)
    before = path.read_bytes()
    assert write_comparison(found, path).read_bytes() == before
    path.write_text("my notes")
    with pytest.raises(ValueError, match="is no comparison of runs"):
        write_comparison(found, path)
    assert path.read_text() == "my notes"
