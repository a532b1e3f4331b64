"""What a method from outside is made of: its claim is read off its parts.

A method of somebody else's is labelled by what it is: a chain that clips, draws noise
under the plan it was given and under the key it was given, and nothing before the noise
that is not ours (`dp_ilg.chain` sees to that). Anything else is refused by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import PrivateTransformation

Make = Callable[..., PrivateTransformation]
_PROBE_STEPS = 10_000
_OURS = "dp_ilg."


def parts_of(tx: Any) -> tuple[str, ...]:
    """The parts of a private chain by name, in order.

    Args:
        tx: what `dp_ilg.chain` or a method made.

    Returns:
        Names of the functions that made them.

    Example:
        >>> import dp_ilg, jax, optax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, score_budget=0)
        >>> parts_of(dp_ilg.chain(
        ...     dp_ilg.clip_per_example(1.0),
        ...     dp_ilg.set_layer_importance("uniform", None),
        ...     dp_ilg.add_importance_noise(plan, key=jax.random.key(0)),
        ...     optax.trace(0.9)))
        ('clip_per_example', 'set_layer_importance', 'add_importance_noise', 'trace')
    """
    return tuple(_name(link) for link in _links(tx))


def _links(tx: Any) -> Iterator[Any]:
    inner = getattr(tx, "links", ())
    for link in inner:
        yield from _links(link) if getattr(link, "links", ()) else [link]


def _name(link: Any) -> str:
    """The factory of a transformation, which its update is defined in."""
    name = getattr(link.update, "__qualname__", type(link).__name__)
    return name.partition(".")[0]


def checked(name: str, make: Make) -> Make:
    """A method whose every product is held against its claim.

    Args:
        name: what it is called.
        make: ``(learning_rate, plan, *, key, **options) -> chain``.

    Returns:
        The same function; it raises for what is no private chain under the plan.

    Example:
        >>> import dp_ilg, optax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100)
        >>> bare = checked("bare", lambda rate, plan, *, key: optax.adam(rate))
        >>> bare(0.1, plan, key=None)
        Traceback (most recent call last):
        ValueError: The method bare makes a GradientTransformationExtraArgs, but must \
make a dp_ilg.chain of a clip and of noise: what has no noise of the plan has no \
guarantee.
    """

    @functools.wraps(make)
    def made(
        rate: Any, plan: PrivacyPlan, *, key: Any, **options: Any
    ) -> PrivateTransformation:
        try:
            tx = make(rate, plan, key=key, **options)
        except ValueError:
            raise
        except Exception as error:  # noqa: BLE001 - somebody else's code
            words = " ".join(str(error).split())
            raise ValueError(
                f"The method {name} cannot be made ({type(error).__name__}: {words}); "
                "see docs/guides/extend.md."
            ) from error
        _check(name, tx, plan)
        return tx

    return made


def _check(name: str, tx: Any, plan: PrivacyPlan) -> None:
    links = list(_links(tx))
    roles = [getattr(link, "role", "") for link in links]
    private = isinstance(tx, PrivateTransformation) and tx.role == "private"
    if not (private and {"clip", "noise"} <= {*roles}):
        raise ValueError(
            f"The method {name} makes a {type(tx).__name__}, but must make a "
            "dp_ilg.chain of a clip and of noise: what has no noise of the plan has no "
            "guarantee."
        )
    last = roles.index("noise")
    theirs = [t for t in links[: last + 1] if not t.update.__module__.startswith(_OURS)]
    if theirs:
        raise ValueError(
            f"The method {name} puts {_name(theirs[0])} before the noise, which is "
            "none of dp_ilg's; what touches raw gradients may void the guarantee, so "
            "put it behind add_importance_noise."
        )
    others = {p for link in links if (p := getattr(link, "plan", None))} - {plan}
    if others:
        (other, *_) = others
        raise ValueError(
            f"The method {name} draws noise for the plan {other.digest()}, but was "
            f"given {plan.digest()}, which is the one that is accounted; pass it on."
        )


def spends_scores(name: str, make: Make, options: dict[str, Any]) -> bool:
    """Whether a method from outside spends the plan's score budget.

    It is made twice for a plan of no run, under two keys, and what it is made of is
    looked at; nothing is drawn.

    Args:
        name: what it is called.
        make: what makes it, already `checked`.
        options: its options.

    Returns:
        True if a part of it draws noise for scores.

    Raises:
        ValueError: for whatever it refuses, and for noise that does not follow the key
            it is given.

    Privacy: noise under a key of the method's own would be the same in every run, and
    known to whoever reads its code.
    """
    with jax.ensure_compile_time_eval():  # the keys are known, traced or not
        made = [_probed(make, jax.random.key(seed), options) for seed in (0, 1)]
        keys = [[_words(t.key) for t in _links(tx) if _draws(t)] for tx in made]
    if any(one == other for one, other in zip(*keys, strict=True)):
        raise ValueError(
            f"The method {name} draws noise under a key of its own; use the one it is "
            "given, so that every run has its own noise."
        )
    return any(link.role == "score" for link in _links(made[0]) if _draws(link))


def clip_mode_of(make: Make, options: dict[str, Any]) -> Any:
    """The clip mode of a method from outside, as its clip says it.

    Args:
        make: what makes it, already `checked`.
        options: its options.

    Returns:
        The `dp_ilg.clipping.modes.ClipMode`.

    Raises:
        ValueError: for whatever the method refuses.
    """
    with jax.ensure_compile_time_eval():
        tx = _probed(make, jax.random.key(0), options)
    (clip,) = [link for link in _links(tx) if getattr(link, "role", "") == "clip"]
    return clip.facts.clip_mode


def _probed(make: Make, key: Any, options: dict[str, Any]) -> PrivateTransformation:
    """For a plan with score budget; for one without, if that is refused."""
    facts: dict[str, Any] = dict(num_examples=1000, batch_size=100, delta=1e-5)
    facts |= dict(num_steps=_PROBE_STEPS, l2_clip_norm=1.0)
    stages = ((_PROBE_STEPS, 1.0),)
    try:
        plan = PrivacyPlan(**facts, stages=stages, score_budget=0.01)
        return make(0.1, plan, key=key, **options)
    except ValueError:
        plan = PrivacyPlan(**facts, stages=stages, score_budget=0.0)
        return make(0.1, plan, key=key, **options)


def _draws(link: Any) -> bool:
    return getattr(link, "plan", None) is not None and link.key is not None


def _words(key: Any) -> bytes:
    return np.asarray(jax.random.key_data(key)).tobytes()
