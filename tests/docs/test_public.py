"""The page on what is called public: complete, and at one with the data sets' notes."""

import dataclasses
import pathlib
import re

import pytest

from dp_ilg.experiments.config.run import RunConfig
from dp_ilg.experiments.data import texts, word_counts
from dp_ilg.experiments.data.datasets import LOADERS, NUM_IMDB_TOKENS, load_dataset
from dp_ilg.experiments.data.features import feature_names
from dp_ilg.experiments.data.tabular import adult, flights

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "public.md").read_text()
ANSWERS = {"nothing", "charged", "not protected"}


def table(section):
    """Rows of the table of a section: first cell, middle, what pays."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) > 3 and all(len(row) == 3 for row in rows)
    return rows


SECTIONS = ("Data sets", "Features", "Settings and defaults")


def unnamed(names, rows):
    """Names that no row is about."""
    about = {name for row in rows for name in re.findall(r"`([^`]+)`", row[0])}
    return {*names} - about


@pytest.mark.parametrize("section", SECTIONS)
def test_every_row_says_what_pays(section):
    for name, computed, pays in table(section):
        assert pays in ANSWERS and computed, name


def test_every_data_set_and_every_feature_has_a_row():
    assert not unnamed(LOADERS, table("Data sets"))
    features = [*feature_names(), "data.projection"]
    assert not unnamed(features, table("Features"))
    settings = table("Settings and defaults")
    asked = [f.name for f in dataclasses.fields(RunConfig)]
    aside = {"seed", "eval_every", "checkpoint_every", "engine", "compile_cache"}
    assert not unnamed({f"run.{name}" for name in {*asked} - aside}, settings)
    assert not unnamed({"data.validation"}, settings)


def test_a_data_set_that_is_missing_would_be_seen():
    assert unnamed([*LOADERS, "titanic"], table("Data sets")) == {"titanic"}


@pytest.mark.parametrize("name", ["digits", "python_docs"])
def test_the_note_of_a_data_set_says_the_same(name):
    (pays,) = {row[2] for row in table("Data sets") if row[0] == f"`{name}`"}
    note = load_dataset(name).note
    assert ("not covered by the guarantee" in note) == (pays == "not protected")
    assert ("Nothing is computed from the data" in note) == (pays == "nothing")


def test_its_numbers_are_those_of_the_code():
    words = " ".join(PAGE.split())
    assert f"aircraft are hashed to {flights.AIRCRAFT:,} places" in words
    (places,) = adult.HASHED.values()
    assert f"countries are hashed to {places} places" in words
    assert f"which {NUM_IMDB_TOKENS:,} words are known" in words
    assert f"which {texts.NUM_TOKENS - 1:,} words are known" in words
    assert f"{word_counts.PUBLIC_WORDS:,} words" in words
