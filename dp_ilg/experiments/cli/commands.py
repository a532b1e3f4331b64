"""The commands of `dp-ilg` that do not train, and how results are printed."""

import json as json_lib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import dp_ilg
from dp_ilg.accounting.correlated import choice
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.experiments.config.schema import ScheduleConfig

Accountant = Literal["pld", "rdp", "zcdp"]
Relation = Literal["add_or_remove_one", "replace_one"]
_CONSTANT = ScheduleConfig()


@dataclass(frozen=True, kw_only=True)
class AccountingOptions:
    """How the steps of a run are noised and accounted.

    Attributes:
        schedule: the shape of the noise over the steps.
        num_stages: the largest number of distinct multipliers, as a run has it.
        accountant: how privacy loss is composed.
        neighboring_relation: what two data sets may differ in.
        max_batch_size: cut larger draws to this size, at random.
        bands: over how many steps noise is correlated, or auto.
    """

    schedule: ScheduleConfig = _CONSTANT
    num_stages: int = 16
    accountant: Accountant = "pld"
    neighboring_relation: Relation = "add_or_remove_one"
    max_batch_size: int | None = None
    bands: int | Literal["auto"] | None = None

    def facts(self) -> dict[str, Any]:
        """Returns the arguments of `dp_ilg.plan_privacy` that these are.

        Raises:
            ValueError: for an unknown schedule.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.bands is None:
            del given["bands"]
        return given | {"schedule": _schedule(self.schedule)}


_Accounting = Annotated[AccountingOptions, tyro.conf.arg(name="")]
_USUAL = AccountingOptions()


def calibrate(
    *,
    epsilon: float,
    delta: float,
    num_examples: int,
    batch_size: int | None = None,
    num_steps: int | None = None,
    noise_multiplier: float | None = None,
    score_budget: float = 0.01,
    accounting: _Accounting = _USUAL,
    json: bool = False,
) -> Callable[[], None]:
    """Finds the noise for an epsilon; or, for a noise, the steps or the batch size.

    Leave out the one of --noise-multiplier, --num-steps and --batch-size to be found.

    Args:
        epsilon: the target.
        delta: the delta of the guarantee, best below 1 / num_examples.
        num_examples: number of training examples.
        batch_size: the expected batch size.
        num_steps: number of steps.
        noise_multiplier: the scale of the noise, relative to the clip norm.
        score_budget: share of each step's budget for layer scores.
        accounting: how the steps are noised and accounted.
        json: print one JSON object.

    Returns:
        What does it.

    Example:
        >>> calibrate(epsilon=2.0, delta=1e-5, num_examples=1000, batch_size=100,
        ...           num_steps=10, json=True)()
        {"epsilon": 1.99..., ...}
    """
    facts = accounting.facts()  # a wrong name comes before what is left out
    facts |= {"delta": delta, "num_examples": num_examples}
    sought = dict(
        noise_multiplier=noise_multiplier, num_steps=num_steps, batch_size=batch_size
    )
    left_out = _left_out(sought)
    find = _FINDERS[left_out]
    if accounting.bands is not None and left_out != "noise_multiplier":
        raise ValueError(
            f"--bands is {accounting.bands}, for which calibrate finds the noise and "
            f"not the {left_out.replace('_', ' ')}; give --num-steps and --batch-size."
        )
    facts |= {name: value for name, value in sought.items() if value is not None}
    facts |= {"epsilon": epsilon, "score_budget": score_budget}
    return lambda: _show_plan(find(**facts), json, accounting.bands)


_FINDERS: dict[str, Callable[..., PrivacyPlan]] = {
    "noise_multiplier": dp_ilg.plan_privacy,
    "num_steps": dp_ilg.steps_for_epsilon,
    "batch_size": dp_ilg.batch_size_for_epsilon,
}


def _left_out(sought: Mapping[str, Any]) -> str:
    missing = [name for name, value in sought.items() if value is None]
    if len(missing) != 1:
        raise ValueError(
            f"{len(missing)} of --noise-multiplier, --num-steps and --batch-size are "
            "left out, but exactly one must be: it is what calibrate finds."
        )
    return missing[0]


def epsilon(
    *,
    noise_multiplier: float,
    delta: float,
    num_examples: int,
    batch_size: int,
    num_steps: int,
    accounting: _Accounting = _USUAL,
    json: bool = False,
) -> Callable[[], None]:
    """Computes the epsilon of a noise multiplier.

    Args:
        noise_multiplier: the scale of the noise, relative to the clip norm.
        delta: the delta of the guarantee, best below 1 / num_examples.
        num_examples: number of training examples.
        batch_size: the expected batch size.
        num_steps: number of steps.
        accounting: how the steps are noised and accounted.
        json: print one JSON object.

    Returns:
        What does it.

    Example:
        >>> epsilon(noise_multiplier=2.0, delta=1e-5, num_examples=1000, batch_size=100,
        ...         num_steps=10, json=True)()
        {"epsilon": 0.79..., ...}
    """

    def work() -> None:
        plan = dp_ilg.plan_privacy(
            noise_multiplier=noise_multiplier,
            delta=delta,
            num_examples=num_examples,
            batch_size=batch_size,
            num_steps=num_steps,
            score_budget=0.0,
            **accounting.facts(),
        )
        _show_plan(plan, json, accounting.bands)

    return work


def export(
    run_dir: Annotated[str, tyro.conf.Positional],
    out: Annotated[str, tyro.conf.Positional],
    *,
    overwrite: bool = False,
    json: bool = False,
) -> Callable[[], None]:
    """Writes the parameters of a run, and nothing secret, to an .npz file.

    Args:
        run_dir: the folder of a training run.
        out: the file, which must not exist.
        overwrite: replace the file if it exists.
        json: print one JSON object.

    Returns:
        What does it.

    Example:
        >>> export("no/such/run", "out.npz")()
        Traceback (most recent call last):
        ValueError: no/such/run is not a folder; give the folder of a training run.
    """

    def work() -> None:
        from dp_ilg.experiments.runs.export import export_parameters

        found = export_parameters(Path(run_dir), Path(out), overwrite=overwrite)
        show(found, json, _EXPORT_ROWS)

    return work


# key of the result -> words in the table, and how to print the value
Rows = Mapping[str, tuple[str, str]]
TRAIN_ROWS: Rows = {
    "dataset": ("Data set", "{}"),
    "importance": ("Importance", "{}"),
    "method": ("Method", "{}"),
    "made_of": ("Made of", "{}"),
    "test_accuracy": ("Test accuracy", "{:.2%}"),
    "test_mse": ("Test MSE", "{:.4f}"),
    "test_rmse": ("Test RMSE", "{:.4f}"),
    "iterates_in_words": ("Over the last iterates", "{}"),
    "test_perplexity": ("Test perplexity", "{:.1f}"),
    "released_in_words": ("Released, with standard error", "{}"),
    "epsilon": ("Privacy spent: epsilon", "{:.4f}"),
    "delta": ("Delta", "{:g}"),
    "steps": ("Steps", "{:,}"),
    "seconds": ("Seconds", "{:.1f}"),
    "params_sha256": ("Parameters (SHA-256)", "{:.16}..."),
    "seed_note": ("Randomness", "{}"),
    "warning": ("WARNING", "{}"),
    "report": ("Report", "{}"),
}
_PLAN_ROWS: Rows = {
    "epsilon": ("Epsilon", "{:.4f}"),
    "delta": ("Delta", "{:g}"),
    "noise_multiplier": ("Noise multiplier of the first step", "{:.4f}"),
    "last_noise_multiplier": ("Noise multiplier of the last step", "{:.4f}"),
    "num_steps": ("Steps", "{:,}"),
    "batch_size": ("Expected batch size", "{:,}"),
    "max_batch_size": ("Draws are cut to", "{:,}"),
    "uncut_epsilon": ("Epsilon if none were cut", "{:.4f}"),
    "bands": ("Noise is correlated over steps", "{:,}"),
    "expected_noise": ("Noise of sums of steps, of independent noise's", "{:.3f}"),
    "num_examples": ("Training examples", "{:,}"),
    "accountant": ("Accountant", "{}"),
    "neighboring_relation": ("Neighbouring relation", "{}"),
}
_EXPORT_ROWS: Rows = {
    "out": ("File", "{}"),
    "arrays": ("Arrays", "{:,}"),
    "parameters": ("Parameters", "{:,}"),
    "steps": ("After steps", "{:,}"),
    "epsilon": ("Privacy spent: epsilon", "{:.4f}"),
    "delta": ("Delta", "{:g}"),
}


def _show_plan(plan: PrivacyPlan, json: bool, bands: Any = None) -> None:
    multipliers = plan.noise_multipliers
    found = {
        "epsilon": plan.epsilon(),
        "delta": plan.delta,
        "noise_multiplier": float(multipliers[0]),
        "last_noise_multiplier": float(multipliers[-1]),
        "stages": [list(stage) for stage in plan.stages],
        "num_steps": plan.num_steps,
        "batch_size": plan.batch_size,
        "num_examples": plan.num_examples,
        "sampling_prob": plan.sampling_prob,
        "score_budget": plan.score_budget,
        "accountant": plan.accountant,
        "neighboring_relation": plan.neighboring_relation,
        "statement": plan.statement().text,
    }
    if plan.max_batch_size is not None:
        found["max_batch_size"] = plan.max_batch_size
        found["uncut_epsilon"] = replace(plan, max_batch_size=None).epsilon()
    if bands is not None:
        found["bands"] = plan.bands
        found["expected_noise"] = choice.expected(plan)
    show(found, json, _PLAN_ROWS)


def show(found: Mapping[str, Any], json: bool, rows: Rows) -> None:
    """Prints a result for people or for programs.

    Args:
        found: names to values.
        json: whether as one JSON object, else as a table.
        rows: what the table shows of it.

    Example:
        >>> show({"report": "a.html", "other": 1}, True, {})
        {"report": "a.html", "other": 1}
    """
    if json:
        print(json_lib.dumps({k: _strict(v) for k, v in found.items()}))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    for name, (words, form) in rows.items():
        if name in found:
            table.add_row(words, Text(form.format(found[name])))
    console = Console()
    console.print(table)
    if "statement" in found:
        console.print(found["statement"], markup=False, highlight=False)


def _strict(value: Any) -> Any:
    """Infinity as a word: JSON has no such number."""
    return "inf" if isinstance(value, float) and math.isinf(value) else value


def _schedule(chosen: ScheduleConfig) -> Any:
    from dp_ilg.experiments.runs.recipe import build_schedule

    return build_schedule(chosen)
