"""What a run published at its evaluations, as figures and pages read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from dp_ilg.experiments.config.kinds import MEASURES, Measure

_CURVE = (0.6, 0.7, 0.8, 0.8)  # of a made-up run


@dataclass(frozen=True)
class History:
    """What a run published at its evaluations, one row an evaluation.

    Attributes:
        steps: steps taken when the model was evaluated, increasing.
        epsilons: epsilon spent by then; infinite without privacy.
        answers: what was measured on test examples; of accuracy between 0 and 1.
        seconds: time taken by then.
        layer_names: names of the groups that share one noise scale.
        layer_sizes: number of parameters of each group.
        shares: importance of each layer as a share of the sum.
        weights: noise of each layer relative to uniform noise.
        noise_stddevs: noise standard deviation of each layer, per coordinate.
        released: of each metric that was released its value, running average and the
            standard errors of both, ``[evaluations, 4]``; empty where none was.
        measure: what the answers are measured by.

    Example:
        >>> history = example_history()
        >>> history.shares.shape
        (4, 2)
    """

    steps: Float[np.ndarray, " evaluations"]
    epsilons: Float[np.ndarray, " evaluations"]
    answers: Float[np.ndarray, " evaluations"]
    seconds: Float[np.ndarray, " evaluations"]
    layer_names: tuple[str, ...]
    layer_sizes: tuple[int, ...]
    shares: Float[np.ndarray, "evaluations layers"]
    weights: Float[np.ndarray, "evaluations layers"]
    noise_stddevs: Float[np.ndarray, "evaluations layers"]
    released: Mapping[str, Float[np.ndarray, "evaluations 4"]] = field(
        default_factory=dict
    )
    measure: Measure = MEASURES["accuracy"]

    def last_words(self) -> str:
        """The last answer with its unit, as pages show it.

        Example:
            >>> example_history().last_words()
            '81.0 %'
        """
        digits = 1 if self.measure.unit else None
        return self.measure.shown(float(self.answers[-1]), digits)

    def title(self) -> str:
        """What is measured, as the head of a column or of a figure.

        Example:
            >>> example_history().title()
            'Test accuracy'
        """
        return f"Test {self.measure.words}"


def example_history() -> History:
    """Returns a small made-up history, for examples and tests.

    Returns:
        Four evaluations of two layers.

    Example:
        >>> example_history().layer_names
        ('embedding', 'head')
    """
    weights = np.array([[1.0, 1.0], [0.9, 1.6], [0.9, 1.9], [0.9, 2.0]])
    return History(
        steps=np.array([10.0, 20.0, 30.0, 40.0]),
        epsilons=np.array([0.9, 1.3, 1.7, 2.0]),
        answers=np.array([0.61, 0.74, 0.79, 0.81]),
        seconds=np.array([1.0, 2.0, 3.0, 4.0]),
        layer_names=("embedding", "head"),
        layer_sizes=(160_000, 17),
        shares=np.array([[0.5, 0.5], [0.7, 0.3], [0.8, 0.2], [0.8, 0.2]]),
        weights=weights,
        noise_stddevs=1.5 * weights,
        released={
            "train_accuracy": np.array([[a, a, 0.01, 0.002] for a in _CURVE]),
            "train_loss": np.array([[a, a, 0.05, 0.01] for a in _CURVE]),
        },
    )
