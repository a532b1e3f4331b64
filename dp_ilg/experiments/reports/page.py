"""`report.html`: one self-contained page that shows a run and what it guarantees.

The page needs nothing from anywhere: styles and figures are inside it, scripts are
not, and its own content policy forbids loading any. The same folder and the same
installed versions give the same bytes.
"""

import math
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.accounting.statements.statement import round_up
from dp_ilg.experiments.reports import figures
from dp_ilg.experiments.reports.record import History, RunRecord, read_run
from dp_ilg.experiments.reports.released import released_figure
from dp_ilg.experiments.reports.svg import inline_svg, printable, save_figure

_PACKAGES = ("dp_ilg", "jax", "jaxlib", "optax", "flax", "dp-accounting", "numpy")


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` into a run folder, finished or not.

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
    page = render_report(read_run(run_dir))
    path = run_dir / "report.html"
    try:
        _replace(path, page.encode("utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}); free space or change its "
            "permissions."
        ) from None
    return path


def _replace(path: Path, content: bytes) -> None:
    """Writes a file all at once: a reader sees the old one or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".report-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


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
    template = resources.files("dp_ilg.experiments.reports") / "page.html.jinja"
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _lines_printable(value) if type(value) is str else value,
    )
    page = environment.from_string(template.read_text(encoding="utf-8"))
    return page.render(
        record=record,
        plan=record.plan,
        facts=_facts(record),
        statement=_statement(record.plan),
        figures=_figures(record),
        layers=_layer_rows(record.history) if record.history else [],
        noise=_noise_facts(record.history) if record.history else None,
        budget=_budget(record),
        versions=_versions(record.summary),
        notes=_notes(record.summary),
        warning=_warning(record),
        certificate=_certified(record.certificate),
    )


def _lines_printable(text: str) -> str:
    return "\n".join(printable(line) for line in text.replace("\t", "    ").split("\n"))


def _statement(plan: PrivacyPlan) -> dict[str, Any]:
    """Returns the plan's statement, what it does not cover as a list."""
    facts = plan.statement().as_dict()
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
        f"that is accounted costs {_short(noise['charged_epsilon'])} of epsilon and "
        f"{_short(noise['charged_delta'])} of delta; both are included.",
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
        "margin": _short(found["margin"]),
        "largest_lot": f"{found['largest_lot']:,}",
        "leaves": found["leaves"],
        "lines": lines,
    }


def _notes(summary: Mapping[str, Any] | None) -> list[str]:
    """Returns what the run itself says about its data and its seed."""
    found = [(summary or {}).get(name) for name in ("data_note", "seed_note")]
    return [str(note) for note in found if note]


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
    accuracy = f"{100 * history.accuracies[-1]:.1f} %" if history else "–"
    seconds = _duration(history.seconds[-1]) if history else "–"
    target = plan.target_epsilon
    return [
        ("Data set", record.data, f"{plan.num_examples:,} training examples"),
        ("Test accuracy", accuracy, last),
        (
            "Privacy spent, ε",
            _epsilon(record.epsilon_charged()),
            "no target" if target is None else f"of {target:g} planned",
        ),
        ("Privacy, δ", _short(plan.delta), f"1/N is {_short(1 / plan.num_examples)}"),
        ("Steps", f"{record.steps_charged:,}", f"of {plan.num_steps:,} planned"),
        ("Time", seconds, "with evaluation"),
    ]


def _epsilon(value: float) -> str:
    return round_up(value) if math.isfinite(value) else "∞"


def _short(value: float) -> str:
    mantissa, exponent, power = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(power)}" if exponent else mantissa


def _digits(value: float) -> str:
    """Returns three significant digits, trailing zeros kept so that columns align."""
    return f"{value:#.3g}".removesuffix(".")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


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
            "Test accuracy against the epsilon spent",
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
            "share": _digits(share),
            "bar": f"{share:.2f}",
            "weight": _digits(weight),
            "stddev": _digits(stddev),
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
        "least_weight": _digits(weights[least]),
        "most": names[most],
        "most_weight": _digits(weights[most]),
        "energy": _digits(100 * energy),
        "uniform": "yes" if weights[most] <= 1.001 * weights[least] else "",
    }


def _budget(record: RunRecord) -> dict[str, float | str]:
    """Returns how the budget was split and how much of the plan is spent."""
    plan = record.plan
    total = plan.epsilon() if plan.target_epsilon is None else plan.target_epsilon
    spent = record.epsilon_charged()
    share = 100 * spent / total if math.isfinite(total) and total > 0 else 100.0
    return {
        "epsilon": _epsilon(spent),
        "total": _epsilon(total),
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
