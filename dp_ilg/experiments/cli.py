"""The command `dp-ilg`: train, calibrate, epsilon, report.

Results go to standard output, as a table or, with ``--json``, as one JSON object.
Everything else goes to standard error. A mistake is one sentence and exit code 2.
"""

import contextlib
import io
import json as json_lib
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import dp_ilg
from dp_ilg.experiments.config import Config, ScheduleConfig, read_config
from dp_ilg.experiments.fields import nearest
from dp_ilg.plan import PrivacyPlan

Accountant = Literal["pld", "rdp", "zcdp"]
Relation = Literal["add_or_remove_one", "replace_one"]
_CONSTANT = ScheduleConfig()


class _Mistake(Exception):
    """What tyro found wrong with a command line, in one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        The exit code: 0, 2 for a mistake or a failing disk, 130 after Ctrl-C.

    Example:
        >>> main(["epsilon", "--noise-multiplier", "2", "--delta", "1e-5",
        ...       "--num-examples", "1000", "--batch-size", "100", "--num-steps", "10",
        ...       "--json"])
        {"epsilon": 0.65..., ...}
        0
        >>> main(["train", "--epsilon", "-1"])
        2
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        with _warnings_as_lines():
            _parse(args, Config())()
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _complain("Interrupted; go on with --resume if steps were taken.", 130)
    except (_Mistake, ValueError, TypeError) as error:
        return _complain(str(error), 2)
    except OSError as error:
        return _complain(_disk(error), 2)
    return 0


def _parse(args: list[str], default: Config) -> Callable[[], None]:
    """Reads a command line; the result does the work when called."""
    commands = {
        "train": _train_command(default, args),
        "calibrate": calibrate,
        "epsilon": epsilon,
        "report": report,
    }
    if args and not args[0].startswith("-") and args[0] not in commands:
        advice = nearest(args[0], commands)
        raise _Mistake(f"There is no command {args[0]!r}; {advice}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="dp-ilg",
                description="Differentially private training whose noise follows the "
                "importance of each layer.",
                args=args,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code:
            raise _Mistake(_first_sentence(said.getvalue())) from None
        raise


def _train_command(default: Config, args: list[str]) -> Callable:
    def train(
        config: Annotated[str | None, tyro.conf.Positional] = None,
        *,
        run_dir: str | None = None,
        data_dir: str | None = None,
        resume: bool = False,
        json: bool = False,
        settings: Annotated[Config, tyro.conf.arg(name="")] = default,
    ) -> Callable[[], None]:
        """Trains a model with differential privacy and reports it.

        Args:
            config: a TOML file; without one, the bundled digits.
            run_dir: where the run is written; by default a new folder in runs/.
            data_dir: a folder of data files (NAME.npz or IDX files).
            resume: go on with the run folder, or start it if it does not exist.
            json: print one JSON object.
            settings: fields of the configuration.
        """
        base = _base_config(config, run_dir, resume)
        if base != default:  # once more, over the file's values
            return _parse(args, base)
        return lambda: _train(settings, run_dir, data_dir, resume, json)

    return train


def _base_config(path: str | None, run_dir: str | None, resume: bool) -> Config:
    """The values that flags are laid over: the file, the resumed run, or digits."""
    if path is not None:
        return read_config(Path(path))
    saved = Path(run_dir or "") / "config.toml"
    if resume and run_dir is not None and saved.exists():
        return read_config(saved)
    return Config()


def _train(
    config: Config, run_dir: str | None, data_dir: str | None, resume: bool, json: bool
) -> None:
    from dp_ilg.experiments.progress import progress_bar
    from dp_ilg.experiments.runner import Interrupted, run_training

    if resume and run_dir is None:
        raise ValueError("--resume needs --run-dir, the folder to go on with.")
    chosen = config.optimizer.importance
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(run_dir or f"runs/{config.data.name}-{chosen}-{stamp}")
    if config.run.show_private_loss:
        warnings.warn(
            "--show-private-loss shows the training loss, which is computed from the "
            "data without noise: the guarantee is void for who sees it.",
            stacklevel=1,
        )
    try:
        summary = run_training(
            config,
            folder,
            data_dir=None if data_dir is None else Path(data_dir),
            resume=resume,
            progress=progress_bar,
        )
    except Interrupted as stop:
        print(f"dp-ilg: {stop}", file=sys.stderr)
        raise SystemExit(130) from None
    found = summary | {"run_dir": str(folder), "report": str(folder / "report.html")}
    _show(found, json, _TRAIN_ROWS)


def calibrate(
    *,
    epsilon: float,
    delta: float,
    num_examples: int,
    batch_size: int | None = None,
    num_steps: int | None = None,
    noise_multiplier: float | None = None,
    schedule: ScheduleConfig = _CONSTANT,
    score_budget: float = 0.01,
    accountant: Accountant = "pld",
    neighboring_relation: Relation = "add_or_remove_one",
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
        schedule: the shape of the noise over the steps.
        score_budget: share of each step's budget for layer scores.
        accountant: how privacy loss is composed.
        neighboring_relation: what two data sets may differ in.
        json: print one JSON object.

    Returns:
        What does it.

    Example:
        >>> calibrate(epsilon=2.0, delta=1e-5, num_examples=1000, batch_size=100,
        ...           num_steps=10, json=True)()
        {"epsilon": 1.99..., ...}
    """
    facts = dict(
        delta=delta,
        num_examples=num_examples,
        score_budget=score_budget,
        accountant=accountant,
        neighboring_relation=neighboring_relation,
    )
    sought = dict(
        noise_multiplier=noise_multiplier, num_steps=num_steps, batch_size=batch_size
    )
    missing = [name for name, value in sought.items() if value is None]
    if len(missing) != 1:
        raise ValueError(
            f"{len(missing)} of --noise-multiplier, --num-steps and --batch-size are "
            "left out, but exactly one must be: it is what calibrate finds."
        )
    find: Callable[..., PrivacyPlan] = {
        "noise_multiplier": dp_ilg.plan_privacy,
        "num_steps": dp_ilg.steps_for_epsilon,
        "batch_size": dp_ilg.batch_size_for_epsilon,
    }[missing[0]]
    del sought[missing[0]]

    def work() -> None:
        shape = _schedule(schedule)
        _show_plan(find(epsilon=epsilon, schedule=shape, **facts, **sought), json)

    return work


def epsilon(
    *,
    noise_multiplier: float,
    delta: float,
    num_examples: int,
    batch_size: int,
    num_steps: int,
    schedule: ScheduleConfig = _CONSTANT,
    accountant: Accountant = "pld",
    neighboring_relation: Relation = "add_or_remove_one",
    json: bool = False,
) -> Callable[[], None]:
    """Computes the epsilon of a noise multiplier.

    Args:
        noise_multiplier: the scale of the noise, relative to the clip norm.
        delta: the delta of the guarantee, best below 1 / num_examples.
        num_examples: number of training examples.
        batch_size: the expected batch size.
        num_steps: number of steps.
        schedule: the shape of the noise over the steps.
        accountant: how privacy loss is composed.
        neighboring_relation: what two data sets may differ in.
        json: print one JSON object.

    Returns:
        What does it.

    Example:
        >>> epsilon(noise_multiplier=2.0, delta=1e-5, num_examples=1000, batch_size=100,
        ...         num_steps=10, json=True)()
        {"epsilon": 0.65..., ...}
    """

    def work() -> None:
        plan = dp_ilg.plan_privacy(
            noise_multiplier=noise_multiplier,
            delta=delta,
            num_examples=num_examples,
            batch_size=batch_size,
            num_steps=num_steps,
            schedule=_schedule(schedule),
            score_budget=0.0,
            accountant=accountant,
            neighboring_relation=neighboring_relation,
        )
        _show_plan(plan, json)

    return work


def report(
    run_dir: Annotated[str, tyro.conf.Positional], *, json: bool = False
) -> Callable[[], None]:
    """Writes report.html of a run folder once more.

    Args:
        run_dir: the folder of a training run.
        json: print one JSON object.

    Returns:
        What does it.

    Example:
        >>> report("no/such/run")()
        Traceback (most recent call last):
        ValueError: no/such/run is not a folder; give the folder of a training run.
    """

    def work() -> None:
        from dp_ilg.experiments.report import write_report

        path = write_report(Path(run_dir))
        _show({"run_dir": run_dir, "report": str(path)}, json, _REPORT_ROWS)

    return work


# key of the result -> words in the table, and how to print the value
Rows = Mapping[str, tuple[str, str]]
_TRAIN_ROWS: Rows = {
    "dataset": ("Data set", "{}"),
    "importance": ("Importance", "{}"),
    "test_accuracy": ("Test accuracy", "{:.2%}"),
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
    "num_examples": ("Training examples", "{:,}"),
    "accountant": ("Accountant", "{}"),
    "neighboring_relation": ("Neighbouring relation", "{}"),
}
_REPORT_ROWS: Rows = {"run_dir": ("Run folder", "{}"), "report": ("Report", "{}")}


def _show_plan(plan: PrivacyPlan, json: bool) -> None:
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
    _show(found, json, _PLAN_ROWS)


def _show(found: Mapping[str, Any], json: bool, rows: Rows) -> None:
    if json:
        print(json_lib.dumps(found))
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


def _schedule(chosen: ScheduleConfig) -> Any:
    from dp_ilg.experiments.job import build_schedule

    return build_schedule(chosen)


@contextlib.contextmanager
def _warnings_as_lines() -> Any:
    """Prints what a user should know as one line, and no deprecations."""

    def show(message: Any, category: type, *place: Any) -> None:
        print(f"dp-ilg: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _complain(sentence: str, code: int) -> int:
    print(f"dp-ilg: {' '.join(sentence.split())}", file=sys.stderr)
    return code


def _disk(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    words = error.strerror or str(error)
    return f"{where}{words}; free space or change permissions, then use --resume."


def _first_sentence(boxed: str) -> str:
    """Takes the words out of tyro's box: the complaint and its best advice."""
    lines = [line.strip(" │╭╮╰╯") for line in boxed.splitlines()]
    text = re.sub(r"^─ (.*?) ─+$", r"\1\n───", "\n".join(lines), flags=re.MULTILINE)
    parts = [" ".join(part.split()) for part in re.split(r"\n[─-]{3,}\n", text)]
    found = (parts[1] if len(parts) > 1 else " ".join(parts)).rstrip(".")
    found = re.sub(r"^Error parsing __tyro[\w.-]*: ", "", found)
    advice = re.search(r"Perhaps you meant: (--[\w.-]+)", " ".join(parts[2:]))
    if advice:
        return f"{found}; did you mean {advice[1]}?"
    return f"{found}; see --help."


if __name__ == "__main__":
    sys.exit(main())
