"""What a run tells its optimizer: the metrics it releases, and what a probe must know.

Metrics are its training loss and accuracy or error, with noise.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from dp_ilg.base import LossFn
from dp_ilg.clipping.adding.metric_sums import Metric
from dp_ilg.experiments.config.metrics import MetricsConfig
from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.models.networks import Model

Records = dict[str, dict[str, float]]


def run_metrics(config: MetricsConfig, data: Dataset) -> dict[str, Metric]:
    """The metrics of a run, or none.

    Args:
        config: the section "metrics".
        data: the data set; only its number of classes or tokens is read.

    Returns:
        Name -> `dp_ilg.Metric`, for a loss that returns whether the guess is right, or
        how far the number is from what was asked for.

    Privacy: the loss is clipped to a public bound, a squared error to the square of the
    range of the answers.

    Example:
        >>> from dp_ilg.experiments.config.schema import Config
        >>> from dp_ilg.experiments.runs.job import load_data
        >>> found = run_metrics(MetricsConfig(release=True), load_data(Config()))
        >>> sorted(found), round(found["train_loss"].high, 2)
        (['train_accuracy', 'train_loss'], 4.61)
    """
    if not config.release:
        return {}
    if data.target_range is not None:
        low, high = data.target_range
        bound = config.loss_bound or (high - low) ** 2
        return {"train_mse": Metric(_second, high=bound)}
    outcomes = data.num_classes if data.y_train.ndim == 1 else data.num_tokens
    bound = config.loss_bound or 2 * math.log(max(2, outcomes or 2))
    return {
        "train_loss": Metric(lambda loss, right: loss, high=bound),
        "train_accuracy": Metric(lambda loss, right: right),
    }


def _second(loss: Any, error: Any) -> Any:
    """The squared error of an answer inside the range; the loss is of any."""
    del loss
    return error


def with_itself(loss_fn: LossFn) -> LossFn:
    """A loss that returns its value once more beside it, for metrics to be fed with.

    Args:
        loss_fn: ``(params, example) -> scalar``.

    Returns:
        ``(params, example) -> (scalar, scalar)``.

    Example:
        >>> with_itself(lambda w, x: w * x)(2.0, 3.0)
        (6.0, 6.0)
    """

    def pair(params: Any, example: Any) -> Any:
        value = loss_fn(params, example)
        return value, value

    return pair


def told(released: Mapping[str, Any]) -> Records:
    """What was released, as ``metrics.jsonl`` holds it.

    Args:
        released: name -> `dp_ilg.Released`.

    Returns:
        Name -> its four numbers by name.

    Privacy: released with noise; it may be shown.

    Example:
        >>> from dp_ilg import Released
        >>> told({"train_loss": Released(0.5, 0.625, 0.25, 0.125)})["train_loss"]
        {'value': 0.5, 'smoothed': 0.625, 'stderr': 0.25, 'smoothed_stderr': 0.125}
    """
    return {
        name: {field: float(np.asarray(x)) for field, x in one._asdict().items()}
        for name, one in released.items()
    }


def in_words(released: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Running averages with their standard errors, for people.

    Args:
        released: what `told` returned.

    Returns:
        One text a metric.

    Example:
        >>> from dp_ilg import Released
        >>> in_words(told({"train_loss": Released(0.5, 0.625, 0.25, 0.125)}))
        ['train loss 0.625 ± 0.125']
    """
    return [
        f"{name.replace('_', ' ')} {one['smoothed']:.3f} ± {one['smoothed_stderr']:.3f}"
        for name, one in released.items()
    ]


def known_of(model: Model, data: Dataset) -> dict[str, Any]:
    """What a probe must know of a run.

    Where inputs are features of images, the generator makes images, and the features
    that the run is configured with are computed of them.

    Args:
        model: the network.
        data: the data set; only shapes and public facts are read.

    Returns:
        Fields of `dp_ilg.Probe`.

    Privacy: all of it is public.

    Example:
        >>> from dp_ilg.experiments.runs.job import Config, build_job
        >>> job = build_job(Config())
        >>> known_of(job.model, job.data)["num_classes"]
        10
    """
    shape = lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype)  # noqa: E731
    inputs, labels = jax.tree.map(shape, (data.x_train, data.y_train))
    facts: dict[str, Any] = dict(
        loss_fn=model.loss_fn,
        num_classes=data.num_classes or None,
        num_tokens=data.num_tokens or None,
    )
    made = data.made_of
    if made is not None:
        inputs = jax.ShapeDtypeStruct(made.shape, made.dtype)
        facts["features"] = lambda rows: (made.compute(rows[0]), *rows[1:])
    return facts | dict(example=(inputs, labels))
