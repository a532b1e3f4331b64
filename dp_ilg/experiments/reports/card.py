"""`model_card.md`: what travels with a model, in the fields of the report."""

import html

from dp_ilg.experiments.reports.guarantee import bullets
from dp_ilg.experiments.reports.history import History
from dp_ilg.experiments.reports.iterates import last_iterates
from dp_ilg.experiments.reports.record import RunRecord
from dp_ilg.experiments.reports.settings import as_text
from dp_ilg.experiments.reports.svg import printable
from dp_ilg.experiments.reports.words import short, shown_epsilon


def render_card(record: RunRecord) -> str:
    """Returns the model card of a run.

    Args:
        record: what `read_run` read.

    Returns:
        Markdown in which everything that came from the folder is escaped.

    Privacy:
        As for the page: released values, public facts, test accuracy.

    Example:
        >>> import inspect
        >>> list(inspect.signature(render_card).parameters)
        ['record']
    """
    parts = [
        f"# Model trained on {_plain(record.data)}",
        _warned(record),
        _table(_facts(record)),
        "## Guarantee",
        _guarantee(record),
        "### Not covered",
        "\n".join(f"- {item}" for item in _statement(record)["not_covered"]),
        "## Data",
        _note(record, "data_note"),
        "## Training",
        _note(record, "seed_note"),
        "    " + as_text(record.settings).replace("\n", "\n    "),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _plain(text: str) -> str:
    """On one line, and nothing in it markup."""
    shown = html.escape(printable(" ".join(text.split())), quote=False)
    return "".join(f"\\{char}" if char in r"\`*_[]|#" else char for char in shown)


def _facts(record: RunRecord) -> dict[str, str]:
    plan, history, origin = record.plan, record.history, record.origin
    answer = "none yet" if history is None else history.last_words()
    title = "Test accuracy" if history is None else history.title()
    return {
        **origin.named,
        "Training examples": f"{plan.num_examples:,}",
        title: answer,
        **_error_bar(history),
        "ε": shown_epsilon(record.epsilon_charged()),
        "δ": short(plan.delta),
        "Steps": f"{record.steps_charged:,} of {plan.num_steps:,}",
        **{f"SHA-256 of the {name}": value for name, value in origin.digests.items()},
    }


def _error_bar(history: History | None) -> dict[str, str]:
    found = last_iterates(history.steps, history.answers) if history else None
    if history is None or found is None:
        return {}
    return {"Over the last iterates": found.in_words(history.measure)}


def _table(facts: dict[str, str]) -> str:
    rows = [f"| {name} | {_plain(value)} |" for name, value in facts.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _statement(record: RunRecord) -> dict:
    return record.plan.statement(record.steps_charged).as_dict()


def _guarantee(record: RunRecord) -> str:
    found = bullets(record.plan, record.steps_charged)
    if not found:
        return _statement(record)["text"]
    return "\n".join(f"- **{title}.** {text}" for title, text in found)


def _warned(record: RunRecord) -> str:
    if not record.shows_unprotected_loss:
        return ""
    return (
        "**Warning.** The training loss of this run was recorded without noise: "
        "nothing is guaranteed towards those who saw it."
    )


def _note(record: RunRecord, name: str) -> str:
    found = (record.summary or {}).get(name)
    return _plain(str(found)) if found else ""
