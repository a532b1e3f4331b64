"""The command `dp-ilg`: training, calibration, reports and studies.

Results go to standard output, as a table or, with ``--json``, as one JSON object.
Everything else goes to standard error. A mistake is one sentence and exit code 2.
"""

import contextlib
import io
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from dp_ilg.experiments.cli.commands import (
    TRAIN_ROWS,
    calibrate,
    epsilon,
    export,
    show,
)
from dp_ilg.experiments.cli.compare import compare
from dp_ilg.experiments.cli.flags import meaning_of, train_help
from dp_ilg.experiments.cli.init import init
from dp_ilg.experiments.cli.report import report
from dp_ilg.experiments.cli.shards import shards
from dp_ilg.experiments.cli.studies import audit, reproduce
from dp_ilg.experiments.config.fields import RENAMED, renamed
from dp_ilg.experiments.config.schema import Config, read_config
from dp_ilg.experiments.runs.hosts import GONE, Devices, LostProcess
from dp_ilg.experiments.runs.supervised import LOST, is_worker, supervised
from dp_ilg.validation import nearest

_ONE_DEVICE = Devices()


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
        {"epsilon": 0.79..., ...}
        0
        >>> main(["train", "--epsilon", "-1"])
        2
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["train"] and {"--help", "-h"} & {*args}:
        print(train_help(), end="")
        return 0
    try:
        with _warnings_as_lines(), _quiet_libraries():
            _parse(args, Config())()
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _complain("Interrupted; go on with --resume if steps were taken.", 130)
    except (_Mistake, ValueError, TypeError) as error:
        return _complain(str(error), 2)
    except (MemoryError, RecursionError, OverflowError) as error:
        kind = type(error).__name__
        return _complain(f"The input is too large to be worked on ({kind}).", 2)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return _complain(_disk(error, args[:1] == ["train"]), 2)
    return 0


def _parse(args: list[str], default: Config) -> Callable[[], None]:
    """Reads a command line; the result does the work when called."""
    commands = {
        "init": init,
        "train": _train_command(default, args),
        "calibrate": calibrate,
        "epsilon": epsilon,
        "report": report,
        "export": export,
        "reproduce": reproduce,
        "audit": audit,
        "compare": compare,
        "shards": shards,
    }
    if args and not args[0].startswith("-") and args[0] not in commands:
        advice = nearest(args[0], commands)
        raise _Mistake(f"There is no command {args[0]!r}; {advice}")
    _refuse_old_names(args)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                commands,
                prog="dp-ilg",
                description="Differentially private training whose noise follows the "
                "importance of each layer. `dp-ilg --version` says which this is.",
                args=args,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if stop.code:
            raise _Mistake(_first_sentence(said.getvalue())) from None
        raise


def _refuse_old_names(args: list[str]) -> None:
    for old in RENAMED:
        short = "--" + old.partition(".")[2].replace("_", "-")
        if {short, "--" + old.replace("_", "-")} & set(args):
            raise _Mistake(f"The command has {renamed(old)}")


def _train_command(default: Config, args: list[str]) -> Callable:
    def train(
        config: Annotated[str | None, tyro.conf.Positional] = None,
        *,
        run_dir: str | None = None,
        data_dir: str | None = None,
        resume: bool = False,
        json: bool = False,
        devices: Devices = _ONE_DEVICE,
        settings: Annotated[Config, tyro.conf.arg(name="")] = default,
    ) -> Callable[[], None]:
        """Trains a model with differential privacy and reports it.

        Args:
            config: a TOML file; without one, the bundled digits.
            run_dir: where the run is written; by default a new folder in runs/.
            data_dir: a folder of data files (NAME.npz or IDX files).
            resume: go on with the run folder, or start it if it does not exist.
            json: print one JSON object.
            devices: where the run is carried out.
            settings: fields of the configuration.
        """
        base = _base_config(config, run_dir, resume)
        if base != default:  # once more, over the file's values
            return _parse(args, base)
        if devices.processes > 1 and not is_worker():
            return lambda: supervised(args, devices.process)
        place = run_dir, None if data_dir is None else Path(data_dir)
        return lambda: _train(settings, *place, resume, json, devices)

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
    config: Config,
    run_dir: str | None,
    data_dir: Path | None,
    resume: bool,
    json: bool,
    devices: Devices,
) -> None:
    from dp_ilg.experiments.runs.progress import progress_bar
    from dp_ilg.experiments.runs.runner import run_training
    from dp_ilg.training.compiling import use_compile_cache

    if run_dir == "":
        raise ValueError("--run-dir is empty; give a folder, or leave it out.")
    if resume and run_dir is None:
        raise ValueError("--resume needs --run-dir, the folder to go on with.")
    use_compile_cache(config.run.compile_cache)
    folder = Path(run_dir or _new_folder(config))
    _warn_of_uncovered(config)
    with _ends_as_exit_codes():
        summary = run_training(
            config,
            folder,
            data_dir=data_dir,
            resume=resume,
            progress=progress_bar,
            devices=devices,
        )
    if devices.process:  # process 0 tells
        return
    found = summary | {"run_dir": str(folder), "report": str(folder / "report.html")}
    show(found, json, TRAIN_ROWS)


def _new_folder(config: Config) -> str:
    """Named after data and rule, of which a path or module is left out."""
    names = Path(config.data.name).stem, config.optimizer.importance
    data, chosen = (re.sub(r"[^\w.-]+", "-", n.rpartition(":")[2]) for n in names)
    return f"runs/{data}-{chosen}-{time.strftime('%Y%m%d-%H%M%S')}"


def _warn_of_uncovered(config: Config) -> None:
    """Names what a run is asked to show and its guarantee does not cover."""
    if config.run.unprotected_train_loss:
        warnings.warn(
            "--unprotected-train-loss shows the training loss, which is computed from "
            "the data without noise: the guarantee is void for who sees it; --metrics "
            "releases a noisy one that is covered.",
            stacklevel=1,
        )
    if config.data.validation is not None:
        warnings.warn(
            "--data.validation shows accuracy on held-out training examples, computed "
            "from them without noise: the guarantee does not cover it.",
            stacklevel=1,
        )


@contextlib.contextmanager
def _ends_as_exit_codes() -> Any:
    """Turns an interrupted run, or one that lost a process, into an exit code."""
    from dp_ilg.experiments.runs.runner import Interrupted

    try:
        yield
    except Interrupted as stop:
        print(f"dp-ilg: {stop}", file=sys.stderr)
        raise SystemExit(130) from None
    except LostProcess as lost:
        if is_worker() and GONE in str(lost):  # whoever watches says so, and once
            raise SystemExit(LOST) from None
        raise


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


@contextlib.contextmanager
def _quiet_libraries() -> Any:
    """Keeps tracebacks that Orbax logs beside its errors off the screen."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_WRONG_PATHS = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
)


def _complain(sentence: str, code: int) -> int:
    print(f"dp-ilg: {' '.join(sentence.split())}", file=sys.stderr)
    return code


def _disk(error: OSError, train: bool) -> str:
    where = f"{error.filename}: " if error.filename else ""
    words = error.strerror or str(error)
    if words.endswith("."):  # ours, with its own advice
        return words
    if isinstance(error, _WRONG_PATHS):
        return f"{where}{words}; choose another path, in a folder that exists."
    again = "use --resume" if train else "run it again"
    return f"{where}{words}; free space or change permissions, then {again}."


_KINDS = (  # what Python and tyro say of a value that cannot be read, and what we say
    (r"invalid literal for int\(\) with base 10: (.+)", "a whole number"),
    (r"could not convert string to float: (.+)", "a number"),
    (r"Could not find valid parse for arguments: \[(.+)\]", "numbers of its kind"),
)


def _first_sentence(boxed: str) -> str:
    """Takes the words out of tyro's box: the complaint and its best advice."""
    lines = [line.strip(" │╭╮╰╯") for line in boxed.splitlines()]
    text = re.sub(r"^─ (.*?) ─+$", r"\1\n───", "\n".join(lines), flags=re.MULTILINE)
    parts = [" ".join(part.split()) for part in re.split(r"\n[─-]{3,}\n", text)]
    found = (parts[1] if len(parts) > 1 else " ".join(parts)).rstrip(".")
    found = re.sub(r"^Error parsing __tyro[\w.-]*: ", "", found)
    for pattern, kind in _KINDS:
        if bad := re.match(f"Error parsing (.*?): .*{pattern}$", found):
            return f"{bad[1]} is {bad[2]}, but must be {kind}; see --help."
    if bare := re.match(r"Missing value for argument '(--[\w.-]+)", found):
        return _without_value(bare[1])
    if missing := re.match(r"Missing from (dp-ilg \S+): (.+)", found):
        flags = re.findall(r"--[\w.-]+(?= [A-Z])", missing[2])
        place = re.sub(r"^[A-Z]+ |[.,]? ?\(required\)", "", missing[2])
        return f"{missing[1]} needs {', '.join(flags) or place}; see --help."
    advice = re.search(r"Perhaps you meant: (--[\w.-]+)", " ".join(parts[2:]))
    if advice:
        return f"{found}; did you mean {advice[1]}?"
    return f"{found}; see --help."


def _without_value(flag: str) -> str:
    """A flag that stands without a value: what it means, and an example."""
    words, default = meaning_of(flag)
    about = f" ({words})" if words else ""
    example = f", such as {flag} {default}" if default else ""
    return f"{flag} needs a value{about}{example}; see --help."


if __name__ == "__main__":
    sys.exit(main())
