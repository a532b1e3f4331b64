"""TensorBoard event files of a run: what `metrics.jsonl` says, written while it runs.

The writer is that of tensorboardX. A run that goes on writes its file anew from
`metrics.jsonl`, so that no point is there twice, whatever interrupted it.
"""

import importlib.util
import json
import math
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dp_ilg.experiments.config.kinds import MEASURES

Record = Mapping[str, Any]
_SHOWN = (
    *(measure.key for measure in MEASURES.values()),
    *("test_rmse", "test_perplexity", "epsilon", "noise_multiplier"),
)
_OF_LAYERS = ("importance", "noise_stddev")
_PREFIX = "events"


@contextmanager
def event_file(run_dir: Path, seconds: float) -> Iterator[Callable[[Record], None]]:
    """Opens the event file of a run, with all evaluations that are on file in it.

    Args:
        run_dir: the folder of the run; `metrics.jsonl` is in it.
        seconds: time the run has taken so far.

    Yields:
        A function that adds the record of an evaluation. Without tensorboardX it does
        nothing, and a warning says so.

    Raises:
        OSError: if it cannot be written.

    Privacy:
        Only values that are released by the plan's mechanism, public, or of test data
        are written, by name: an unprotected loss is not among them.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "metrics.jsonl").touch()
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     with event_file(folder, 0.0) as show:
        ...         show({"step": 1, "seconds": 0.5, "test_accuracy": 0.5})
    """
    if importlib.util.find_spec("tensorboardX") is None:
        warnings.warn(
            "No TensorBoard event files are written, since tensorboardX is not "
            "installed; install it with pip install 'dp_ilg[tensorboard]'.",
            stacklevel=3,
        )
        yield lambda record: None
        return
    from tensorboardX.event_file_writer import EventsWriter  # type: ignore

    began, old = time.time() - seconds, list(run_dir.glob(f"{_PREFIX}.out.tfevents.*"))
    writer = EventsWriter(str(run_dir / _PREFIX), f".{secrets.token_hex(4)}")
    try:
        if old:
            writer.write_event(_fresh_start())
        for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines():
            writer.write_event(_event(json.loads(line), began))
        writer.flush()
        for path in old:
            path.unlink()

        def show(record: Record) -> None:
            writer.write_event(_event(record, began))
            writer.flush()

        yield show
    finally:
        writer.close()


def scalars(record: Record) -> dict[str, float]:
    """What of an evaluation is shown: finite numbers that were released or are public.

    Args:
        record: a line of `metrics.jsonl`.

    Returns:
        Tags to values.

    Example:
        >>> scalars({"step": 1, "test_accuracy": 0.5, "unprotected_train_loss": 2.0})
        {'test_accuracy': 0.5}
    """
    found = {name: record[name] for name in _SHOWN if name in record}
    layers = record.get("layers", {})
    for kind in _OF_LAYERS:
        tags = [f"{kind}/{name}" for name in layers.get("names", ())]
        found |= dict(zip(tags, layers.get(kind, ()), strict=False))
    for name, values in record.get("released", {}).items():
        for kind in ("value", "smoothed", "smoothed_stderr"):
            found[f"released/{name}/{kind}"] = values[kind]
    return {
        tag: float(value)
        for tag, value in found.items()
        if value is not None and math.isfinite(value)
    }


def _event(record: Record, began: float) -> Any:
    from tensorboardX.proto.event_pb2 import Event  # type: ignore
    from tensorboardX.proto.summary_pb2 import Summary  # type: ignore

    values = [
        Summary.Value(tag=tag, simple_value=value)
        for tag, value in scalars(record).items()
    ]
    when = began + float(record.get("seconds", 0.0))
    return Event(
        step=int(record["step"]), wall_time=when, summary=Summary(value=values)
    )


def _fresh_start() -> Any:
    """Tells a TensorBoard that is looking to forget what it has read of this run."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore

    start = SessionLog(status=SessionLog.START)
    return Event(step=0, wall_time=time.time(), session_log=start)
