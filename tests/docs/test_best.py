"""The first tables of docs/results.md: made-up lines, and what is read of them."""

import pytest

from tables.best import RECORDS, best, by_source, source_of


def config(method="dp_sgd_ilg", importance="uniform", source="scores", **sections):
    chosen = dict(method=method, importance=importance, source=source)
    return {"optimizer": chosen, **sections}


@pytest.mark.parametrize(
    "given, source",
    [
        (config(), ""),
        (config("dp_sgd", "min_noise_energy"), ""),
        (config(importance="sqrt_share"), "scores"),
        (config(source="prior", prior={"groups": "public"}), "prior"),
        (config(source="prior", prior={"groups": "scores"}), "prior and scores"),
        (config(importance="paper", source="probe", probe={}), "probe"),
        (config(importance="paper", source="public"), "public"),
    ],
)
def test_the_source_is_read_from_the_configuration(given, source):
    assert source_of(given) == source


def lines_of(file, field, results):
    """A file with one choice and some seeds for each method."""
    setting = dict(learning_rate=1.0, parameter="p", value=1)
    found = []
    for (method, importance), values in results.items():
        cell = dict(method=method, epsilon=1.0, **setting)
        found.append({"kind": "choice", **cell})
        for seed, value in enumerate(values):
            run = dict(kind="run", phase="final", seed=seed, **{field: value})
            found.append({**cell, **run, "config": config(importance=importance)})

    def lines(name):
        if name == file:
            return found
        if name.startswith("compare_") and name in {r.file for r in RECORDS}:
            raise FileNotFoundError(name)
        return []

    return lines


def test_the_best_of_each_kind_is_compared_and_absent_tasks_left_out():
    weak, strong = [0.5, 0.6, 0.7], [0.6, 0.7, 0.8]
    results = {
        ("weak", "uniform"): weak,
        ("strong", "uniform"): strong,
        ("bands", "equal_snr"): [0.62, 0.72, 0.82],
        ("worse", "paper"): weak,
    }
    lines = lines_of("compare_imdb_linear", "accuracy", results)
    (row,) = best(lines).splitlines()[2:]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[:3] == ["IMDB", "1", "none"]
    assert cells[3].startswith("70.00") and cells[4].startswith("72.00")
    assert cells[5] == "scores: bands" and cells[6].startswith("+2.00 [+2.00,")
    assert "-10.00" in by_source(lines) and len(by_source(lines).splitlines()) == 6


def test_a_smaller_error_is_better():
    results = {
        ("one", "uniform"): [0.91, 0.92],
        ("other", "uniform"): [0.93, 0.94],
        ("bands", "paper"): [0.90, 0.915],
        ("worse", "paper"): [0.99, 0.99],
    }
    lines = lines_of("compare_movielens", "mse", results)
    (row,) = best(lines).splitlines()[2:]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[3].startswith("0.9150") and cells[4].startswith("0.9075")
    assert cells[6] == "tie"


def test_a_task_without_importance_has_no_difference():
    lines = lines_of("compare_insteval", "mse", {("one", "uniform"): [1.0, 1.1]})
    row = best(lines).splitlines()[2]
    assert (row.count("none"), row.count("not run"), row.count("(2 seeds)")) == (
        1,
        3,
        1,
    )
