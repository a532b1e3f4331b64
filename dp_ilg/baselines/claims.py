"""What DP-AdamILG's paper claims: its settings, its budget and its epsilon.

The numbers are the paper's, to the last digit. They are claims: the algorithm they are
made for has no guarantee (see `dp_ilg.published`), so every name here says "claimed".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dp_ilg import validation

_MOST_EPOCHS = 100_000
_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True)
class PublishedSettings:
    """The inputs of the published algorithm.

    Attributes:
        noise_multiplier: sigma_0, of the first epoch.
        decay: k, the noise of epoch t (from 0) is sigma_0 / (1 + k t).
        batch_size: B, examples in a batch.
        num_examples: training examples; an epoch has ``num_examples // batch_size``
            steps.
        rho_total: the budget, in the paper's zCDP accounting.
        clip_factor: alpha, how many root mean squares a coordinate may measure.
        eps_lim: where the decay ends: sigma >= sqrt(2 ln(1.25 / delta)) / eps_lim. The
            paper does not give it; 1 fits its Figure 2 and its numbers of epochs.
        delta: for turning rho into the claimed epsilon.

    Raises:
        ValueError: for a number out of its range, a batch larger than the data, or a
            budget that does not pay for the first epoch.

    Privacy: none; these are the parameters of a claim that does not hold.

    Example:
        >>> settings = PublishedSettings(noise_multiplier=10, decay=0.05,
        ...     batch_size=600, num_examples=60_000, rho_total=0.78125)
        >>> claimed_epochs(settings), settings.steps_per_epoch
        (46, 100)
    """

    noise_multiplier: float
    decay: float
    batch_size: int
    num_examples: int
    rho_total: float
    clip_factor: float = 1.2
    eps_lim: float = 1.0
    delta: float = 1e-5

    def __post_init__(self):
        for name in ("noise_multiplier", "rho_total", "clip_factor", "eps_lim"):
            validation.positive(name, getattr(self, name))
        if self.decay != 0:
            validation.positive("decay", self.decay)
        validation.fraction("delta", self.delta)
        validation.whole("batch_size", self.batch_size)
        validation.whole("num_examples", self.num_examples)
        if self.batch_size > self.num_examples:
            raise ValueError(
                f"batch_size is {self.batch_size}, but there are only "
                f"{self.num_examples} examples; choose a smaller batch."
            )
        claimed_noise_multipliers(self)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; the paper takes them to be disjoint."""
        return self.num_examples // self.batch_size


def claimed_epsilon(rho: float, delta: float) -> float:
    """The epsilon the paper claims for a zCDP budget: rho + 2 sqrt(rho ln(1/delta)).

    Args:
        rho: what its accounting charged.
        delta: the delta of the claim.

    Returns:
        The claimed epsilon.

    Raises:
        ValueError: for rho or delta out of range.

    Privacy: the conversion is right for a mechanism that is rho-zCDP. The published
    algorithm is not, so that for it this is a claim and no guarantee.

    Example:
        >>> round(claimed_epsilon(0.78125, 1e-5), 3)
        6.779

    Reference: Bun and Steinke 2016, Proposition 1.3.
    """
    validation.positive("rho", rho)
    validation.fraction("delta", delta)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


def claimed_rho(noise_multipliers: Any) -> float:
    """What the paper charges for epochs of these noise multipliers.

    Args:
        noise_multipliers: sigma_t, one an epoch.

    Returns:
        ``sum_t 1 / (2 sigma_t^2)``: one Gaussian an epoch, whatever the number of
        steps and layers, since batches are taken to be disjoint.

    Raises:
        ValueError: for a noise multiplier that is not above 0, or none.

    Privacy: none for the published algorithm; see the module.

    Example:
        >>> claimed_rho([1.0, 0.5])
        2.5
    """
    sigmas = np.asarray(noise_multipliers, np.float64)
    if sigmas.size == 0:
        raise ValueError("noise_multipliers is empty; give one for each epoch.")
    for sigma in sigmas:
        validation.positive("noise_multiplier", float(sigma))
    return float(np.sum(0.5 / sigmas**2))


def decayed(noise_multiplier: float, decay: float, epochs: int) -> np.ndarray:
    """The paper's public decay, without a floor: sigma_0 / (1 + k t), t from 0.

    Args:
        noise_multiplier: sigma_0.
        decay: k.
        epochs: how many.

    Returns:
        float64 ``[epochs]``.

    Example:
        >>> decayed(10.0, 0.5, 3).tolist()
        [10.0, 6.666666666666667, 5.0]

    Reference: Li et al. 2024, Algorithm 1; Yu et al. 2019 (DP-SGD with decay).
    """
    return noise_multiplier / (1 + decay * np.arange(epochs))


def claimed_noise_multipliers(settings: PublishedSettings) -> np.ndarray:
    """Noise multipliers of all epochs that the claimed budget pays for.

    The stop rule: an epoch costs 1 / (2 sigma_t^2), and the run ends before the epoch
    that would overdraw the budget.

    Args:
        settings: of the run.

    Returns:
        float64 ``[epochs]``: decaying, and constant once the floor is reached.

    Raises:
        ValueError: if not even one epoch is paid for, or more than 100,000 are.

    Privacy: none; see the module.

    Example:
        >>> sigmas = claimed_noise_multipliers(SETTINGS["mnist"])
        >>> len(sigmas), float(sigmas[0]), round(float(sigmas[-1]), 3)
        (46, 10.0, 4.845)

    Reference: Li et al. 2024, Algorithm 1.
    """
    floor = math.sqrt(2 * math.log(1.25 / settings.delta)) / settings.eps_lim
    largest = max(settings.noise_multiplier, floor)
    bound = 2 * settings.rho_total * largest**2 + 1
    if bound > _MOST_EPOCHS:
        raise ValueError(
            f"rho_total is {settings.rho_total}, which may pay for more than "
            f"{_MOST_EPOCHS} epochs; choose a smaller budget or less noise."
        )
    sigmas = decayed(settings.noise_multiplier, settings.decay, math.ceil(bound))
    sigmas = np.maximum(sigmas, floor)
    spent = np.cumsum(0.5 / sigmas**2)
    epochs = int(np.sum(spent <= settings.rho_total * (1 + _ROUNDING)))
    if not epochs:
        raise ValueError(
            f"rho_total is {settings.rho_total}, but the first epoch costs "
            f"{spent[0]:.4g}; choose a larger budget or more noise."
        )
    return sigmas[:epochs]


def claimed_epochs(settings: PublishedSettings) -> int:
    """How many epochs the published algorithm runs before its budget ends.

    Args:
        settings: of the run.

    Returns:
        The number, at least 1.

    Privacy: none; see the module.

    Example:
        >>> claimed_epochs(SETTINGS["cifar10"])
        101
    """
    return len(claimed_noise_multipliers(settings))


_IMAGES = partial(
    PublishedSettings,
    noise_multiplier=6.0,
    decay=0.001,
    batch_size=200,
    rho_total=1.5625,
)
_DIGITS = partial(
    PublishedSettings,
    noise_multiplier=10.0,
    decay=0.05,
    batch_size=600,
    rho_total=0.78125,
)

# The paper's own settings for its data sets.
SETTINGS: dict[str, PublishedSettings] = {
    "mnist": _DIGITS(num_examples=60_000),
    "fashion_mnist": _DIGITS(num_examples=60_000),
    "svhn": _IMAGES(num_examples=73_257),
    "cifar10": _IMAGES(num_examples=50_000),
    "cifar100": _IMAGES(num_examples=50_000),
}
