"""`report.html`: one self-contained page that shows a run and what it guarantees.

The page needs nothing from anywhere: styles and figures are inside it, scripts are
not, and its own content policy forbids loading any. The same folder and the same
installed versions give the same bytes.
"""

import math
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.experiments.reports import figures
from dp_ilg.experiments.reports.card import render_card
from dp_ilg.experiments.reports.guarantee import bullets
from dp_ilg.experiments.reports.history import History
from dp_ilg.experiments.reports.iterates import last_iterates
from dp_ilg.experiments.reports.record import RunRecord, read_run
from dp_ilg.experiments.reports.released import released_figure
from dp_ilg.experiments.reports.rendering import template, write_page
from dp_ilg.experiments.reports.settings import as_text
from dp_ilg.experiments.reports.svg import inline_svg, printable, save_figure
from dp_ilg.experiments.reports.words import digits, duration, short, shown_epsilon

_PACKAGES = ("dp_ilg", "jax", "jaxlib", "optax", "flax", "dp-accounting", "numpy")


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` and `model_card.md` into a run folder, finished or not.

    Args:
        run_dir: the folder of a training run.

    Returns:
        The path of the page; it replaces an older one only when it is complete.

    Raises:
        ValueError: in one sentence, for a folder or file that is missing, damaged or
            not writable.

    Privacy:
        The page shows released values, public facts and test accuracy. Test accuracy
        and the size of the data are taken to be public.

    Example:
        >>> write_report(Path("no/such/run"))
        Traceback (most recent call last):
        ValueError: no/such/run is not a folder; give the folder of a training run.
    """
    run_dir = Path(run_dir)
    record = read_run(run_dir)
    page, card = render_report(record), render_card(record)
    write_page(run_dir / "model_card.md", card)
    return write_page(run_dir / "report.html", page)


def write_overview(run_dir: Path, path: Path) -> Path:
    """Draws the main figure of a run: heat maps beside accuracy against epsilon.

    Args:
        run_dir: the folder of a training run.
        path: where to; the ending (`.png`, `.svg`, `.pdf`) decides the file type.

    Returns:
        `path`.

    Raises:
        ValueError: for a folder that cannot be read or holds no evaluation.

    Example:
        >>> write_overview(Path("no/such/run"), Path("overview.png"))
        Traceback (most recent call last):
        ValueError: no/such/run is not a folder; give the folder of a training run.
    """
    record = read_run(Path(run_dir))
    if record.history is None:
        raise ValueError(f"{run_dir} has no evaluation yet; train further.")
    figure = figures.overview_figure(record.history, record.plan.target_epsilon)
    save_figure(figure, Path(path))
    return Path(path)


def render_report(record: RunRecord) -> str:
    """Returns the page of a run as text.

    Args:
        record: what `read_run` read.

    Returns:
        HTML in which everything that came from the folder is escaped.

    Example:
        >>> import inspect
        >>> list(inspect.signature(render_report).parameters)
        ['record']
    """
    page = template("page.html.jinja")
    return page.render(
        record=record,
        plan=record.plan,
        facts=_facts(record),
        settings=as_text(record.settings),
        bullets=bullets(record.plan, record.steps_charged),
        statement=_statement(record.plan, record.steps_charged),
        figures=_figures(record),
        layers=_layer_rows(record.history) if record.history else [],
        noise=_noise_facts(record.history) if record.history else None,
        budget=_budget(record),
        versions=_versions(record.summary),
        notes=_notes(record.summary),
        iterates=_iterates(record.history),
        warning=_warning(record),
        certificate=_certified(record.certificate),
    )


def _statement(plan: PrivacyPlan, steps: int) -> dict[str, Any]:
    """Returns the statement of the steps taken, what it does not cover as a list."""
    facts = plan.statement(steps).as_dict()
    paragraph, _, _ = facts["text"].partition("The guarantee does not cover: ")
    return {**facts, "paragraph": paragraph.strip()}


def _certified(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The sensitivity certificate in words."""
    if found is None:
        return None
    noise, account = found["noise"], found["accounting"]
    share = account["least_share_of_delta"]
    lines = [
        f"Noise: {noise['law']}, on a grid of {noise['grid']}. Its distance to the law "
        f"that is accounted costs {short(noise['charged_epsilon'])} of epsilon and "
        f"{short(noise['charged_delta'])} of delta; both are included.",
        f"Epsilon was computed by {account['accountant']}."
        + (
            ""
            if share is None
            else " An independent lower bound needs "
            f"{100 * share:.2f} % of delta at that epsilon; more than 100 % would "
            "refute it."
        ),
        *(f"Assumed: {line}" for line in found["assumptions"]),
    ]
    return {
        "margin": short(found["margin"]),
        "largest_lot": f"{found['largest_lot']:,}",
        "leaves": found["leaves"],
        "lines": lines,
    }


def _notes(summary: Mapping[str, Any] | None) -> list[str]:
    """Returns what the run itself says about its data and its seed."""
    found = [(summary or {}).get(name) for name in ("data_note", "seed_note")]
    return [str(note) for note in found if note]


def _iterates(history: History | None) -> str:
    """Returns how much the results varied over the last evaluations, or nothing."""
    found = last_iterates(history.steps, history.answers) if history else None
    return found.in_words(history.measure) if found and history else ""


def _warning(record: RunRecord) -> str:
    """Returns why the guarantee may not hold for somebody, or nothing."""
    if record.shows_unprotected_loss:
        return (
            "The training loss of this run was recorded. It is computed from the data "
            "without noise, so nothing is guaranteed towards those who saw it."
        )
    return ""


def _facts(record: RunRecord) -> list[tuple[str, str, str]]:
    """Returns the headline: label, value and a note each."""
    plan, history = record.plan, record.history
    last = f"at step {history.steps[-1]:,.0f}" if history else "no evaluation yet"
    answer = history.last_words() if history else "–"
    title = history.title() if history else "Test accuracy"
    seconds = duration(history.seconds[-1]) if history else "–"
    target = plan.target_epsilon
    return [
        ("Data set", record.data, f"{plan.num_examples:,} training examples"),
        (title, answer, last),
        (
            "Privacy spent, ε",
            shown_epsilon(record.epsilon_charged()),
            "no target" if target is None else f"of {target:g} planned",
        ),
        ("Privacy, δ", short(plan.delta), f"1/N is {short(1 / plan.num_examples)}"),
        ("Steps", f"{record.steps_charged:,}", f"of {plan.num_steps:,} planned"),
        ("Time", seconds, "with evaluation"),
    ]


def _figures(record: RunRecord) -> dict[str, Markup]:
    plan, history = record.plan, record.history
    drawn: dict[str, tuple[Figure, str]] = {
        "noise": (
            figures.noise_multiplier_figure(
                plan.noise_multipliers,
                plan.gradient_noise_multipliers,
                plan.score_noise_multipliers,
                record.steps_charged,
            ),
            "Noise multipliers over the steps of the plan",
        )
    }
    if history is not None:
        target = plan.target_epsilon
        about = "Importance share and noise of each layer over steps"
        drawn["accuracy"] = (
            figures.accuracy_figure(history, target),
            f"{history.title()} against the epsilon spent",
        )
        if history.released:
            drawn["released"] = (
                released_figure(history),
                "Released training metrics over steps, with their error bands",
            )
        drawn["wide"] = (figures.layers_figure(history), about)
        drawn["narrow"] = (figures.layers_figure(history, stacked=True), about)
    return {
        name: Markup(inline_svg(figure, name, about))
        for name, (figure, about) in drawn.items()
    }


def _layer_rows(history: History) -> list[dict[str, Any]]:
    """Returns the table of layers as of the last evaluation."""
    columns = zip(
        history.layer_names,
        history.layer_sizes,
        100 * history.shares[-1],
        history.weights[-1],
        history.noise_stddevs[-1],
        strict=True,
    )
    return [
        {
            "name": printable(name),
            "size": f"{size:,}",
            "share": digits(share),
            "bar": f"{share:.2f}",
            "weight": digits(weight),
            "stddev": digits(stddev),
        }
        for name, size, share, weight, stddev in columns
    ]


def _noise_facts(history: History) -> dict[str, str]:
    """Returns who got the least and the most noise, and its energy against uniform."""
    weights, names = history.weights[-1], history.layer_names
    sizes = np.array(history.layer_sizes, float)
    least, most = int(weights.argmin()), int(weights.argmax())
    energy = float((sizes * weights**2).sum() / sizes.sum())
    return {
        "least": names[least],
        "least_weight": digits(weights[least]),
        "most": names[most],
        "most_weight": digits(weights[most]),
        "energy": digits(100 * energy),
        "uniform": "yes" if weights[most] <= 1.001 * weights[least] else "",
    }


def _budget(record: RunRecord) -> dict[str, float | str]:
    """Returns how the budget was split and how much of the plan is spent."""
    plan = record.plan
    total = plan.epsilon() if plan.target_epsilon is None else plan.target_epsilon
    spent = record.epsilon_charged()
    share = 100 * spent / total if math.isfinite(total) and total > 0 else 100.0
    return {
        "epsilon": shown_epsilon(spent),
        "total": shown_epsilon(total),
        "epsilon_percent": round(min(share, 100.0), 2),
        "steps_percent": round(100 * record.steps_charged / plan.num_steps, 2),
        "score_percent": round(100 * plan.score_budget, 3),
        "metric_percent": round(100 * plan.metric_budget, 3),
    }


def _versions(summary: Mapping[str, Any] | None) -> dict[str, str]:
    """Returns the run's own versions where it wrote them, else those installed."""
    written = (summary or {}).get("versions")
    if isinstance(written, Mapping):
        return {str(name): str(version) for name, version in written.items()}
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
