"""An audit of anybody's training step: what one example changes, and what hides it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dp_ilg import validation
from dp_ilg.auditing.step_checks import (
    NOISE_CHECKS,
    STEP_CHECKS,
    Evidence,
    StepFinding,
    claimed,
)
from dp_ilg.auditing.step_scene import Scene, scene_of
from dp_ilg.auditing.step_worlds import (
    Worlds,
    is_key,
    rekeyed,
    runner_of,
    takes_mask,
)

_FEWEST = 128


@dataclasses.dataclass(frozen=True)
class StepAudit:
    """What an audit of a step found.

    Attributes:
        findings: one a check.
        claim: epsilon of the plan's first step, for an example that is in its batch, at
            the plan's delta.
        lower_bound: on the same at delta 0.1, from trials; 0 where none were made.
        trials: how many keys were tried.

    Example:
        >>> found = StepAudit((StepFinding("masked rows", "unseen", "unseen", True),),
        ...     claim=4.4, lower_bound=0.0, trials=512)
        >>> found.verdict
        'not refuted'
    """

    findings: tuple[StepFinding, ...]
    claim: float
    lower_bound: float
    trials: int

    @property
    def verdict(self) -> str:
        """Whether some check fails: "refuted" or "not refuted"."""
        return "refuted" if self.failed else "not refuted"

    @property
    def failed(self) -> list[str]:
        """The names of the checks that fail."""
        return [x.check for x in self.findings if x.holds is False]

    def __str__(self) -> str:
        """A table."""
        words = {True: "holds", False: "FAILS", None: "note"}
        width = max(len(x.check) for x in self.findings)
        rows = [
            f"{x.check:<{width}}  {words[x.holds]}  {x.found} (asked: {x.limit})"
            for x in self.findings
        ]
        return "\n".join([*rows, f"The plan's claim is {self.verdict}."])


def audit_step(
    step: Any,
    init: Any,
    example: Any,
    plan: Any,
    *,
    others: Any = None,
    params_of: Callable[[Any], Any] | None = None,
    trials: int = 512,
    seed: int = 0,
) -> StepAudit:
    """Tries to refute that a training step has the noise and the clip a plan claims.

    The step runs with and without one example, under the same keys: the difference is
    what the example moves, exactly. It runs on one batch under many keys: that is the
    noise. Their ratio must be at most ``1 / plan.noise_multipliers[t]``, whatever
    learning rate, batch size or optimizer scales both.

    Args:
        step: ``(state, batch, is_padding_example) -> state``, or without the mask;
            pure, with all randomness from keys in the state. The batch has the form of
            `example` with a leading axis. Or what `dp_ilg.private_training` returned;
            `init` is then the model.
        init: a state with typed PRNG keys (``jax.random.key``) or raw ``uint32[2]``
            ones in it, which the audit changes, or a function from a key to a state
            whose parameters are the same under every key.
        example: one example, without batch axis, that the model gets wrong. Its
            floating-point entries are also tried 30 and 1000 times as large.
        plan: the `dp_ilg.PrivacyPlan` that the step claims to follow.
        others: examples with a leading axis to stand beside it; None makes four of it.
        params_of: maps a state to what an adversary sees; None for all of it but keys.
        trials: steps under other keys, at least 128. More see smaller faults.
        seed: of the others and of the keys.

    Returns:
        A `StepAudit`; ``print`` shows a table.

    Raises:
        TypeError: for a step that is no function.
        ValueError: for a state without keys, an example and others of different form,
            too few trials, a plan without noise, or a step in whose state nothing is a
            sum plus noise, if no check fails before.

    Privacy: use examples that are public or made up: the table describes the step, but
        what it is run on is seen in the clear. "Not refuted" is no proof; it says that
        this example, at the first two steps, is hidden as the plan says. A check with
        chance in it fails a sound step with probability 1e-6.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp, optax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=10,
        ...     num_examples=1000, batch_size=100)
        >>> tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(0))
        >>> loss = lambda p, x: jnp.square(p["w"] @ x - 1)
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=plan.l2_clip_norm)
        >>> def step(state, batch, is_padding_example):
        ...     params, state = state
        ...     total = grad_fn(params, batch, geometry=tx.geometry(state),
        ...         is_padding_example=is_padding_example)
        ...     updates, state = tx.update(total, state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> params = {"w": jnp.zeros(8)}
        >>> found = audit_step(step, (params, tx.init(params)), jnp.ones(8), plan,
        ...     trials=128)
        >>> found.verdict
        'not refuted'

    Reference: Nasr et al. 2023, "Tight auditing of differentially private machine
    learning"; Jagielski, Ullman, Oprea 2020.
    """
    if hasattr(step, "auditable"):
        step, init = step.auditable(init)
    if not callable(step):
        raise TypeError(
            f"step is {type(step).__name__}, but must be a function (state, batch, "
            "is_padding_example) -> state, or what private_training returned."
        )
    validation.whole("trials", trials, _FEWEST)
    if not np.all(np.asarray(plan.noise_multipliers) > 0):
        raise ValueError("The plan has a step without noise, so it claims nothing.")
    scene = scene_of(example, others, takes_mask(step), seed)
    stages = _stages(step, init, params_of or (lambda state: state), scene, seed)
    evidence = Evidence(stages[: plan.num_steps], plan, int(trials))
    findings = [check(evidence) for check in STEP_CHECKS.values()]
    bound = 0.0
    if evidence.measurable:
        findings += [check(evidence) for check in NOISE_CHECKS.values()]
        bound = evidence.bound.epsilon
    elif all(x.holds is not False for x in findings):
        raise ValueError(
            "No part of the state is a sum plus noise that can be read, so that "
            "audit_step can measure neither; put optax.sgd(1.0) behind the noise for "
            "the audit, or keep the release in the state."
        )
    claim = claimed(plan, plan.delta)
    return StepAudit(tuple(findings), claim, bound, int(trials))


def _stages(
    step: Callable[..., Any],
    init: Any,
    look: Callable[[Any], Any],
    scene: Scene,
    seed: int,
) -> tuple[Worlds, ...]:
    """The worlds of the first step and, if keys can be changed in a state, the next."""
    root = jax.random.key(seed)
    start = init(root) if callable(init) else init
    if not any(is_key(leaf) for leaf in jax.tree.leaves(start)):
        if not callable(init):
            raise ValueError(
                "The state has no PRNG key, so that no other noise can be drawn; keep "
                "a jax.random.key in it, or give init as a function of a key."
            )
        runner = runner_of(step, start, *scene.batch(None))
        begin = lambda number: init(jax.random.fold_in(root, number))  # noqa: E731
        return (Worlds(runner, jax.vmap(begin), look, scene),)
    runner = runner_of(step, start, *scene.batch(None))
    first = Worlds(runner, _from(start, seed), look, scene)
    nobody = scene.batch(None, "empty")
    if not len(nobody[1]):
        return (first,)
    begin = functools.partial(_from, seed=seed, places=_noise_keys(first, start, seed))
    first = dataclasses.replace(first, begin=begin(start))
    second = begin(first.next_state(*nobody))
    return first, Worlds(runner, second, look, scene)


def _noise_keys(worlds: Worlds, start: Any, seed: int) -> frozenset[int] | None:
    """Which keys of a state make noise: those that show where nobody is drawn.

    The others (dropout, augmentation) stay as they are: they belong to the examples.
    """
    leaves = jax.tree.leaves(start)
    nobody = worlds.scene.batch(None, "empty")
    found = []
    for place in (k for k, leaf in enumerate(leaves) if is_key(leaf)):
        begin = _from(start, seed, frozenset([place]))
        own = dataclasses.replace(worlds, begin=begin).outputs(range(2), *nobody)
        if any(not np.array_equal(x[0], x[1], equal_nan=True) for x in own):
            found.append(place)
    return frozenset(found) if found else None


def _from(
    state: Any, seed: int, places: frozenset[int] | None = None
) -> Callable[[Any], Any]:
    """Maps numbers to stacked states, equal but for their keys."""
    seeded = rekeyed(jax.tree.map(jax.numpy.asarray, state), seed)
    return jax.jit(jax.vmap(lambda number: rekeyed(seeded, number, places)))
