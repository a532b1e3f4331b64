"""`dp-ilg audit RUN_OR_CONFIG`: from a name on the command line to printed tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.experiments.audits.report import (
    TrainerAuditOptions,
    audit_trainer,
    write_plot,
)
from dp_ilg.experiments.audits.subject import audited_trainer
from dp_ilg.experiments.config.schema import Config, read_config
from dp_ilg.experiments.papers.reproduce import RunLog, tell
from dp_ilg.experiments.runs import projection
from dp_ilg.projection.factor_pca import FactorPca
from dp_ilg.validation import nearest, whole

_FOLDERS = (Path("configs"), Path(__file__).parents[3] / "configs")


def audit_run(
    target: str,
    options: TrainerAuditOptions,
    *,
    data_dir: Path | None = None,
    steps: int = 20,
    plot: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Audits the trainer of a run folder, a configuration file or a shipped one.

    Args:
        target: a run folder, a TOML file, or a name such as digits.
        options: how many runs, and the seed.
        data_dir: a folder of data files.
        steps: of each audited run.
        plot: an SVG file to draw.
        out: a file to which the audit is added as a JSON line.

    Returns:
        What `audit_trainer` found, with a title.

    Raises:
        ValueError: in one sentence, for a target that is none of the three.
        OSError: if plot or record cannot be written.

    Example:
        >>> audit_run("no/such/run", TrainerAuditOptions())
        Traceback (most recent call last):
        ValueError: There is no run folder, configuration file or shipped ...
    """
    whole("steps", steps, 2)
    _check_places(plot, out)
    config, plan, basis = _read(target)
    trainer = audited_trainer(
        config,
        data_dir=data_dir,
        plan=plan,
        basis=basis,
        max_steps=steps,
        seed=options.seed,
    )
    found = audit_trainer(trainer, options, tell)
    found = {"title": f"Audit of {target}", "target": target} | found
    if plot is not None:
        write_plot(found, plot)
    if out is not None:
        name = {"table": "trainer audit", "target": target, "seed": options.seed}
        RunLog(out).add(name, found)
    return found


def _check_places(plot: Path | None, out: Path | None) -> None:
    """Refuses what could not be written after the work is done."""
    if plot is not None and plot.suffix != ".svg":
        raise ValueError(f"--plot is {plot}, but the plot is an SVG; end it in .svg.")
    for path in (plot, out):
        if path is not None:
            new = not path.exists()
            path.open("a").close()  # or it says why not
            if new:
                path.unlink()


def _read(target: str) -> tuple[Config, PrivacyPlan | None, FactorPca | None]:
    """The configuration, and plan and projection if there is a run."""
    path = Path(target)
    if (path / "plan.json").exists() and (path / "config.toml").exists():
        plan = PrivacyPlan.from_json((path / "plan.json").read_text(encoding="utf-8"))
        config = read_config(path / "config.toml")
        return config, plan, _basis(path) if config.data.projection.wanted else None
    if path.is_file():
        return read_config(path), None, None
    shipped = {p.stem: p for folder in _FOLDERS for p in folder.glob("*.toml")}
    if target in shipped:
        return read_config(shipped[target]), None, None
    if target == Config().data.name:  # an installed wheel has this one alone
        return Config(), None, None
    known = [*shipped, "published", "dp_adam_ilg"]
    raise ValueError(
        f"There is no run folder, configuration file or shipped configuration "
        f"{target!r} to audit, and no method; {nearest(target, known)}"
    )


def _basis(folder: Path) -> FactorPca:
    """The projection that a run released."""
    path = folder / projection.FILE
    try:
        return projection.from_bytes(path.read_bytes())
    except (OSError, ValueError):
        raise ValueError(
            f"{path} cannot be read, but the run projects its inputs; restore it from "
            "a copy."
        ) from None


def tables(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The checks and the attacks as tables for people.

    Args:
        found: what `audit_run` returned.

    Returns:
        Two tables as `show_rows` takes them; the notes are under the second.

    Example:
        >>> found = {"title": "A", "checks": [], "rows": [], "notes": [],
        ...     "verdict": "not refuted", "claim": 1.0}
        >>> [table["title"] for table in tables(found)]
        ['A: promises', 'A: lower bounds on epsilon']
    """
    checks = [
        {
            "check": check["check"],
            "found": check["found"],
            "asked for": check["limit"],
            "verdict": "holds" if check["holds"] else "FAILS",
        }
        for check in found["checks"]
    ]
    rows = [_short(row) for row in found["rows"]]
    verdict = (
        f"Verdict: the claim of epsilon {found['claim']:.3f} is {found['verdict']}."
    )
    return [
        {"title": f"{found['title']}: promises", "rows": checks, "notes": []},
        {
            "title": f"{found['title']}: lower bounds on epsilon",
            "rows": rows,
            "notes": [*found["notes"], verdict],
        },
    ]


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "canary": "canary",
        "adversary": "sees",
        "lower_bound": "bound",
        "if_gaussian": "if Gaussian",
        "claim": "claim",
        "trials": "trials",
        "confidence": "sure",
        "verdict": "verdict",
    }
    return {words: row[name] for name, words in names.items()}
