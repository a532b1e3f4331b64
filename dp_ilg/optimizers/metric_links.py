"""What a chain must know of the metrics it releases: where, and that they are paid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import ClippedGrad, PrivateTransformation
from dp_ilg.clipping.adding.metric_sums import Metric
from dp_ilg.noise.add_noise import fresh_key
from dp_ilg.optimizers.metrics import METRIC_TAG, release_metrics


def metric_links(
    plan: PrivacyPlan,
    metrics: Mapping[str, Metric] | None,
    key: Any,
    smooth_steps: Any = 25,
) -> list[PrivateTransformation]:
    """The links that a chain has for its metrics: one, or none.

    Args:
        plan: of the chain.
        metrics: name -> `Metric`; None or empty for none.
        key: that of the whole optimizer; the metrics' own is made from it.
        smooth_steps: as in `release_metrics`.

    Returns:
        A list for `dp_ilg.chain`, to stand between clip and noise.

    Raises:
        ValueError: as `release_metrics`.
        TypeError: as `release_metrics`.

    Privacy: as `release_metrics`.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5,
        ...     num_examples=100, batch_size=10, num_steps=4)
        >>> metric_links(plan, None, None)
        []
    """
    if not metrics:
        return []
    own = jax.random.fold_in(fresh_key(validation.key("key", key)), METRIC_TAG)
    return [release_metrics(plan, metrics, key=own, smooth_steps=smooth_steps)]


def metrics_place(transformations: Sequence[Any]) -> int | None:
    """Which link of a chain tells released metrics; None where none does.

    Raises:
        ValueError: for two of them, or one behind the noise.

    Example:
        >>> metrics_place([]) is None
        True
    """
    readers = [getattr(t, "metrics", None) for t in transformations]
    found = [k for k, reader in enumerate(readers) if reader is not None]
    if len(found) > 1:
        raise ValueError(
            f"The chain has {len(found)} release_metrics, each of which would spend "
            "the whole metric budget; give one of them all metrics."
        )
    roles = [getattr(t, "role", "") for t in transformations]
    if "metric" in roles and "noise" in roles[: roles.index("metric")]:
        raise ValueError(
            "release_metrics must stand before add_importance_noise, behind which "
            "there is nothing but the released gradient."
        )
    return found[0] if found else None


def metrics_reader(
    transformations: Sequence[Any], told: int | None
) -> Callable[[Any], dict[str, Any]] | None:
    """Maps a chain's state to its released metrics; None where there are none.

    Args:
        transformations: of the chain.
        told: from `metrics_place`.

    Example:
        >>> metrics_reader([], None) is None
        True
    """
    if told is None:
        return None
    return lambda state: transformations[told].metrics(state[told])


def check_budget_spent(transformations: Sequence[Any], told: int | None) -> None:
    """Raises for a metric budget that nothing would be released for.

    Args:
        transformations: of a chain.
        told: from `metrics_place`.

    Raises:
        ValueError: naming what to do.

    Example:
        >>> check_budget_spent([], None)
    """
    plans = [t.plan for t in transformations if getattr(t, "plan", None)]
    if told is None and any(plan.metric_budget for plan in plans):
        raise ValueError(
            f"The plan's metric_budget is {plans[0].metric_budget:g}, but the chain "
            "releases no metrics; give the optimizer metrics=, put "
            "dp_ilg.release_metrics before the noise, or plan with metric_budget=0."
        )


def check_all_told(clipped: ClippedGrad, told: int | None) -> None:
    """Raises for sums of metrics that nothing would release.

    Args:
        clipped: what comes before the noise.
        told: from `metrics_place`.

    Raises:
        ValueError: naming what to do.

    Example:
        >>> geometry = object()
        >>> check_all_told(ClippedGrad({}, 0.0, geometry, 1.0), None)
    """
    if clipped.metrics is not None and told is None:
        names = ", ".join(name for name, *_ in clipped.metrics.facts)
        raise ValueError(
            f"The clipped sum has the metrics {names}, but the optimizer releases "
            "none; give it metrics= (and the plan a metric_budget), or leave them out "
            "of clipped_grad."
        )
