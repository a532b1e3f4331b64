"""What the sections of a configuration mean: schedule, rate, plan and optimizer."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax

import dp_ilg
from dp_ilg.accounting import schedules
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import PrivateTransformation
from dp_ilg.baselines.table import Baseline, baseline
from dp_ilg.clipping.adding.metric_sums import Metric
from dp_ilg.experiments.config.fields import given
from dp_ilg.experiments.config.schema import (
    Config,
    LearningRateConfig,
    OptimizerConfig,
    PrivacyConfig,
    ScheduleConfig,
)
from dp_ilg.geometry import layers
from dp_ilg.optimizers.averaging import average_iterates
from dp_ilg.optimizers.sources import knowing
from dp_ilg.projection.factor_pca import factor_releases


def build_schedule(chosen: ScheduleConfig) -> Any:
    """Makes the noise schedule of a configuration.

    Args:
        chosen: a name, of one from outside too, and its parameters.

    Returns:
        A schedule, as `dp_ilg.plan_privacy` takes it.

    Raises:
        ValueError: for an unknown schedule or parameter, or a missing one.

    Example:
        >>> build_schedule(ScheduleConfig("linear", end=0.5)).parameters
        (0.5,)
    """
    return schedules.as_schedule(chosen.name, **chosen.options())


def learning_rate(config: LearningRateConfig, peak: Any, num_steps: int) -> Any:
    """Makes the learning rate of a configuration: a number or an Optax schedule.

    Args:
        config: the shape.
        peak: the learning rate after the warm-up; may be traced.
        num_steps: length of the run.

    Returns:
        What Optax takes as ``learning_rate``.

    Raises:
        ValueError: for a warm-up as long as the run.

    Example:
        >>> rate = learning_rate(LearningRateConfig("linear", 10), 1.0, 110)
        >>> [round(float(rate(step)), 2) for step in (0, 5, 10, 60, 110)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    rest = num_steps - config.warmup_steps
    if rest < 1:
        raise ValueError(
            f"optimizer.learning_rate_schedule.warmup_steps is {config.warmup_steps}, "
            f"but must be below privacy.num_steps = {num_steps}."
        )
    bodies = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.end),
        "linear": lambda: optax.linear_schedule(peak, peak * config.end, rest),
    }
    if not config.warmup_steps:
        return peak if config.name == "constant" else bodies[config.name]()
    warm = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warm, bodies[config.name]()], [config.warmup_steps])


def method_options(config: Config) -> dict[str, Any]:
    """The options of the method that a configuration changes from their defaults.

    Args:
        config: the run; its method is a row or one from outside.

    Returns:
        Keyword arguments for the row, without layers.

    Raises:
        ValueError: for an option that the method does not have.

    Example:
        >>> chosen = OptimizerConfig(method="dp_sgd", momentum=0.9)
        >>> method_options(Config(optimizer=chosen))
        {'momentum': 0.9}
    """
    row = baseline(config.optimizer.method)
    known = {*row.options()}
    if not row.name.startswith(("dp_adam_ilg", "dp_sgd_ilg")):
        known -= {"floor"}  # there it is a gradient's entry, not a share
    found = {"optimizer": _changed(config.optimizer), "privacy": {}}
    if config.privacy.clip_mode != PrivacyConfig.clip_mode:
        found["privacy"] = {"clip_mode": config.privacy.clip_mode}
    for section, options in found.items():
        for name in options:
            if name not in known:
                raise ValueError(
                    f"optimizer.method is {row.name}, which has no option {name}; "
                    f"leave {section}.{name} out."
                )
    return found["optimizer"] | found["privacy"] | _source(config)


def _source(config: Config) -> dict[str, Any]:
    """The prior or probe that the file describes, if it asks for one."""
    sections = {"prior": config.prior, "probe": config.probe}
    for name, section in sections.items():
        if section != type(section)() and config.optimizer.source != name:
            raise ValueError(
                f"The section {name} is for optimizer.source = {name!r}, but that is "
                f"{config.optimizer.source!r}; set it, or leave the section out."
            )
    chosen = sections.get(config.optimizer.source)
    return {} if chosen is None else {"source": chosen.build()}


def source_of_importance(chosen: OptimizerConfig) -> str:
    """Where a run's weights come from; "none" where nothing is weighted.

    Example:
        >>> source_of_importance(OptimizerConfig(importance="uniform"))
        'none'
    """
    weighted = chosen.method.startswith(("dp_adam_ilg", "dp_sgd_ilg"))
    rule = chosen.method.partition("_ilg_")[2] or chosen.importance
    described = chosen.source in ("prior", "probe")
    if not weighted or (rule == "uniform" and not described):
        return "none"
    return chosen.source


def _changed(chosen: OptimizerConfig) -> dict[str, Any]:
    """What differs from the defaults, but for what every method has."""
    every = "learning_rate learning_rate_schedule method layers blocks frozen average"
    usual = {f.name: f.default for f in dataclasses.fields(chosen)}
    values = given(chosen, *every.split())
    return {k: v for k, v in values.items() if v != usual[k]}


def make_plan(config: Config, num_examples: int) -> PrivacyPlan:
    """Calibrates the plan of a configuration.

    Args:
        config: the run; its method is a row or one from outside.
        num_examples: to train on.

    Returns:
        The plan.

    Raises:
        ValueError: if no noise reaches epsilon, or a number does not fit.

    Example:
        >>> make_plan(Config(), 1437).num_steps
        200
    """
    privacy = config.privacy
    row = baseline(config.optimizer.method)
    scored = row.spends_scores(**method_options(config))
    return dp_ilg.plan_privacy(
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        num_examples=num_examples,
        batch_size=privacy.batch_size,
        num_steps=privacy.num_steps,
        schedule=build_schedule(privacy.schedule),
        score_budget=privacy.score_budget if scored else 0.0,
        l2_clip_norm=privacy.l2_clip_norm,
        accountant=privacy.accountant,
        neighboring_relation=privacy.neighboring_relation,
        num_stages=privacy.num_stages,
        max_batch_size=privacy.max_batch_size,
        bands=privacy.bands,
        prior_releases=_prior(config),
        exact_noise=privacy.noise == "exact",
        metric_budget=config.metrics.budget if config.metrics.release else 0.0,
    )


def _prior(config: Config) -> tuple[tuple[str, float], ...]:
    """What is released before the first step."""
    sigma = config.data.projection.noise_multiplier
    return () if sigma is None else factor_releases(sigma)


def make_optimizer(
    config: Config,
    plan: PrivacyPlan,
    key: Any,
    peak: Any = None,
    metrics: Mapping[str, Metric] | None = None,
    known: Mapping[str, Any] | None = None,
) -> PrivateTransformation:
    """Makes the optimizer of a configuration.

    Args:
        config: the run.
        plan: its plan.
        key: PRNG key, secret.
        peak: the learning rate, possibly traced; by default the configuration's.
        metrics: name -> `dp_ilg.Metric`, to be released; None for none.
        known: what a probe must know: fields of `dp_ilg.Probe`.

    Returns:
        The private optimizer.

    Raises:
        ValueError: for whatever the method refuses.

    Privacy: the plan's; a learning rate has no part in it.

    Example:
        >>> import jax
        >>> tx = make_optimizer(Config(), make_plan(Config(), 1437), jax.random.key(0))
        >>> callable(tx.geometry)
        True
    """
    chosen = config.optimizer
    peak = chosen.learning_rate if peak is None else peak
    rate = learning_rate(chosen.learning_rate_schedule, peak, plan.num_steps)
    row = baseline(chosen.method)
    options = _groups(row, chosen) | method_options(config)
    if "source" in options:
        options["source"] = knowing(options["source"], **known or {})
    if metrics:
        options |= {"metrics": metrics, "smooth_steps": config.metrics.smooth_steps}
    tx = row(rate, plan, key=key, **options)
    return average_iterates(tx, chosen.average) if chosen.average else tx


def _groups(row: Baseline, chosen: OptimizerConfig) -> dict[str, Any]:
    """The grouping as an option; a method from outside need not have it."""
    if "layers" in row.options():
        return {"layers": layering(chosen)}
    for name in ("layers", "blocks", "frozen"):
        if getattr(chosen, name) != getattr(OptimizerConfig, name):
            raise ValueError(
                f"optimizer.method is {row.name}, which has no option layers; leave "
                f"optimizer.{name} out, or add layers to its arguments."
            )
    return {}


def layering(chosen: OptimizerConfig) -> Any:
    """How the parameters of a configuration are grouped.

    Args:
        chosen: the section "optimizer".

    Returns:
        What every private transformation takes as ``layers``.

    Raises:
        ValueError: for blocks that cannot be.

    Example:
        >>> import jax.numpy as jnp
        >>> from dp_ilg.geometry.layers import group
        >>> chosen = layering(OptimizerConfig(layers="leaf", frozen=("b",)))
        >>> group({"a": jnp.ones(2), "b": jnp.ones(3)}, chosen).names
        ('a',)
    """
    cuts = [
        layers.blocks(b.path, axis=b.axis, edges=b.edges, num_blocks=b.num_blocks)
        for b in chosen.blocks
    ]
    by = {"module": layers.by_module, "leaf": layers.by_leaf}[chosen.layers]
    return by(*cuts, frozen=chosen.frozen)
