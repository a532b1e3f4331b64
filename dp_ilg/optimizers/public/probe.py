"""What a probe is: synthetic examples through a network at its released parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from dp_ilg import validation
from dp_ilg.base import Params
from dp_ilg.geometry.groups import Groups
from dp_ilg.geometry.rules import as_rule
from dp_ilg.optimizers.public.generators import (
    Public,
    as_generator,
    made_up,
    shape_of,
)
from dp_ilg.optimizers.public.readings import as_reading
from dp_ilg.optimizers.public.statistics import DEPTHS, Kinds

GROUPS = ("probe", "scores")
_FUNCTIONS = {"loss_fn": "(params, example) -> scalar", "features": "batch -> batch"}


@dataclasses.dataclass(frozen=True, eq=False)
class Probe:
    """Importance from synthetic examples, at the parameters that were released last.

    Pass it as ``source=``. Every so many steps a batch of noise with the outline of the
    data goes through the network, and the gradients of its examples say how long those
    of each group, row, channel or direction are to each other.

    Attributes:
        loss_fn: ``(params, example) -> scalar`` of ONE example. `private_training` and
            ``dp-ilg train`` know it.
        example: shapes and dtypes of ONE example, such as one made of zeros.
        batch: a row of `GENERATORS`: "pink_images", "gaussian", "zipf_tokens",
            "zipf_words"; "auto", which looks at the example; or a function
            ``key -> batch`` of your own.
        depth: "group" (one weight a group), "diagonal" (beside it a scale for every
            input feature, row or channel: along the last two axes of a leaf) or
            "kronecker" (a matrix for each of these two axes, as Shampoo has them).
        every: steps from one probe to the next.
        num_examples: of a probe.
        seed: of the public randomness; the batch of step t follows (seed, t).
        num_classes: labels are drawn evenly below it.
        num_tokens: how many ids there are, for "zipf_tokens".
        damping: added to every mean square, as a part of their mean.
        max_axis: a longer axis gets a scale in place of a matrix.
        rule: from importance to the scale of entries; None takes the optimizer's own.
        groups: where the weights of groups come from: "probe", or "scores" (released
            and charged; not at depth "group").
        steps: what the optimizer is given, as in `dp_ilg.Prior`.
        microbatch_size: examples differentiated at once, at most.
        features: what turns a batch of the generator's into one that the loss takes,
            where the model reads features of its inputs: ``batch -> batch``, traceable.
            `example` is then one of the inputs. None where the loss reads the inputs.

    Raises:
        ValueError: for an unknown depth, generator, rule, reading or source of groups,
            and for numbers out of range.
        TypeError: for a batch, a loss or features that are no function.

    Privacy: free. Weights and maps are functions of parameters that were released
    before, of (seed, step), and of the public facts given here; no private example is
    read. An `example`, a generator, features or a loss that holds private data would
    void that.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10, score_budget=0)
        >>> probe = dp_ilg.Probe(lambda p, x: jnp.tanh(p["w"] @ x) @ p["v"],
        ...     example=jnp.zeros(4), batch="gaussian", every=5)
        >>> tx = dp_ilg.dp_adam_ilg(0.1, plan, key=jax.random.key(0), source=probe,
        ...     importance="paper", layers="leaf")
        >>> params = {"w": jnp.ones((2, 4)), "v": jnp.full(2, 0.01)}
        >>> v, w = tx.geometry(tx.init(params)).weights
        >>> bool(v > 10 * w)
        True

    Reference: Molina Van den Bosch et al. 2026 (DP-KFC); Gupta et al. 2018 (Shampoo)
    for the factors; docs/guides/priors_and_probes.md says what is the same.
    """

    loss_fn: Any = None
    example: Any = None
    batch: Any = "auto"
    depth: str = "group"
    every: int = 50
    num_examples: int = 64
    seed: int = 0
    num_classes: int | None = None
    num_tokens: int | None = None
    damping: float = 0.1
    max_axis: int = 1024
    rule: Any = None
    groups: str = "probe"
    steps: str = "restored"
    microbatch_size: int = 16
    features: Any = None

    def __post_init__(self) -> None:
        """Checks all that can be known without parameters."""
        _check_row("depth", self.depth, DEPTHS)
        _check_row("groups", self.groups, GROUPS)
        if not callable(self.batch):
            as_generator(self.batch)
        for name, form in _FUNCTIONS.items():
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(
                    f"{name} is {type(value).__name__}, but must be a function {form}."
                )
        for name in ("every", "num_examples", "max_axis", "microbatch_size"):
            validation.whole(name, getattr(self, name))
        for name in ("num_classes", "num_tokens"):
            if getattr(self, name) is not None:
                validation.whole(name, getattr(self, name))
        validation.whole("seed", self.seed, 0)
        validation.rate("damping", self.damping)
        if self.rule is not None:
            as_rule(self.rule)
        as_reading(self.steps)
        if self.depth == "group" and (self.groups, self.steps) != ("probe", "restored"):
            raise ValueError(
                "depth is 'group', which weighs groups alone; leave groups and steps "
                "out, or take depth='diagonal'."
            )

    def spends_scores(self) -> bool:
        """Whether the weights of groups are released and charged."""
        return self.groups == "scores"

    def knowing(self, **facts: Any) -> Probe:
        """The same probe with these facts where it has none of its own."""
        new = {name: x for name, x in facts.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **new)

    def kinds(self, groups: Groups) -> Kinds:
        """What is kept of each axis of each leaf."""
        return tuple(DEPTHS[self.depth](leaf, self.max_axis) for leaf in groups.leaves)

    def at_once(self) -> int:
        """Examples differentiated at once: the largest divisor that is allowed."""
        most = min(self.microbatch_size, self.num_examples)
        return next(k for k in range(most, 0, -1) if self.num_examples % k == 0)

    def generator(self) -> Callable[[Any], Any]:
        """The function ``key -> batch``, of features where there are some.

        Raises:
            ValueError: where the example is missing or does not fit.
        """
        make = self._maker()
        features = self.features
        return make if features is None else lambda key: features(make(key))

    def _maker(self) -> Callable[[Any], Any]:
        """What makes inputs."""
        if not callable(self.batch):
            if self.example is None:
                raise ValueError(
                    "The probe does not know the shape of an example; give it "
                    "example=, one made of zeros."
                )
            public = Public(self.num_classes, self.num_tokens)
            row = as_generator(self.batch)
            return made_up(row, self.example, self.num_examples, public)
        make: Any = self.batch
        self._check_batch(jax.eval_shape(make, jax.random.key(0)))
        return make

    def check(self, params: Params) -> None:
        """Raises unless loss, batch and parameters go together; computes nothing.

        Args:
            params: only shapes are read.

        Raises:
            ValueError: in one sentence.
        """
        if self.loss_fn is None:
            raise ValueError(
                "The probe has no loss; give it loss_fn=, or pass it to "
                "dp_ilg.private_training, which knows the loss."
            )
        make, shapes = self.generator(), lambda tree: jax.eval_shape(lambda x: x, tree)
        row = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)  # noqa: E731
        try:
            one = jax.tree.map(row, jax.eval_shape(make, jax.random.key(0)))
            found = jax.eval_shape(self.loss_fn, shapes(params), one)
        except Exception as error:  # noqa: BLE001 - the user's own code
            words = " ".join(str(error).split())[:200]
            raise ValueError(
                f"The loss cannot be computed on what the probe makes "
                f"({type(error).__name__}: {words}); give the probe an example or a "
                "generator of the data's own shape."
            ) from error
        value = (jax.tree.leaves(found) or [None])[0]
        if value is None or value.shape != ():
            raise ValueError(
                "The loss gives no scalar on what the probe makes; loss_fn is "
                "(params, example) -> scalar of ONE example."
            )

    def _check_batch(self, rows: Any) -> None:
        """A batch of the user's own against the example, if there is one."""
        leaves = jax.tree.leaves(rows)
        if not leaves or any(x.shape[:1] != (self.num_examples,) for x in leaves):
            raise ValueError(
                f"The generator gives arrays of shapes {[x.shape for x in leaves]}, "
                f"but num_examples is {self.num_examples}; each needs that many rows."
            )
        if self.example is None:
            return
        wanted = jax.tree.map(shape_of, self.example)
        same = jax.tree.structure(rows) == jax.tree.structure(wanted) and all(
            x.shape[1:] == y.shape and x.dtype == y.dtype
            for x, y in zip(leaves, jax.tree.leaves(wanted), strict=True)
        )
        if not same:
            one = [(x.shape[1:], str(x.dtype)) for x in leaves]
            own = [(y.shape, str(y.dtype)) for y in jax.tree.leaves(wanted)]
            raise ValueError(
                f"The generator makes examples of {one}, but the example has {own}; "
                "make them alike."
            )


def _check_row(name: str, value: Any, rows: Any) -> None:
    if not isinstance(value, str) or value not in rows:
        raise ValueError(
            f"{name} is {validation.shown(value)}, but must be one of {sorted(rows)}."
        )


def probe_key(seed: int, step: Any) -> Any:
    """The public key of the probe before a step.

    Example:
        >>> bool(probe_key(0, 1) == probe_key(0, 2))
        False
    """
    words = (
        seed >> shift & 0xFFFFFFFF for shift in range(0, max(seed.bit_length(), 1), 32)
    )
    key = jax.random.key(0x9806E, impl="threefry2x32")
    return jax.random.fold_in(_folded(key, list(words)), step)


def _folded(key: Any, words: list[int]) -> Any:
    for word in words:
        key = jax.random.fold_in(key, word)
    return key
