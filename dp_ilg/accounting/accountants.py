"""Epsilon of events built from (Poisson-sampled) Gaussians.

The module knows dp_accounting's events and nothing else, so that an event composed by
hand (a plan, plus the noised covariance of a DP-PCA) is accounted like any other.
Everything here is a *valid upper bound*: discretisation and conversions only round up.

dp_accounting and SciPy take over a second to import, so each function that needs them
imports them itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from dp_ilg.accounting import epsilon_cache, renyi
from dp_ilg.accounting.certified import accountant as certified
from dp_ilg.accounting.kinds import Kind, kinds_of, merged

if TYPE_CHECKING:
    import dp_accounting

_Kinds = tuple[Kind, ...]

# Below this noise multiplier one step costs an epsilon above 1e11: call it infinite.
_NO_NOISE = 1e-6

# How far one example moves an unsampled sum, in units of the norm bound C.
NEIGHBORING_RELATIONS = {"add_or_remove_one": 1, "replace_one": 2}


def epsilon(
    event: dp_accounting.DpEvent,
    delta: float,
    *,
    accountant: str = "pld",
    neighboring_relation: str = "add_or_remove_one",
) -> float:
    """Returns the epsilon of an event at a given delta.

    Three accountants, from tight to loose. ``"pld"`` composes privacy losses: it is
    `dp_ilg.accounting.certified.accountant`, never below the exact value and at most
    about a thousandth above it for delta of 1e-30 to 1e-2, epsilon of 1e-4 to 100, up
    to 10,000,000 steps and rates from 1e-6; unsampled Gaussians alone have
    dp_accounting's closed form. ``"rdp"`` composes Renyi divergences. ``"zcdp"``
    composes zero concentrated DP and ignores amplification by sampling.

    Args:
        event: Gaussians, Poisson-sampled Gaussians and (self-)compositions of them.
        delta: the delta of the guarantee, strictly between 0 and 1.
        accountant: a key of `ACCOUNTANTS`.
        neighboring_relation: a key of `NEIGHBORING_RELATIONS`.

    Returns:
        The epsilon, at least 0; infinite if some noise multiplier is 0.

    Raises:
        ValueError: for an event, accountant or relation that is not supported, and
            where the accountant cannot answer.

    Privacy:
        Noise multipliers are relative to the norm bound C of ONE example, for both
        relations. Replacing an example moves an unsampled sum by up to 2 C, and every
        accountant here charges that.

    Example:
        >>> import dp_accounting
        >>> step = dp_accounting.PoissonSampledDpEvent(
        ...     256 / 60_000, dp_accounting.GaussianDpEvent(1.1))
        >>> run = dp_accounting.SelfComposedDpEvent(step, 14_063)
        >>> round(epsilon(run, 1e-5, accountant="rdp"), 2)
        2.6
        >>> round(epsilon(run, 1e-5), 2)
        2.38
    """
    check_names(accountant, neighboring_relation)
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta!r}, but must lie between 0 and 1.")
    return _epsilon(kinds_of(event), float(delta), accountant, neighboring_relation)


def check_names(accountant: Any, neighboring_relation: Any) -> None:
    """Raises unless both names are known.

    Args:
        accountant: should be a key of `ACCOUNTANTS`.
        neighboring_relation: should be a key of `NEIGHBORING_RELATIONS`.

    Raises:
        ValueError: for an unknown name, listing the known ones.

    Example:
        >>> check_names("pld", "replace_one")
        >>> check_names("moments", "replace_one")
        Traceback (most recent call last):
        ValueError: accountant is 'moments', but must be one of 'pld', 'rdp', 'zcdp'.
    """
    for name, value, known in (
        ("accountant", accountant, ACCOUNTANTS),
        ("neighboring_relation", neighboring_relation, NEIGHBORING_RELATIONS),
    ):
        if not isinstance(value, str) or value not in known:
            names = ", ".join(repr(one) for one in known)
            raise ValueError(f"{name} is {value!r}, but must be one of {names}.")


def answered_by(event: dp_accounting.DpEvent, accountant: str) -> str:
    """Which package computes the epsilon of an event: ours or dp_accounting.

    Args:
        event: as in `epsilon`.
        accountant: a key of `ACCOUNTANTS`.

    Returns:
        ``"dp-ilg"`` or ``"dp-accounting"``.

    Raises:
        ValueError: for an event that is not supported.

    Example:
        >>> import dp_accounting
        >>> gaussian = dp_accounting.GaussianDpEvent(2.0)
        >>> answered_by(gaussian, "pld")
        'dp-accounting'
        >>> answered_by(dp_accounting.PoissonSampledDpEvent(0.1, gaussian), "pld")
        'dp-ilg'
    """
    if accountant == "pld":
        ours = not _closed_form(kinds_of(event))
    else:
        ours = accountant == "zcdp"
    return "dp-ilg" if ours else "dp-accounting"


def effective_noise_multiplier(noise_multipliers: Iterable[float]) -> float:
    """The one Gaussian that equals several Gaussians on the same sample.

    Releasing several statistics of one batch, with noise multipliers z_1 .. z_k, is
    one Gaussian mechanism with multiplier (sum_i z_i^-2)^(-1/2). Account that one, in
    one Poisson event: separate Poisson events would pretend that the parts saw
    independent samples, and under-report.

    Args:
        noise_multipliers: one a release, each relative to its own sensitivity;
            infinite for a release of nothing.

    Returns:
        The multiplier of the joint release: 0 if any part has none.

    Example:
        >>> effective_noise_multiplier([2.0, 2.0])
        1.4142135623730951
    """
    values = np.asarray(list(noise_multipliers), np.float64)
    if np.any(np.isnan(values) | (values < 0)):
        raise ValueError(f"Noise multipliers are {values}, but must be 0 or above.")
    if np.any(values == 0):
        return 0.0
    precision = float(np.sum(values**-2.0))
    return precision**-0.5 if precision else math.inf


def estimate(
    event: dp_accounting.DpEvent,
    delta: float,
    *,
    accountant: str = "pld",
    neighboring_relation: str = "add_or_remove_one",
) -> float:
    """A valid but loose epsilon in about a millisecond, to start searches from.

    Args:
        event: as in `epsilon`.
        delta: as in `epsilon`.
        accountant: as in `epsilon`; zCDP is fast and answered exactly.
        neighboring_relation: as in `epsilon`.

    Returns:
        An upper bound on `epsilon`, up to the rounding of numbers.

    Example:
        >>> import dp_accounting
        >>> event = dp_accounting.GaussianDpEvent(2.0)
        >>> epsilon(event, 1e-5) <= estimate(event, 1e-5)
        True
    """
    check_names(accountant, neighboring_relation)
    kinds = kinds_of(event)
    if accountant == "zcdp":
        return _epsilon(kinds, delta, accountant, neighboring_relation)
    return _estimate(kinds, delta, neighboring_relation)


@functools.lru_cache(maxsize=4096)
def _epsilon(kinds: _Kinds, delta: float, accountant: str, relation: str) -> float:
    if not kinds:
        return 0.0
    if any(kind.noise_multiplier < _NO_NOISE for kind in kinds):
        return math.inf
    question = (tuple(map(tuple, kinds)), delta, accountant, relation)
    compute = functools.partial(ACCOUNTANTS[accountant], kinds, delta, relation)
    found = epsilon_cache.remembered(question, compute)
    if not 0 <= found < math.inf:
        raise ValueError(
            f"The accountant {accountant!r} finds no finite epsilon at delta {delta:g};"
            " choose a larger delta, more noise or another accountant."
        )
    return found


# --- Privacy loss distributions -----------------------------------------------------


def _pld_epsilon(kinds: _Kinds, delta: float, relation: str) -> float:
    """Unsampled Gaussians have a closed form; all else is summed along a line."""
    if _closed_form(kinds):
        return _gaussian_epsilon(kinds, delta, relation)
    return certified.epsilon(kinds, delta, NEIGHBORING_RELATIONS[relation])


def _closed_form(kinds: _Kinds) -> bool:
    """Whether all are Gaussians that are neither sampled nor cut."""
    return all(q == 1 and not truncated for q, _, truncated, _ in kinds)


def _gaussian_epsilon(kinds: _Kinds, delta: float, relation: str) -> float:
    """Unsampled Gaussians compose to one Gaussian, whose epsilon is analytic."""
    import dp_accounting

    z = sum(kind.count * kind.noise_multiplier**-2.0 for kind in kinds) ** -0.5
    relative = z / NEIGHBORING_RELATIONS[relation]
    with np.errstate(divide="ignore"):
        found = float(dp_accounting.get_epsilon_gaussian(relative, delta))
    return found * (1 + 1e-12) + 2e-12 if found else 0.0  # its root is good to 1e-12


# --- Renyi divergences --------------------------------------------------------------

_ORDERS = (
    *np.arange(1.05, 2.0, 0.05).round(2).tolist(),
    *np.arange(2.0, 10.0, 0.25).tolist(),
    *range(10, 64),
    *(2**k for k in range(6, 13)),
)
_FEW_ORDERS = (1.1, 1.25, 1.5, 1.75, *range(2, 9), 10, 12, 16, 24, 32, 64, 128, 512)


_RDP_KINDS, _ROUGH_KINDS = 512, 16
_STEP_ROUNDING = 1e-14  # of the logarithm of every step's moment


def _rdp_epsilon(kinds: _Kinds, delta: float, relation: str) -> float:
    few = merged(kinds, _RDP_KINDS)
    return _renyi_epsilon(few, delta, relation, _ORDERS)


def _estimate(kinds: _Kinds, delta: float, relation: str) -> float:
    if any(kind.noise_multiplier < _NO_NOISE for kind in kinds):
        return math.inf
    few = merged(kinds, _ROUGH_KINDS)
    return _renyi_epsilon(few, delta, relation, _FEW_ORDERS)


def _renyi_epsilon(kinds, delta: float, relation: str, orders) -> float:
    from dp_accounting import rdp

    total = renyi.run_divergences(kinds, orders, NEIGHBORING_RELATIONS[relation])
    steps = sum(kind.count for kind in kinds)  # a rounded moment must stay a bound
    total = total * (1 + 1e-12) + steps * _STEP_ROUNDING / (np.array(orders) - 1)
    return float(rdp.compute_epsilon(orders, total.tolist(), delta)[0])


# --- Zero concentrated differential privacy -----------------------------------------


def _zcdp_epsilon(kinds: _Kinds, delta: float, relation: str) -> float:
    """The best order of the tight conversion, without amplification by sampling.

    rho-zCDP is Renyi divergence a rho at every order a (Bun and Steinke 2016); the
    conversion is Proposition 12 of Canonne, Kamath and Steinke 2020. If draws may be
    cut, every one counts as cut.
    """
    from scipy import optimize

    halved = ((k.noise_multiplier / (2 if k.truncated else 1), k.count) for k in kinds)
    z = sum(count * z**-2.0 for z, count in halved) ** -0.5
    rho = 0.5 * (NEIGHBORING_RELATIONS[relation] / z) ** 2

    def at(log_excess: float) -> float:
        excess = math.exp(log_excess)
        order = 1 + excess
        return order * rho - math.log(delta * order) / excess + math.log1p(-1 / order)

    best: Any = optimize.minimize_scalar(at, bounds=(-25, 25), method="bounded")
    return max(0.0, float(best.fun))


ACCOUNTANTS = {"pld": _pld_epsilon, "rdp": _rdp_epsilon, "zcdp": _zcdp_epsilon}
