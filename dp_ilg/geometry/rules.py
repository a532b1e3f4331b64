"""Rules from layer importance to weights: a table of exponents, or any function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dp_ilg import validation
from dp_ilg.registry.lookup import resolve, table

Rule = Callable[[Float[Array, " groups"], Float[Array, " groups"]], Any]
_USUAL = "min_noise_energy"


def power_rule(p: float, q: float) -> Rule:
    """Weights ``I_j^p n_j^-q``; see the table in docs/idea.md.

    Args:
        p: exponent of the importance.
        q: exponent of the layer's size.

    Returns:
        A rule ``(importance [groups], sizes [groups]) -> weights [groups]``.

    Example:
        >>> import jax.numpy as jnp
        >>> power_rule(1, 0.5)(jnp.array([2.0]), jnp.array([4.0])).tolist()
        [1.0]
    """
    return lambda importance, sizes: importance**p * sizes**-q


RULES: dict[str, Rule] = table(
    "rule",
    {
        "uniform": power_rule(0, 0),
        "paper": power_rule(1, 0),
        "min_noise_energy": power_rule(1 / 2, 1 / 4),
        "equal_snr": power_rule(1, 1 / 2),
        "sqrt_share": power_rule(1 / 2, 0),
    },
)


@dataclasses.dataclass(frozen=True)
class TopK:
    """A rule that keeps the most important groups and drops the others; see `top_k`.

    Attributes:
        count: how many are kept.
        rule: from importance to the weights of those that are kept, as `as_rule` reads
            it.

    Example:
        >>> str(TopK(4, "paper"))
        'top_k:4:paper'
    """

    count: int
    rule: Any = _USUAL
    drops: ClassVar[bool] = True

    def __call__(
        self, importance: Float[Array, " groups"], sizes: Float[Array, " groups"]
    ) -> Float[Array, " groups"]:
        """Weights of the kept groups; exactly 0 for the others."""
        groups = importance.shape[-1]
        raw = jnp.asarray(as_rule(self.rule)(importance, sizes))
        best = jax.lax.top_k(importance, self.count)[1]
        kept = jnp.zeros(groups, bool).at[best].set(True)
        return jnp.where(kept, jnp.maximum(raw, jnp.finfo(raw.dtype).tiny), 0)

    def __str__(self) -> str:
        return f"top_k:{self.count}:{self.rule}"


def top_k(k: int, rule: str | Rule = _USUAL) -> TopK:
    """Keeps the k most important groups of a step; the others are dropped for it.

    A dropped group has weight 0: its gradients count for neither the clip nor the sum,
    no noise is drawn into it, and its parameters and Adam's moments stay as they are.
    So noise is spent on the groups that carry the gradient. Scores are released of all
    groups at every step, dropped ones too, and read from unweighted norms: a group
    comes back as soon as its average score is among the k best. Of groups that tie (at
    the scorer's floor, say) the earlier one is kept.

    Args:
        k: how many groups are kept, at most all.
        rule: from importance to the weights of the kept groups.

    Returns:
        A rule for ``importance=``. Configurations write ``"top_k:4"``, or
        ``"top_k:4:paper"`` with another rule.

    Raises:
        ValueError: unless k is a whole number of at least 1, and for an unknown rule.

    Privacy: which groups are kept follows from earlier releases alone. Dropping is a
    projection chosen before the step: the example's kept part is clipped to C and
    noised as ever, and what is released of a dropped group is a constant.

    Example:
        >>> import jax.numpy as jnp
        >>> rule = top_k(2, "paper")
        >>> rule(jnp.array([3.0, 1.0, 2.0]), jnp.ones(3)).tolist()
        [3.0, 0.0, 2.0]

    Reference: ours.
    """
    validation.whole("k of top_k", k)
    as_rule(rule)
    return TopK(int(k), rule)


MAKERS: dict[str, Callable[..., Rule]] = {"top_k": top_k}
"""What ``name:number`` or ``name:number:rule`` stands for, by name."""


def drops(rule: Rule) -> bool:
    """Whether a weight of 0 that a rule gives means that the group is dropped.

    Example:
        >>> drops(top_k(2)), drops(RULES["paper"])
        (True, False)
    """
    return bool(getattr(rule, "drops", False))


def of_entries(rule: Rule) -> Rule:
    """The rule by which entries of a leaf are scaled: the one inside a dropping rule.

    Groups are dropped, entries are not.

    Example:
        >>> of_entries(top_k(2, "paper")) is RULES["paper"]
        True
    """
    return as_rule(rule.rule) if isinstance(rule, TopK) else rule


def inner_name(name: str) -> str:
    """Which rule of a table, entry point or file a name is made of.

    Args:
        name: of a rule, perhaps of one that `MAKERS` makes.

    Returns:
        The name itself, or that of the rule inside.

    Raises:
        ValueError: in one sentence, for a number that does not fit.

    Example:
        >>> inner_name("top_k:4:paper"), inner_name("top_k:4"), inner_name("paper")
        ('paper', 'min_noise_energy', 'paper')
    """
    found = _split(name)
    return name if found is None else inner_name(found[2])


def _split(name: str) -> tuple[str, int, str] | None:
    """Maker, number and inner rule of a name, or None for an ordinary name."""
    head, _, rest = name.partition(":")
    if head not in MAKERS:
        return None
    number, _, inner = rest.partition(":")
    if not (number.isascii() and number.isdigit() and int(number) >= 1):
        raise ValueError(
            f"importance is {name!r}, but {head} needs a whole number of groups of at "
            f"least 1, as {head}:4 or {head}:4:paper."
        )
    return head, int(number), inner or _USUAL


def as_rule(rule: str | Rule) -> Rule:
    """Reads a rule: a function, or the name of one.

    Args:
        rule: a function ``(importance, sizes) -> weights``, a name of `RULES`, of an
            entry point of ``dp_ilg.rules``, ``package.module:name`` or
            ``./file.py:name``, or ``top_k:4``, or ``top_k:4:`` and one of these.

    Returns:
        The function.

    Raises:
        ValueError: for anything else.

    Example:
        >>> as_rule("uniform") is RULES["uniform"]
        True
        >>> as_rule("math:sqrt")
        Traceback (most recent call last):
        ValueError: importance is 'math:sqrt', which is a builtin_function_or_method, \
but a rule is a function (importance, sizes) -> weights; see docs/guides/extend.md.
    """
    if isinstance(rule, str):
        found = _split(rule)
        if found is None:
            return resolve("rule", rule, RULES, "importance")
        maker, number, inner = found
        return MAKERS[maker](number, inner)
    if callable(rule):
        return rule
    raise ValueError(
        f"importance is {validation.shown(rule)}, but must be one of "
        f"{sorted(RULES)} or a function."
    )


def check_rule(rule: Rule, sizes: tuple[int, ...]) -> None:
    """Tries a rule on equal importance, outside any trace.

    Args:
        rule: the rule.
        sizes: number of parameters of each layer.

    Raises:
        ValueError: unless it gives one positive finite weight a layer, or, where it
            drops layers, some positive ones and zeros.

    Example:
        >>> check_rule(RULES["paper"], (10, 3))
    """
    if isinstance(rule, TopK) and rule.count > len(sizes):
        raise ValueError(
            f"top_k keeps {rule.count} groups, but the model has {len(sizes)}; keep "
            "fewer, or cut the parameters into more with layers=."
        )
    with jax.ensure_compile_time_eval():
        trial = _tried(rule, sizes)
        good = trial.shape == (len(sizes),)
        fine = (trial > 0) | ((trial == 0) & drops(rule))
        good = good and bool(jnp.all(jnp.isfinite(trial) & fine) & jnp.any(trial > 0))
        shown = trial.tolist()
    if not good:
        raise ValueError(
            f"The importance rule gave {shown} for {len(sizes)} layers, but must give "
            "one positive finite weight each."
        )


def _tried(rule: Rule, sizes: tuple[int, ...]) -> Array:
    """What a rule makes of equal importance; a mistake in it is one sentence."""
    try:
        found = rule(jnp.ones(len(sizes)), jnp.array(sizes, jnp.float32))
        return jnp.asarray(found)
    except Exception as error:  # noqa: BLE001 - the user's own code
        words = " ".join(str(error).split())
        name = getattr(rule, "__name__", type(rule).__name__)
        raise ValueError(
            f"The importance rule {name} cannot be used ({type(error).__name__}: "
            f"{words}); a rule is a function (importance [groups], sizes [groups]) -> "
            "weights [groups]."
        ) from error
