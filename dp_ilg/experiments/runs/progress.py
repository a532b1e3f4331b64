"""The progress bar: step, epsilon spent, examples per second, test accuracy."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from dp_ilg.experiments.config.kinds import measure_in
from dp_ilg.experiments.runs.job import Job
from dp_ilg.experiments.runs.measures import in_words


class Bar:
    """What the training loop tells; see `progress_bar`.

    Privacy:
        The speed counts the expected batch size; the drawn one is private.

    Example:
        >>> bar = Bar(Progress(disable=True), batch_size=256, num_steps=10, step=0)
        >>> bar.stepped(1)
        >>> bar.evaluated({"epsilon": 0.5, "test_accuracy": 0.25})
        >>> bar.text
        'epsilon 0.500 · test accuracy 25.0 %'
    """

    def __init__(self, bar: Progress, *, batch_size: int, num_steps: int, step: int):
        """Adds the task to a bar."""
        self.bar, self.batch_size = bar, batch_size
        self.text, self.first, self.began = "", step, perf_counter()
        self.task = bar.add_task("", total=num_steps, completed=step, speed="")

    def stepped(self, step: int) -> None:
        """Moves the bar.

        Args:
            step: steps taken.
        """
        if step == self.first + 1:  # the first step compiles: not counted
            self.began = perf_counter()
        done, spent = step - self.first - 1, perf_counter() - self.began
        speed = f"{self.batch_size * done / spent:,.0f} examples/s" if done else ""
        self.bar.update(self.task, completed=step, speed=speed)

    def evaluated(self, record: dict[str, Any]) -> None:
        """Shows an evaluation.

        Args:
            record: a line of ``metrics.jsonl``.
        """
        measure = measure_in(record, "test_")
        digits = 1 if measure.unit else None
        parts = [
            f"epsilon {record['epsilon']:.3f}",
            f"test {measure.words} {measure.shown(record[measure.key], digits)}",
        ]
        parts += in_words(record.get("released", {}))
        if "unprotected_train_loss" in record:
            loss = record["unprotected_train_loss"]
            parts.append(f"unprotected_train_loss {loss:.4f}")
        self.text = " · ".join(parts)
        self.bar.update(self.task, description=self.text)


@contextmanager
def progress_bar(job: Job, step: int) -> Iterator[Bar]:
    """Shows a run on standard error.

    Args:
        job: the run.
        step: steps taken before.

    Yields:
        What the training loop tells.

    Example:
        >>> progress_bar.__name__
        'progress_bar'
    """
    columns = [
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.description}"),
    ]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        sizes = dict(batch_size=job.plan.batch_size, num_steps=job.plan.num_steps)
        yield Bar(bar, **sizes, step=step)
