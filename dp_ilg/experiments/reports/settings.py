"""The settings that did something in a run, out of all that a file states."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dp_ilg.baselines.table import BASELINES

_FREE = ("prior", "probe")
Values = Mapping[str, Any]  # dotted path -> value
_OFF: dict[str, Any] = {  # a value that stands for "nothing of the kind"
    "data.features": "raw",
    "optimizer.average": 0,
    "optimizer.weight_decay": 0,
    "optimizer.learning_rate_schedule.warmup_steps": 0,
    "privacy.noise": "default",
    "privacy.score_budget": 0,
    "privacy.metric_budget": 0,
    "run.engine": "auto",
}


def _constant_noise(values: Values) -> bool:
    return values.get("privacy.schedule.name") == "constant"


def _constant_rate(values: Values) -> bool:
    return values.get("optimizer.learning_rate_schedule.name") == "constant"


def _no_projection(values: Values) -> bool:
    return values.get("data.projection.channels") is None


def _uniform(values: Values) -> bool:
    return values.get("optimizer.importance") == "uniform"


def _no_estimate(values: Values) -> bool:
    source = values.get("optimizer.source")
    free = source == "public" or (source in _FREE and not _beside_scores(values))
    return _uniform(values) or free


def _beside_scores(values: Values) -> bool:
    return values.get(f"{values.get('optimizer.source')}.groups") == "scores"


def _no_floor(values: Values) -> bool:
    return _no_estimate(values) and values.get("optimizer.source") != "probe"


def _no_metrics(values: Values) -> bool:
    return not values.get("metrics.release")


_IDLE: dict[str, Callable[[Values], bool]] = {  # a setting of a choice not made
    "data.projection.whitening": _no_projection,
    "privacy.num_stages": _constant_noise,
    "optimizer.learning_rate_schedule.end": _constant_rate,
    "optimizer.ema_decay": _no_estimate,
    "optimizer.floor": _no_floor,
    "optimizer.source": _uniform,
    "optimizer.score": _no_estimate,
    "metrics.budget": _no_metrics,
    "metrics.loss_bound": _no_metrics,
    "metrics.smooth_steps": _no_metrics,
}


def used(table: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration that did something.

    Left out are empty ones, those that are off, and those of a choice that was not
    made: the decay of scores where no importance is used, or Adam's of another method.
    The page shows the others.

    Args:
        table: a configuration, as TOML gives it.

    Returns:
        Dotted paths to values, in the order of the file.

    Example:
        >>> used({"data": {"name": "digits", "features": "raw"}, "run": {"seed": 1}})
        {'data.name': 'digits', 'run.seed': 1}
    """
    values = dict(_flat(table))
    idle = _options_of_others(values)
    return {
        path: value
        for path, value in values.items()
        if not (
            _empty(value)
            or path in idle
            or (path in _OFF and value == _OFF[path])
            or (path in _IDLE and _IDLE[path](values))
            or path.startswith("report.")  # at the head of the page
        )
    }


def _empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _options_of_others(values: Values) -> set[str]:
    """Options that some method has and the run's own has not."""
    method = values.get("optimizer.method")
    if not isinstance(method, str) or method not in BASELINES:
        return set()
    of_some = {name for row in BASELINES.values() for name in row.options()}
    own = {*BASELINES[method].options(), "clip_mode", "noise"}
    return {f"optimizer.{name}" for name in of_some - own}


def as_text(settings: Values) -> str:
    """Settings as lines of TOML, a heading for every section.

    Args:
        settings: what `used` returns.

    Returns:
        The text.

    Example:
        >>> print(as_text({"data.name": "digits", "run.seed": 1}))
        [data]
        name = "digits"
        <BLANKLINE>
        [run]
        seed = 1
    """
    sections: dict[str, list[str]] = {}
    for path, value in settings.items():
        section, _, name = path.partition(".") if "." in path else ("", "", path)
        written = json.dumps(value, ensure_ascii=False, default=str)
        sections.setdefault(section, []).append(f"{name} = {written}")
    return "\n\n".join(
        "\n".join([f"[{section}]" if section else "", *lines]).strip()
        for section, lines in sections.items()
    )
