"""What a case of the zoo is, and how a row of shapes becomes one.

Values are drawn in float32 and cast to the width JAX works in, so that a case
built under ``jax.enable_x64(True)`` holds the same numbers as in float32.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BATCH = 5
Draw = Callable[[np.random.Generator, tuple[int, ...]], Any]


class Case(NamedTuple):
    """A loss of one example, its parameters and a batch.

    Attributes:
        loss: ``(params, example) -> scalar``.
        params: float arrays in any tree.
        batch: like an example, with a leading axis.
        exact: the loss without rounding, where `loss` computes in bfloat16.
        excess: by how much of itself a float32 norm may exceed the oracle's. Norms
            are rounded up where terms of an example cancel, so that none is too small.
    """

    loss: Callable[[Any, Any], Any]
    params: Any
    batch: Any
    exact: Callable[[Any, Any], Any] | None = None
    excess: float = 5e-6


class Table(dict[str, Callable[[], Case]]):
    """Cases by name, filled in by decorators."""

    def case(self, name: str, params: Any, example: Any, **facts: Any) -> Callable:
        """Registers ``forward(params, example)``; its loss is `readout` of that."""

        def register(forward: Callable) -> Callable:
            self.put(name, functools.partial(drawn, name, params, example, forward))
            if facts:
                self[name] = functools.partial(_with_facts, self[name], facts)
            return forward

        return register

    def build(self, function: Callable[[], Case]) -> Callable[[], Case]:
        """Registers a function that makes the whole case, by its name."""
        self.put(function.__name__, function)
        return function

    def put(self, name: str, make: Callable[[], Case]) -> None:
        """Adds a row; a name is used once."""
        if name in self:
            raise ValueError(f"two cases are called {name}")
        self[name] = make


def drawn(name: str, params: Any, example: Any, forward: Callable) -> Case:
    """A case with random parameters and examples, the same in every process."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = jax.tree.map(lambda draw: draw(rng, ()), params)
    batch = jax.tree.map(lambda draw: draw(rng, (BATCH,)), example)
    return Case(lambda p, x: readout(forward(p, x)), values, batch)


def _with_facts(make: Callable[[], Case], facts: dict[str, Any]) -> Case:
    case = make()
    if "exact" in facts:
        forward = facts["exact"]
        facts = facts | {"exact": lambda p, x: readout(forward(p, x))}
    return case._replace(**facts)


def readout(out: Any) -> jax.Array:
    """A scalar of all outputs, well conditioned however large they are."""
    return sum((_readout(leaf) for leaf in jax.tree.leaves(out)), jnp.zeros(()))


def _readout(y: Any) -> jax.Array:
    y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    pattern = 1.5 + jnp.cos(1.0 + jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return jnp.sum(pattern * (y + jnp.arcsinh(y)))


def float_type() -> Any:
    """float32, or float64 under ``jax.enable_x64(True)``."""
    return jnp.zeros(()).dtype


def floats(value: Any) -> jax.Array:
    """Rounds to float32 and widens to `float_type`."""
    return jnp.asarray(np.asarray(value, np.float32), float_type())


def real(*shape: int, scale: float = 1.0) -> Draw:
    """Normal entries; examples differ in size as well."""

    def draw(rng: np.random.Generator, lead: tuple[int, ...]) -> jax.Array:
        value = scale * rng.normal(size=lead + shape)
        if lead:
            value *= rng.lognormal(sigma=0.4, size=lead + (1,) * len(shape))
        return floats(value)

    return draw


def weight(*shape: int) -> Draw:
    """Normal entries of the usual size of a weight."""
    return real(*shape, scale=0.5)


def bfloat16(*shape: int) -> Draw:
    """Normal entries held in bfloat16."""
    return lambda rng, lead: weight(*shape)(rng, lead).astype(jnp.bfloat16)


def ids(low: int, high: int, *shape: int) -> Draw:
    """Whole numbers from `low` up to, not including, `high`."""
    return lambda rng, lead: jnp.asarray(rng.integers(low, high, lead + shape))


def key() -> Draw:
    """A typed random key for each example."""

    def draw(rng: np.random.Generator, lead: tuple[int, ...]) -> jax.Array:
        return jax.random.split(jax.random.key(int(rng.integers(1 << 30))), lead)

    return draw


def batch_of(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    """A batch of normal examples, for cases that build themselves."""
    return real(*shape, scale=scale)(np.random.default_rng(seed), (BATCH,))
