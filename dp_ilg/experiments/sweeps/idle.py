"""Parameters that do nothing: whatever values a grid has, they are one column of it."""

from collections.abc import Callable
from typing import NamedTuple

from dp_ilg.baselines.table import baseline
from dp_ilg.experiments.config.schema import Config
from dp_ilg.experiments.runs.recipe import method_options

_SCALE_FREE = ("dp_adam", "automatic_clipping")  # Adam, which divides by size


class Idle(NamedTuple):
    """A case in which a parameter does nothing.

    Attributes:
        parameter: dotted.
        holds: whether it is the case in a configuration.
        why: the end of a sentence.

    Example:
        >>> IDLE[0].parameter
        'privacy.l2_clip_norm'
    """

    parameter: str
    holds: Callable[[Config], bool]
    why: str


def _normalizes(config: Config) -> bool:
    method = config.optimizer.method
    mode = baseline(method).clip_mode(**method_options(config))
    return mode.name.startswith("normalize") and method.startswith(_SCALE_FREE)


def _scores_nothing(config: Config) -> bool:
    row = baseline(config.optimizer.method)
    return not row.spends_scores(**method_options(config))


def _weighs_alike(config: Config) -> bool:
    chosen = config.optimizer
    uniform = "uniform" in (chosen.importance, chosen.method.rpartition("_")[2])
    return chosen.method.startswith(("dp_adam_ilg", "dp_sgd_ilg")) and uniform


_ALIKE = "the rule uniform reads no importance"
IDLE = (
    Idle(
        "privacy.l2_clip_norm",
        _normalizes,
        "every gradient is divided by its own norm, and Adam divides by the size of "
        "what is left",
    ),
    Idle("privacy.score_budget", _scores_nothing, "no score is released"),
    Idle("optimizer.ema_decay", _weighs_alike, _ALIKE),
    Idle("optimizer.floor", _weighs_alike, _ALIKE),
)


def idle_because(config: Config, parameter: str) -> str:
    """Why a parameter does nothing in a run.

    Args:
        config: the run.
        parameter: dotted.

    Returns:
        The end of a sentence; empty if the parameter does something, or nobody knows.

    Example:
        >>> from dp_ilg.experiments.config.schema import OptimizerConfig
        >>> plain = Config(optimizer=OptimizerConfig(method="dp_adam"))
        >>> idle_because(plain, "privacy.score_budget")
        'no score is released'
        >>> idle_because(plain, "privacy.l2_clip_norm")
        ''
    """
    cases = [case for case in IDLE if case.parameter == parameter]
    return next((case.why for case in cases if case.holds(config)), "")
