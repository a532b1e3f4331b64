"""Files and folders of the user's own: every usual kind, and what is asked for."""

from typing import Any

import numpy as np
import pytest

from dp_ilg.experiments.config.data import DataConfig
from dp_ilg.experiments.config.schema import Config
from dp_ilg.experiments.data.own.named import is_data_path, load_named
from dp_ilg.experiments.data.shards import write_shards
from dp_ilg.experiments.runs.outside.parts import check_parts

ROWS = 6
Y = np.array([0, 1, 2, 2, 1, 0])
KINDS = {
    "grey images": np.full((ROWS, 4, 4), 255, np.uint8),
    "images": np.full((ROWS, 4, 4, 3), 255, np.uint8),
    "float images": np.ones((ROWS, 4, 4, 1), np.float64),
    "bytes": np.full((ROWS, 5), 255, np.uint8),
    "vectors": np.ones((ROWS, 5), np.float16),
    "flags": np.ones((ROWS, 5), bool),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(x, y=Y, name="my.npz", **more):
    arrays: dict[str, Any] = (
        dict(x_train=x, y_train=y, x_test=x[:2], y_test=y[:2]) | more
    )
    np.savez(name, **{k: v for k, v in arrays.items() if v is not None})


def load(name="./my.npz", **stated):
    return load_named(DataConfig(name, **stated))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input_comes_as_float32_up_to_one(kind):
    saved(KINDS[kind], num_classes=3)
    data = load()
    assert data.x_train.dtype == np.float32 and data.y_train.dtype == np.int32
    assert data.x_train.max() == 1 and len(data.x_test) == 2
    assert (data.num_classes, data.name) == (3, "my")
    assert data.x_train.ndim == (4 if "images" in kind else 2)
    assert ("divided by 255" in data.note) == (KINDS[kind].dtype == np.uint8)


def test_padded_texts_are_ids_once_the_vocabulary_is_stated():
    ids = np.array([[5, 3, 0]] * ROWS, np.int64)
    saved(ids, num_classes=3, num_tokens=9)
    data = load("my.npz")
    assert (data.x_train.dtype, data.num_tokens) == (np.uint16, 9)
    assert load(num_tokens=70_000).x_train.dtype == np.int32
    saved(ids, y=ids, num_tokens=9)
    data = load()
    assert data.y_train.shape == (ROWS, 3) and data.num_classes == 9


def test_a_number_that_is_stated_scales_and_the_range_of_the_data_never_does():
    saved(np.full((ROWS, 2), 8.0), num_classes=3)
    assert load().x_train.max() == 8
    found = load(scale=16.0)
    assert found.x_train.max() == 0.5 and "divided by 16" in found.note
    saved(np.full((ROWS, 2), 8), num_classes=3)
    assert load(scale=16.0).x_train.max() == 0.5


def test_the_note_is_the_makers_or_says_that_nothing_is_stated():
    saved(np.ones((ROWS, 2)), num_classes=3)
    assert "What was computed from the data beforehand is not stated." in load().note
    saved(np.ones((ROWS, 2)), num_classes=3, note="Nothing is computed from it.")
    assert "Nothing is computed from it." in load().note
    assert "not stated" not in load().note and "3 classes" in load().note


def test_a_folder_of_arrays_is_as_good_as_a_file(here):
    (here / "rows").mkdir()
    for name, array in (("x", KINDS["vectors"]), ("y", Y)):
        for part in ("train", "test"):
            np.save(here / "rows" / f"{name}_{part}.npy", array)
    assert load("./rows", num_classes=3).x_train.shape == (ROWS, 5)
    (here / "rows" / "y_train.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="y_train.npy is no readable .npy file"):
        load("./rows", num_classes=3)


def test_without_a_test_part_examples_are_held_out_if_that_is_asked_for():
    saved(KINDS["vectors"], x_test=None, y_test=None, num_classes=3)
    assert len(load(validation=0.5).x_train) == ROWS
    with pytest.raises(ValueError, match="no x_test and y_test.*--data.validation 0.1"):
        load()


ASKED = {
    "has no arrays": (dict(x=np.ones((ROWS, 2)), x_train=None), "but no x_train"),
    "holds others": (
        dict(x=np.ones((ROWS, 2)), x_train=None, images=Y),
        "holds .*images.* but no x_train; name its arrays",
    ),
    "says no classes": (
        dict(x=np.ones((ROWS, 2))),
        "how many classes.*not counted.*num-classes",
    ),
    "has whole numbers": (
        dict(x=np.ones((ROWS, 2), np.int64)),
        r"int64\[6, 2\]: for token ids .*--data.num-tokens V .*--data.scale 1",
    ),
    "has one axis": (dict(x=np.ones(ROWS)), "one example a row; reshape"),
    "has words": (dict(x=np.array([["a"]] * ROWS)), "but must hold numbers"),
    "has too many labels": (
        dict(x=np.ones((ROWS, 2)), num_classes=2),
        "labels from 0 to 2, but 2 classes were stated",
    ),
    "has labels of another length": (
        dict(x=np.ones((ROWS, 2)), y=Y[:3], num_classes=3),
        "a whole number from 0 for each of 6",
    ),
    "has float labels": (
        dict(x=np.ones((ROWS, 2)), y=Y / 2, num_classes=3),
        "is float64.*number the classes",
    ),
    "has rows of two shapes": (
        dict(x=np.ones((ROWS, 2)), x_test=np.ones((2, 3)), num_classes=3),
        "write both alike",
    ),
    "has ids beyond": (
        dict(x=np.full((ROWS, 2), 9), num_classes=3, num_tokens=9),
        "ids from 9 to 9, but 9 tokens were stated",
    ),
    "has floats for ids": (
        dict(x=np.ones((ROWS, 2)), num_classes=3, num_tokens=9),
        "token ids are whole numbers",
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_is_lacking_is_asked_for_in_one_sentence(case):
    arrays, words = ASKED[case]
    saved(**arrays)
    with pytest.raises(ValueError, match=words) as caught:
        load()
    assert "my.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_arrays_says_what_it_holds(here):
    (here / "rows").mkdir()
    (here / "rows" / "a.csv").write_text("1,2\n")
    with pytest.raises(ValueError, match="holds a.csv, but neither index.json"):
        load("./rows")


def test_a_path_that_is_neither_says_what_it_is(here):
    (here / "a.csv").write_text("1,2\n")
    with pytest.raises(ValueError, match="a.csv is a file, but no .npz; give a folder"):
        load("./a.csv")
    with pytest.raises(ValueError, match="b does not exist; give a folder"):
        load("./b")
    (here / "rows").mkdir()
    with pytest.raises(ValueError, match="given with a slash, as ./rows"):
        check_parts(Config(data=DataConfig("rows")))


def test_a_folder_of_shards_states_its_own_facts(here):
    rows = {"x": np.ones((4, 2), np.float32), "y": np.zeros(4, np.int32)}
    facts = dict(name="a", num_classes=2, note="", num_tokens=0, num_categories=[])
    write_shards(rows, here / "s", rows_per_shard=4, facts=facts, parts={"test": rows})
    assert load("./s").num_classes == 2
    with pytest.raises(ValueError, match="data.num_classes is 7, but ./s states 2"):
        load("./s", num_classes=7)


def test_what_is_a_path_and_what_is_code():
    assert all(map(is_data_path, ("./a", "a/b", "a.npz", "C:\\a.npz")))
    assert not any(map(is_data_path, ("digits", "./a.py:load", "a.b:load")))
