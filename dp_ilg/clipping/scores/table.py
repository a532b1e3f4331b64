"""The table of scores, and how a name or a function becomes one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from dp_ilg import validation
from dp_ilg.clipping.scores.statistics import Statistics
from dp_ilg.geometry.groups import nonzero, weighted_norm
from dp_ilg.registry.lookup import resolve, table


@dataclasses.dataclass(frozen=True)
class Score:
    """A score of one example: how important it finds each group.

    Attributes:
        function: ``(statistics) -> vector [groups]`` of one example; pure, in JAX.
            What exceeds norm 1 is scaled to 1, and what is not finite counts as 0.
        reads_release: whether it reads ``statistics.release``, the last released
            gradient, which the chain then keeps.
        name: for messages.
        of_slack: whether `dp_ilg.clipping.scores.slack` sums what the clip leaves free
            in place of the function.

    Privacy: one example moves the sum of scores by at most 1 in L2 whatever the
    function does, as long as it reads this example, constants and earlier releases
    alone. A function that reads other private data is not seen through.

    Example:
        >>> flat = Score(lambda one: jnp.ones_like(one.norms))
        >>> str(flat)
        'a function'
    """

    function: Callable[[Statistics], Any]
    reads_release: bool = False
    name: str = "a function"
    of_slack: bool = False

    def __call__(self, statistics: Statistics) -> Any:
        """The score of one example."""
        return self.function(statistics)

    def __str__(self) -> str:
        return self.name if self.name == "a function" else repr(self.name)


def unit_vector(values: Array) -> Array:
    """Values over their L2 norm; zeros where all are 0.

    Example:
        >>> [round(float(x), 4) for x in unit_vector(jnp.array([3.0, 4.0]))]
        [0.6, 0.8]
    """
    length = weighted_norm(values, jnp.ones_like(values))
    return jnp.where(length > 0, values / jnp.where(length > 0, length, 1), 0)


def l2_shares(one: Statistics) -> Array:
    """Group norms over the gradient's norm: a vector of norm 1.

    Example:
        >>> one = Statistics(jnp.array([3.0, 4.0]), jnp.ones(2), inner=None)
        >>> [round(float(x), 2) for x in l2_shares(one)]
        [0.6, 0.8]
    """
    return unit_vector(one.norms)


def l1_shares(one: Statistics) -> Array:
    """Group norms over their sum: shares that add up to 1, of norm at most 1.

    Example:
        >>> one = Statistics(jnp.array([1.0, 3.0]), jnp.ones(2), inner=None)
        >>> l1_shares(one).tolist()
        [0.25, 0.75]
    """
    relative = one.norms / nonzero(jnp.max(one.norms))
    total = jnp.sum(relative)
    return jnp.where(total > 0, relative / jnp.where(total > 0, total, 1), 0)


def gradient_times_weight(one: Statistics) -> Array:
    """How much the example's loss changes when a group is scaled, over all groups.

    ``|<g^j, w^j>|``, divided by the norm of these numbers.

    Example:
        >>> one = Statistics(jnp.ones(2), jnp.ones(2),
        ...     inner=lambda tree: jnp.array([-3.0, 4.0]), _params=())
        >>> [round(float(x), 2) for x in gradient_times_weight(one)]
        [0.6, 0.8]

    Reference: Molchanov et al. 2019 (importance of parameters by Taylor expansion).
    """
    return unit_vector(jnp.abs(one.inner(one.params)))


def around_the_mean(one: Statistics) -> Array:
    """What of a group's gradient is not along the last release, over the whole norm.

    The last release stands for the mean's direction: with ``d`` it, group by group
    ``sqrt(||g||^2 - <g, d>^2 / ||d||^2)``, divided by the norm of the whole gradient.

    Example:
        >>> release = {"a": jnp.array([1.0, 0.0])}
        >>> one = Statistics(jnp.array([5.0]), jnp.ones(1),
        ...     inner=lambda tree: jnp.array([3.0]), lengths=lambda tree: jnp.ones(1),
        ...     _release=release)
        >>> [round(float(x), 2) for x in around_the_mean(one)]
        [0.8]
    """
    length = one.lengths(one.release)
    along = one.inner(one.release) / jnp.where(length > 0, length, 1)
    part = jnp.where(length > 0, along, 0)
    scale = nonzero(jnp.max(one.norms))
    rest = jnp.square(one.norms / scale) - jnp.square(part / scale)
    whole = weighted_norm(one.norms / scale, jnp.ones_like(one.norms))
    return jnp.sqrt(jnp.maximum(rest, 0)) / nonzero(whole)


SCORES: dict[str, Score] = table(
    "score",
    {
        "l2": Score(l2_shares, name="l2"),
        "l1": Score(l1_shares, name="l1"),
        "weight": Score(gradient_times_weight, name="weight"),
        "signal": Score(around_the_mean, reads_release=True, name="signal"),
    },
)


def as_score(score: Any) -> Score:
    """Reads a score: a function of one example's statistics, or a name.

    Args:
        score: a `Score`, a function ``(statistics) -> vector [groups]``, a name of
            `SCORES`, of an entry point of ``dp_ilg.scores``, or
            ``package.module:name`` or ``./file.py:name``.

    Returns:
        The score.

    Raises:
        ValueError: for anything else.

    Example:
        >>> as_score("l1") is SCORES["l1"]
        True
        >>> as_score(3)
        Traceback (most recent call last):
        ValueError: score is 3, but must be one of ['l1', 'l2', 'signal', 'weight'] or \
a function (statistics) -> vector.
    """
    if isinstance(score, str):
        score = resolve("score", score, SCORES, "score")
    if isinstance(score, Score):
        return score
    if callable(score):
        return Score(score)
    raise ValueError(
        f"score is {validation.shown(score)}, but must be one of {sorted(SCORES)} or a "
        "function (statistics) -> vector."
    )


def agreed_score(geometry: Any, given: Score | None) -> Score:
    """The score of a clip, said by the chain, by the call, or by both alike.

    Args:
        geometry: of the clip, with the facts of the chain it comes from, if any.
        given: what the call itself says, or None.

    Returns:
        The score; "l2" where nobody says one.

    Raises:
        ValueError: if the two say different scores.

    Example:
        >>> import dp_ilg
        >>> agreed_score(dp_ilg.Geometry.uniform({"w": jnp.zeros(2)}), None).name
        'l2'
    """
    said = getattr(getattr(geometry, "facts", None), "score", None)
    if said is not None and given is not None and said != given:
        raise ValueError(other_score(given, said))
    return said or given or SCORES["l2"]


def other_score(own: Score, said: Score) -> str:
    """The sentence for sums of another score than the chain releases."""
    return (
        f"score is {own} in clipped_grad, but {said} in the chain; say it in one "
        "place, the chain, and leave it out of clipped_grad."
    )
