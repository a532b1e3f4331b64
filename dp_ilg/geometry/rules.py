"""Rules from layer importance to weights: a table of exponents, or any function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dp_ilg import validation
from dp_ilg.registry.lookup import resolve, table

Rule = Callable[[Float[Array, " groups"], Float[Array, " groups"]], Any]


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


def as_rule(rule: str | Rule) -> Rule:
    """Reads a rule: a function, or the name of one.

    Args:
        rule: a function ``(importance, sizes) -> weights``, a name of `RULES`, of an
            entry point of ``dp_ilg.rules``, or ``package.module:name`` or
            ``./file.py:name``.

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
        return resolve("rule", rule, RULES, "importance")
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
        ValueError: unless it gives one positive finite weight a layer.

    Example:
        >>> check_rule(RULES["paper"], (10, 3))
    """
    with jax.ensure_compile_time_eval():
        trial = _tried(rule, sizes)
        good = trial.shape == (len(sizes),)
        good = good and bool(jnp.all(jnp.isfinite(trial) & (trial > 0)))
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
