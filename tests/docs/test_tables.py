"""Every table of README.md and docs/ says what the lines of results say."""

import copy
import json
import re

import pytest

import docs_tables
from common import RESULTS
from tables import TABLES, pages
from tables.lines import finals, markdown, measured


def test_every_table_agrees_with_the_lines():
    wrong = pages.disagreeing(pages.pages(), TABLES, measured)
    assert not wrong, f"run python benchmarks/docs_tables.py for {wrong}"


def test_every_table_stands_in_a_page():
    there = {n for path in pages.pages() for n in pages.names(path.read_text("utf-8"))}
    assert TABLES.keys() - there <= {"why"}  # README's own


def test_every_file_of_results_feeds_a_table():
    asked = set()

    def lines(name):
        asked.add(name)
        return measured(name)

    for table in TABLES.values():
        table(lines)
    files = {path.stem for path in RESULTS.glob("*.jsonl")}
    by_hand = {"abadi_tuning", "accuracy"}  # papers.md; before the sweeps
    assert files - asked == by_hand | {
        "norm_bounds"
    }  # rounding.md, test_norm_bounds.py


@pytest.mark.parametrize(
    "file, field, name",
    [
        ("compare_imdb", "accuracy", "imdb"),
        ("compare_questions_imdb", "accuracy", "questions"),
        ("abadi", "test_accuracy", "abadi"),
        ("memory", "above_mib", "lots"),
    ],
)
def test_a_changed_line_is_noticed(file, field, name, tmp_path):
    """One measurement other than it was, and the page no longer agrees."""
    page = tmp_path / "page.md"
    page.write_text(f"# A\n\n<!-- table: {name} -->\n<!-- end -->\n", "utf-8")
    pages.rewrite([page], TABLES, measured)
    assert not pages.disagreeing([page], TABLES, measured)
    records = copy.deepcopy(list(measured(file)))
    changed = [r for r in records if r.get("phase", "final") == "final" and field in r]
    changed[0][field] *= 1.01
    found = pages.disagreeing([page], TABLES, lambda _: records)
    assert found == {page: [name]}


def test_a_changed_digit_is_noticed(tmp_path, monkeypatch, capsys):
    """A hand that mends a number in a page is found, and the command names page."""
    page = tmp_path / "page.md"
    page.write_text("<!-- table: frozen -->\n<!-- end -->\n", "utf-8")
    monkeypatch.setattr(pages, "pages", lambda: [page])
    monkeypatch.setattr(docs_tables, "ROOT", tmp_path)
    assert docs_tables.main([]) == 0
    assert docs_tables.main(["--check"]) == 0
    text = page.read_text("utf-8")
    assert "76.52" in text
    page.write_text(text.replace("76.52", "77.52"), "utf-8")
    assert docs_tables.main(["--check"]) == 1
    assert "page.md: frozen" in capsys.readouterr().out
    assert docs_tables.main([]) == 0
    assert page.read_text("utf-8") == text


def test_a_marker_without_an_end_is_refused():
    with pytest.raises(ValueError, match="1 tables begin, but 0 have an end"):
        pages.filled("<!-- table: imdb -->\n", TABLES, measured)


def test_an_unknown_table_is_refused():
    page = "<!-- table: imbd -->\n<!-- end -->\n"
    with pytest.raises(ValueError, match="no table 'imbd'"):
        pages.filled(page, TABLES, measured)


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="must have 2 cells"):
        markdown(["a", "b"], [["1"]])


def test_the_statistics_are_those_of_the_lines():
    """Recomputed by hand for one cell: mean, deviation, paired interval."""
    row = next(r for r in TABLES["imdb"](measured).splitlines() if r.startswith("| 1 "))
    found = [float(x) for x in re.findall(r"[+-]?\d+\.\d+", row)]
    cells = finals(measured("compare_imdb"))
    ours = [100 * r["accuracy"] for r in cells["dp_adam_ilg, 8 bands, balanced", 1.0]]
    theirs = [100 * r["accuracy"] for r in cells["dp_adam", 1.0]]
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(gaps) / 5
    error = (sum((g - mean) ** 2 for g in gaps) / 4 / 5) ** 0.5
    student = 2.776445  # of four degrees of freedom
    expected = [sum(ours) / 5, sum(theirs) / 5]
    assert found[0] == pytest.approx(expected[0], abs=0.005)
    assert found[2] == pytest.approx(expected[1], abs=0.005)
    assert found[4:7] == pytest.approx(
        [mean, mean - student * error, mean + student * error], abs=0.006
    )


def test_the_last_choice_counts():
    """A sweep that was extended reports what was chosen then."""
    runs = finals(measured("compare_mnist_scattering"))
    assert {r["steps"] for r in runs["dp_adam_ilg", 8.0]} == {800}


def test_the_first_table_is_short():
    rows = TABLES["why"](measured).splitlines()[2:]
    assert 4 <= len(rows) <= 6
    assert any("tie" in row for row in rows) and any("ms" in row for row in rows)


def test_no_number_of_a_table_is_missing():
    """No NaN, no infinity, no None where a number should be."""
    for name, table in TABLES.items():
        assert not re.search(r"\b(nan|inf|None)\b", table(measured)), name


def test_lines_are_valid_json_without_nan():
    for path in RESULTS.glob("*.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            json.loads(line, parse_constant=_refuse)


def _refuse(word):
    raise ValueError(f"{word} is no JSON")
