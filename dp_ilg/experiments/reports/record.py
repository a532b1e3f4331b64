"""A run folder, read back and checked: what the report and the figures show."""

import json
import shutil
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from dp_ilg.accounting.ledger import PrivacyLedger
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.experiments.config.kinds import measure_in
from dp_ilg.experiments.reports.history import History
from dp_ilg.experiments.reports.origin import Origin, read_origin
from dp_ilg.experiments.reports.settings import used

_WRONG = (AttributeError, KeyError, TypeError, ValueError, OverflowError)
_RELEASED = ("value", "smoothed", "stderr", "smoothed_stderr")
_UNPROTECTED = ("unprotected_train_loss", "show_private_loss")  # now and before


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says.

    Attributes:
        folder: the folder's name.
        data: name of the data set.
        settings: of `config.toml`, those that did something; dotted paths to values.
        plan: the privacy plan.
        origin: date, names and digests that tie a page to the run.
        steps_charged: steps that the ledger holds, released or about to be.
        history: the evaluations; None before the first.
        shows_unprotected_loss: whether a loss without noise was recorded.
        summary: what the run wrote at its end; None while it is unfinished.
        certificate: which bounds hold for the run, and why; None where none is.
    """

    folder: str
    data: str
    settings: Mapping[str, Any]
    plan: PrivacyPlan
    origin: Origin
    steps_charged: int
    history: History | None
    shows_unprotected_loss: bool
    summary: Mapping[str, Any] | None
    certificate: Mapping[str, Any] | None = None

    def epsilon_charged(self) -> float:
        """Returns the epsilon of every step in the ledger, evaluated or not."""
        if self.history is not None and self.history.steps[-1] == self.steps_charged:
            return float(self.history.epsilons[-1])
        return float(self.plan.epsilon(self.steps_charged))


def read_run(run_dir: Path) -> RunRecord:
    """Reads a run folder; a last line cut short by a kill is left out.

    Args:
        run_dir: the folder that `dp-ilg train` wrote.

    Returns:
        The record.

    Raises:
        ValueError: in one sentence, for a folder or file that is missing or damaged,
            or when its files are not of one run.

    Example:
        >>> read_run(Path("no/such/run"))
        Traceback (most recent call last):
        ValueError: no/such/run is not a folder; give the folder of a training run.
    """
    if not run_dir.is_dir():
        raise ValueError(
            f"{run_dir} is not a folder; give the folder of a training run."
        )
    table = _table(run_dir / "config.toml")
    plan = _plan(run_dir / "plan.json")
    charged = _steps_charged(run_dir / "ledger.jsonl", plan)
    history = _history(run_dir / "metrics.jsonl")
    if history is not None and history.steps[-1] > charged:
        raise ValueError(
            f"{run_dir} has an evaluation after step {history.steps[-1]:.0f} but a "
            f"ledger of {charged} steps; its files are not of one run."
        )
    summary_path = run_dir / "summary.json"
    summary = _object(summary_path) if summary_path.exists() else None
    return RunRecord(
        folder=run_dir.resolve().name,
        data=table["data"]["name"],
        settings=used(table),
        plan=plan,
        origin=read_origin(run_dir, table, summary),
        steps_charged=charged,
        history=history,
        shows_unprotected_loss=any(table.get("run", {}).get(n) for n in _UNPROTECTED),
        summary=summary,
        certificate=_certificate(run_dir / "certificate.json", plan),
    )


def _certificate(path: Path, plan: PrivacyPlan) -> dict[str, Any] | None:
    """The sensitivity certificate; None in a folder that has none."""
    if not path.exists():
        return None
    found = _object(path)
    rows = found.get("leaves")
    whole = isinstance(rows, list) and all(
        isinstance(row, dict) and row.keys() >= {"leaf", "norm", "sum", "error"}
        for row in rows
    )
    try:
        noise, account = found["noise"], found["accounting"]
        numbers = [
            found["margin"],
            found["largest_lot"],
            account["least_share_of_delta"],
        ]
        numbers += [noise["charged_epsilon"], noise["charged_delta"]]
        whole &= all(isinstance(x, int | float | None) for x in numbers)
        whole &= {"law", "grid"} <= noise.keys() and "accountant" in account
        whole &= isinstance(found["assumptions"], list)
    except _WRONG:
        whole = False
    if not whole:
        raise _damaged(path, "not a sensitivity certificate")
    if found.get("plan_digest") != plan.digest():
        raise _damaged(path, "the certificate of another plan")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; give a complete run folder.") from None
    except UnicodeDecodeError as error:
        raise _damaged(path, error.reason) from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror}); change its permissions or "
            "restore it."
        ) from None


def _damaged(path: Path, why: object) -> ValueError:
    return ValueError(f"{path} is damaged ({why}); restore it or train again.")


def _object(path: Path) -> dict[str, Any]:
    text = _text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not isinstance(value, dict):
        raise _damaged(path, "not a JSON object")
    return value


def _lines(path: Path) -> list[dict[str, Any]]:
    """Returns a file's JSON objects, one a line, without a last line cut short."""
    text = _text(path)
    lines = text.removesuffix("\n").split("\n")
    values = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise _damaged(path, f"line {number}: {error}") from None
        if not isinstance(value, dict):
            raise _damaged(path, f"line {number} is not a JSON object")
        values.append(value)
    return values


def _table(path: Path) -> dict[str, Any]:
    """Returns the configuration, sure to name its data set."""
    text = _text(path)
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    data, run = table.get("data"), table.get("run", {})
    named = isinstance(data, dict) and isinstance(data.get("name"), str)
    if not (named and isinstance(run, dict)):
        raise _damaged(path, "no name in [data] or no table [run]")
    return table


def _plan(path: Path) -> PrivacyPlan:
    text = _text(path)
    try:
        return PrivacyPlan.from_json(text)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, str(error).rstrip(".")) from None


def _steps_charged(path: Path, plan: PrivacyPlan) -> int:
    """Returns the steps on file, from a copy: opening a ledger locks and mends it."""
    _text(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        shutil.copyfile(path, copy)
        try:
            with PrivacyLedger(copy, plan, resume=True) as ledger:
                return ledger.steps
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), str(path))) from None


def _history(path: Path) -> History | None:
    """Returns the evaluations; a step repeated by a resumed run counts once."""
    by_step: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            by_step[int(line["step"])] = _evaluation(line)
        except _WRONG as error:
            raise _damaged(path, f"line {number}: {error!r}") from None
    if not by_step:
        return None
    rows = [by_step[step] for step in sorted(by_step)]
    if any(row["groups"] != rows[0]["groups"] for row in rows):
        raise _damaged(path, "its layers change between lines")
    names, sizes = rows[0]["groups"]
    if any(row["measure"] != rows[0]["measure"] for row in rows):
        raise _damaged(path, "what is measured changes between lines")
    metrics = list(rows[0]["released"])
    if any(list(row["released"]) != metrics for row in rows):
        raise _damaged(path, "its released metrics change between lines")
    return History(
        steps=np.array(sorted(by_step), float),
        layer_names=names,
        layer_sizes=sizes,
        **{
            key: np.array([row[key] for row in rows])
            for key in rows[0]
            if key not in ("groups", "released", "measure")
        },
        released={n: np.array([row["released"][n] for row in rows]) for n in metrics},
        measure=rows[0]["measure"],
    )


def _evaluation(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the checked values of one line, by field of `History`."""
    layers = line["layers"]
    names = tuple(str(name) for name in layers["names"])
    sizes = tuple(int(size) for size in layers["sizes"])
    measure = measure_in(line, "test_")
    answer = float(line[measure.key])
    epsilon = line["epsilon"]
    epsilon = np.inf if epsilon is None else float(epsilon)
    sound = measure.is_sound(answer) and epsilon >= 0
    if not (line["step"] > 0 and sound and names):
        raise ValueError(f"step, {measure.key}, epsilon or layers out of range")
    importance = _per_layer(layers["importance"], len(names))
    if len(sizes) != len(names):
        raise ValueError("layers of unequal lengths")
    return {
        "groups": (names, sizes),
        "measure": measure,
        "answers": answer,
        "epsilons": epsilon,
        "seconds": float(line["seconds"]),
        "shares": importance / max(importance.sum(), 1e-300),
        "weights": _per_layer(layers["weights"], len(names)),
        "noise_stddevs": _per_layer(layers["noise_stddev"], len(names)),
        "released": {
            str(name): [float(found[field]) for field in _RELEASED]
            for name, found in line.get("released", {}).items()
        },
    }


def _per_layer(values: Sequence[float], count: int) -> Float[np.ndarray, " layers"]:
    array = np.array(values, float)
    if array.shape != (count,):
        raise ValueError("layers of unequal lengths")
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError("a negative or infinite value of a layer")
    return array
