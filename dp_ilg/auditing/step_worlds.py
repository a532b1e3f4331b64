"""Worlds of one step: one state and key, other batches; one batch, other keys.

A step is a function of state, batch and mask. Its randomness is the keys in the state,
so that an auditor may hold it fixed and change one example, or the other way round.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg.auditing.step_scene import Scene

_TOGETHER = 64  # keys of one compiled call
_ENTRIES = 2**22  # numbers of the state held at once on the device


def is_key(value: Any) -> bool:
    """Whether a leaf is a PRNG key: a typed one, or a raw ``uint32[2]``.

    Example:
        >>> is_key(jax.random.key(0)), is_key(jax.random.PRNGKey(0)), is_key(0)
        (True, True, False)
    """
    dtype = getattr(value, "dtype", None)
    if dtype is None:
        return False
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return True
    return dtype == np.uint32 and getattr(value, "shape", ()) == (2,)


def rekeyed(state: Any, number: Any, places: frozenset[int] | None = None) -> Any:
    """A state whose keys are folded with a number; everything else stays.

    Args:
        state: a tree.
        number: what to fold in.
        places: which of its leaves; None for every key.

    Returns:
        The state.

    Example:
        >>> state = {"w": 1.0, "key": jax.random.key(0)}
        >>> after = rekeyed(state, 3)
        >>> after["w"], bool(after["key"] == jax.random.fold_in(state["key"], 3))
        (1.0, True)
    """

    def fold(place: int, leaf: Any) -> Any:
        if not is_key(leaf) or not (places is None or place in places):
            return leaf
        if leaf.dtype == np.uint32 or leaf.shape == ():
            return jax.random.fold_in(leaf, number)
        folded = jax.vmap(jax.random.fold_in, (0, None))(leaf.reshape(-1), number)
        return folded.reshape(leaf.shape)

    leaves, treedef = jax.tree.flatten(state)
    return jax.tree.unflatten(treedef, [fold(k, x) for k, x in enumerate(leaves)])


def takes_mask(step: Callable[..., Any]) -> bool:
    """Whether a step takes a mask after state and batch; yes where that is hidden.

    Example:
        >>> takes_mask(lambda state, batch: state)
        False
    """
    try:
        inspect.signature(step).bind(None, None, None)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class Runner:
    """Takes one step from many states: at once where JAX can trace the step.

    Attributes:
        step: ``(state, batch[, is_padding_example]) -> state``.
        masked: whether it takes the mask.
        traced: whether JAX can trace it.
    """

    step: Callable[..., Any]
    masked: bool
    traced: bool = True

    def one(self, state: Any, batch: Any, mask: Any) -> Any:
        """The state after one step."""
        if not self.masked:
            return self.step(state, batch)
        return self.step(state, batch, mask)

    def many(self, states: Any, batch: Any, mask: Any) -> Any:
        """The states after one step, stacked."""
        batch, mask = jax.tree.map(jnp.asarray, (batch, mask))
        if self.traced:
            return self._compiled(states, batch, mask)
        count = len(jax.tree.leaves(states)[0])
        alone = [jax.tree.map(lambda x, k=k: x[k], states) for k in range(count)]
        after = [self.one(copied(state), batch, mask) for state in alone]
        return jax.tree.map(lambda *x: jnp.stack([jnp.asarray(v) for v in x]), *after)

    @cached_property
    def _compiled(self) -> Any:
        return jax.jit(jax.vmap(self.one, (0, None, None)))


def runner_of(step: Callable[..., Any], state: Any, batch: Any, mask: Any) -> Runner:
    """The runner of a step, once it was tried whether JAX can trace it.

    Args:
        step: of the user.
        state: before it.
        batch: of it.
        mask: of it.

    Returns:
        The runner.

    Example:
        >>> step = lambda state, batch: state + float(batch.sum())
        >>> runner_of(step, jnp.ones(1), np.ones(2), np.zeros(2, bool)).traced
        False
    """
    runner = Runner(step, takes_mask(step))
    try:
        jax.eval_shape(runner.one, state, batch, mask)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
        return dataclasses.replace(runner, traced=False)
    return runner


@dataclasses.dataclass(frozen=True, eq=False)
class Worlds:
    """Runs a step from one state, under many keys.

    Attributes:
        runner: of the step.
        begin: maps numbers ``[keys]`` to stacked states before the step, of equal
            parameters and other keys.
        look: maps a state to what an adversary sees.
        scene: the batches.
    """

    runner: Runner
    begin: Callable[[Any], Any]
    look: Callable[[Any], Any]
    scene: Scene

    def seen(self, states: Any) -> list[np.ndarray]:
        """What is looked at, ``[keys, ...]`` each: keys are secret and left out.

        Numbers without axes get one.
        """
        looked = jax.tree.leaves(jax.vmap(self.look)(states))
        found = [np.asarray(x) for x in looked if not is_key(x)]
        return [x[:, None] if x.ndim == 1 else x for x in found]

    @cached_property
    def names(self) -> list[str]:
        """Where in the state each of them is."""
        looked = jax.vmap(self.look)(self.begin(np.zeros(1, np.uint32)))
        found, _ = jax.tree.flatten_with_path(looked)
        return [jax.tree_util.keystr(path) for path, x in found if not is_key(x)]

    @cached_property
    def before(self) -> list[np.ndarray]:
        """What is seen before the step."""
        return [np.asarray(x[0]) for x in self.seen(self.begin(np.zeros(1, np.uint32)))]

    @cached_property
    def width(self) -> int:
        """How many keys are tried at once."""
        size = max(1, sum(x.size for x in self.before))
        return int(np.clip(_ENTRIES // size, 1, _TOGETHER))

    def next_state(self, batch: Any, mask: Any) -> Any:
        """The state after a step, under the first key."""
        count = self.width if self.runner.traced else 1
        states = self.begin(np.zeros(count, np.uint32))
        return jax.tree.map(lambda x: x[0], self.runner.many(states, batch, mask))

    def outputs(
        self, numbers: Any, batch: Any, mask: Any, steps: int = 1
    ) -> list[np.ndarray]:
        """What is seen after a step, or several on one batch, ``[keys, ...]`` each.

        Args:
            numbers: one a key.
            batch: of the step.
            mask: of the step.
            steps: how many.

        Returns:
            The leaves; floating-point ones as float64.
        """
        parts = list(self.blocks(numbers, batch, mask, steps))
        return [np.concatenate(x) for x in zip(*parts, strict=True)]

    def blocks(
        self, numbers: Any, batch: Any, mask: Any, steps: int = 1
    ) -> Iterator[list[np.ndarray]]:
        """As `outputs`, some keys at a time; all blocks are of one compiled size."""
        width, numbers = self.width, np.asarray(numbers, np.uint32)
        for start in range(0, len(numbers), width):
            own = numbers[start : start + width]
            fill = width - len(own) if self.runner.traced else 0
            states = self.begin(np.pad(own, (0, fill), mode="edge"))
            for _ in range(steps):
                states = self.runner.many(states, batch, mask)
            yield [_wide(x)[: len(own)] for x in self.seen(states)]


def copied(state: Any) -> Any:
    """A copy of a state, which a step may take over and delete.

    Example:
        >>> copied({"w": jnp.ones(2)})["w"].tolist()
        [1.0, 1.0]
    """

    def copy(x: Any) -> Any:
        return jnp.copy(x) if isinstance(x, jax.Array) else x

    return jax.tree.map(copy, state)


def _wide(value: Any) -> np.ndarray:
    value = np.asarray(value)
    return (
        value.astype(np.float64) if jnp.issubdtype(value.dtype, jnp.floating) else value
    )
