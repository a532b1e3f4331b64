"""Which metrics of the training examples a run releases, and what they may cost."""

from dataclasses import dataclass
from typing import Annotated

from dp_ilg.experiments.config.run import flag
from dp_ilg.validation import fraction, positive


@dataclass(frozen=True)
class MetricsConfig:
    """Training loss and accuracy, released with noise at every step, or not.

    `budget` is their share of each step's privacy budget. The loss of an example is
    clipped to `loss_bound`, by default twice that of a guess at random. The running
    averages are over `smooth_steps` steps.

    Privacy:
        What is released is charged with the gradient: epsilon stays what it is, and
        the gradient's noise grows by a quarter of a percent at the default budget.

    Example:
        >>> MetricsConfig(release=True).budget
        0.005
    """

    release: Annotated[bool, flag("--metrics")] = False
    budget: float = 0.005
    loss_bound: float | None = None
    smooth_steps: int = 25

    def __post_init__(self):
        fraction("metrics.budget", self.budget)
        if self.loss_bound is not None:
            positive("metrics.loss_bound", self.loss_bound)
        if self.smooth_steps < 1:
            raise ValueError(
                f"metrics.smooth_steps is {self.smooth_steps}, but must be at least 1."
            )
