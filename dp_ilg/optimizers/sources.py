"""Where importance comes from: a table from a source to the links of a chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dp_ilg.base import PrivateTransformation
from dp_ilg.clipping.scores.table import SCORES, as_score
from dp_ilg.geometry.rules import Rule
from dp_ilg.optimizers.importance import (
    score_layer_importance,
    score_released_gradients,
    set_layer_importance,
)
from dp_ilg.optimizers.kept_release import keep_release
from dp_ilg.optimizers.public.link import probe_importance, silent_groups
from dp_ilg.optimizers.public.prior import Prior, set_prior
from dp_ilg.optimizers.public.probe import Probe
from dp_ilg.optimizers.public.readings import as_reading
from dp_ilg.validation import shown


def release_links(
    source: Any, rule: Rule, key: Any, noise: Any, public: Any, **scored: Any
) -> list[PrivateTransformation]:
    """The noise, and what sets the next geometry before or behind it.

    Args:
        source: "scores", "released", "public", a `Prior` or a `Probe`.
        rule: from importance to weights.
        key: of the scores' noise.
        noise: the `add_importance_noise` of the chain.
        public: importance by layer, for "public".
        **scored: layers, ema_decay, floor and score.

    Returns:
        Links of a chain, in order.

    Raises:
        ValueError: for another source, or a score where none is released.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> noise = dp_ilg.add_importance_noise(plan, key=jax.random.key(0))
        >>> facts = dict(layers="leaf", ema_decay=0.9, floor=0.01, score="signal")
        >>> rule, key = lambda importance, sizes: importance, jax.random.key(1)
        >>> [x.role for x in release_links("scores", rule, key, noise, None, **facts)]
        ['score', 'noise', '']
    """
    plan, score = noise.plan, as_score(scored.pop("score"))
    source, own = as_source(source), []
    if not isinstance(source, str):
        facts = dict(layers=scored["layers"], floor=scored["floor"], public=public)
        own = [LINKS[type(source)](source, rule, facts)]
        source = "scores" if source.spends_scores() else "mapped"
    if source != "scores" and score != SCORES["l2"]:
        raise ValueError(
            f"score is {score}, but source is {source!r}, which releases no score; "
            "leave score out, or take source 'scores'."
        )
    kept = [keep_release()] if score.reads_release else []
    rows: dict[str, Callable[[], list]] = {
        "scores": lambda: [
            *own,
            score_layer_importance(rule, plan, key=key, score=score, **scored),
            noise,
            *kept,
        ],
        "released": lambda: [noise, score_released_gradients(rule, plan, **scored)],
        "public": lambda: [
            set_layer_importance(rule, public, layers=scored["layers"]),
            noise,
        ],
    }
    return [*own, noise] if source == "mapped" else row_of("source", source, rows)


def _prior_link(source: Prior, rule: Rule, facts: dict[str, Any]) -> Any:
    return set_prior(source, rule, layers=facts["layers"], values=facts["public"])


def _probe_link(source: Probe, rule: Rule, facts: dict[str, Any]) -> Any:
    if facts["public"] is not None:
        raise ValueError(
            "public_importance is for source 'public' or a Prior, but the source is a "
            "Probe; leave one of them out."
        )
    how = dict(layers=facts["layers"], floor=facts["floor"])
    return probe_importance(source, rule, **how)


LINKS: dict[type, Callable[[Any, Rule, dict[str, Any]], Any]] = {
    Prior: _prior_link,
    Probe: _probe_link,
}
"""Sources that are values: what link of a chain holds their maps and weights."""


def as_source(source: Any) -> Any:
    """Reads a source of importance: a name, a `Prior` or a `Probe`.

    Args:
        source: what a user passed as ``source=``.

    Returns:
        A name of a row, or the prior or probe.

    Raises:
        ValueError: for anything else, and "prior", which needs vectors.

    Example:
        >>> as_source("probe").depth
        'group'
    """
    if type(source) in LINKS:
        return source
    if not isinstance(source, str):
        raise ValueError(
            f"source is {shown(source)}, but must be 'scores', 'released', 'public', "
            "'probe', a dp_ilg.Prior or a dp_ilg.Probe."
        )
    if source == "prior":
        raise ValueError(
            "source is 'prior', which needs vectors; pass "
            "source=dp_ilg.Prior({leaf: vector})."
        )
    return Probe() if source == "probe" else source


def knowing(source: Any, **facts: Any) -> Any:
    """A source that is told what a run knows: loss, example, classes, tokens.

    Args:
        source: as for `release_links`.
        **facts: fields of `Probe`.

    Returns:
        The same source; a `Probe` with these facts where it has none of its own.

    Example:
        >>> knowing("probe", num_classes=3).num_classes
        3
    """
    source = as_source(source)
    return source if isinstance(source, str) else source.knowing(**facts)


def charges(source: Any) -> bool:
    """Whether a source releases scores, which the plan's score budget pays for.

    Args:
        source: as for `release_links`.

    Returns:
        True for "scores", and for a `Prior` or `Probe` with ``groups="scores"``.

    Example:
        >>> charges("scores"), charges("public")
        (True, False)
    """
    source = as_source(source)
    return source == "scores" if isinstance(source, str) else source.spends_scores()


def silent_in(source: Any, params: Any, layers: Any) -> list[str]:
    """Groups that the source's probe finds no gradient in; none without a probe.

    Args:
        source: as for `release_links`.
        params: public, or released.
        layers: what a group is.

    Returns:
        Names of groups.

    Example:
        >>> silent_in("scores", {}, "module")
        []
    """
    source = as_source(source)
    return silent_groups(source, params, layers) if isinstance(source, Probe) else []


def steps_of(source: Any, *links: Any) -> list[Any]:
    """What stands behind the noise, as the source wants its release read.

    Args:
        source: as for `release_links`.
        *links: of an optimizer.

    Returns:
        The same links, and what a `Prior` or `Probe` puts before or behind them.

    Example:
        >>> steps_of("scores", 1, 2)
        [1, 2]
    """
    source = as_source(source)
    if isinstance(source, str):
        return [*links]
    return as_reading(source.steps).around([*links])


def row_of(name: str, value: Any, table: dict[str, Callable[[], Any]]) -> Any:
    """Makes what a row of a table makes.

    Args:
        name: what the caller calls it.
        value: the row.
        table: functions without arguments, by name.

    Returns:
        What the row's function returns.

    Raises:
        ValueError: for a row that is not there.

    Example:
        >>> row_of("adam", "plain", {"plain": lambda: 3})
        3
    """
    if value not in table:
        raise ValueError(f"{name} is {value!r}, but must be one of {sorted(table)}.")
    return table[value]()
