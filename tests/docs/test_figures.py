"""Every figure of the documentation shows what the lines of results say."""

import copy
import re

import pytest

import docs_figures
from common import ROOT
from figures import FIGURES, look, speed
from tables import TABLES
from tables.lines import measured

_TEXT = re.compile(r"<text[^>]*>(.*?)</text>", re.DOTALL)
_MOST_BYTES = 200_000


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_carries_the_numbers_of_the_lines(name):
    found = look.shown(look.path_of(name))
    wanted = look.rounded(FIGURES[name].numbers(measured))
    assert found == wanted, "run python benchmarks/docs_figures.py"


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_shows_the_numbers_it_carries(name):
    """Drawn again, every word and number in it is the same."""
    there = look.path_of(name).read_text("utf-8")
    again = look.svg(FIGURES[name], measured)
    assert _TEXT.findall(there) == _TEXT.findall(again)
    assert len(there) < _MOST_BYTES
    fonts = re.findall(r"'DejaVu Sans'[^;]*;", there)
    assert fonts and all("sans-serif;" in font for font in fonts)


def test_every_figure_is_in_a_page_and_every_picture_is_a_figure():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text("utf-8") for page in pages)
    drawn = set(re.findall(r"assets/(\w+)\.svg", text))
    assert FIGURES.keys() <= drawn
    assert not list((ROOT / "benchmarks" / "results").glob("*.svg"))


def test_a_changed_line_is_noticed(monkeypatch, capsys):
    records = copy.deepcopy(list(measured("compare_imdb")))
    for record in records:
        if record.get("phase") == "final":
            record["accuracy"] += 0.001

    def lines(name):
        return records if name == "compare_imdb" else measured(name)

    monkeypatch.setattr(docs_figures, "measured", lines)
    assert docs_figures.main(["--check"]) == 1
    assert capsys.readouterr().out.split()[0] == "docs/assets/imdb.svg"


def test_all_bars_of_speed_have_one_base():
    """The ratios of the figure are those of the table beside it."""
    table = TABLES["contestants"](measured)
    for model, ratios in look.shown(look.path_of("speed")).items():
        for ratio in ratios.values():
            assert f"| {speed.label(ratio)}" in table or f"| {ratio:.2f}" in table, (
                model
            )


def test_a_file_without_numbers_is_refused(tmp_path):
    path = tmp_path / "bare.svg"
    path.write_text("<svg/>", "utf-8")
    with pytest.raises(ValueError, match="bare.svg carries no numbers"):
        look.shown(path)
