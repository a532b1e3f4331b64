"""Finds batch norm in a loss that sees one row: statistics over an axis of one.

A loss that gives BatchNorm a batch of one, ``x[None]``, passes every other check, since
no example meets another. But each number is then normalised by itself: what comes out
is constant, and nothing before it gets a gradient. The program of the loss shows it: a
value, less its own mean over an axis of one, beside the mean of its square over the
same axes. Running statistics give it away, too: that mean, added to a constant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import Literal

_SAME = {"convert_element_type", "copy", "copy_p", "optimization_barrier"}
_SPREAD = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "neg"}
_SCALED = {"div", "mul"}
_APART = {"scan", "while", "cond"}
DATA, PARAMETER = 1, 2


class Fact(NamedTuple):
    """What is known of a value in a program.

    Attributes:
        root: number of the value it was made from.
        kind: "value", "square", "mean" or "mean_square" of the root.
        axes: over which axes of the root the mean goes.
        shape: of the root.
        source: `DATA` and `PARAMETER` in one number: what it was computed from.

    Example:
        >>> Fact(0, "mean", (0,), (1, 4), DATA).axes
        (0,)
    """

    root: int
    kind: str
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    source: int


def refuse_row_statistics(jaxpr: Any, num_params: int) -> None:
    """Raises for a loss that normalises by statistics of a batch of one row.

    Args:
        jaxpr: the program of the loss of one example.
        num_params: how many of its first inputs are parameters; the rest is example.

    Raises:
        ValueError: where a value of the example is normalised by mean and variance
            over an axis of one, as BatchNorm does, and not over its features, as
            LayerNorm, GroupNorm and InstanceNorm do. Frozen statistics pass.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> def loss(w, x):
        ...     x = x[None] * w
        ...     return jnp.sum((x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5))
        >>> jaxpr = jax.make_jaxpr(loss)(jnp.ones(3), jnp.ones(3)).jaxpr
        >>> refuse_row_statistics(jaxpr, 1)
        Traceback (most recent call last):
        ValueError: The loss normalises each number by itself (mean over axes (0,) ...
    """
    found = _Walk()
    sources = [PARAMETER if k < num_params else DATA for k in range(len(jaxpr.invars))]
    pairs = zip(jaxpr.invars, sources, strict=True)
    found.walk(jaxpr, [found.fresh(v, source) for v, source in pairs])
    for fact in found.centred:
        over = fact.root, fact.axes
        kept = over in found.kept or _over_batch(fact)
        if over in found.squared and fact.source & DATA and kept:
            raise ValueError(_sentence(fact))


def _sentence(fact: Fact) -> str:
    where = f"(mean over axes {fact.axes} of {fact.shape})"
    alone = math.prod(fact.shape[k] for k in fact.axes) == 1
    what = f"each number by itself {where}, so that nothing before it gets a gradient"
    if not alone:
        what = f"by the statistics of a batch {where}, of which it sees one row"
    return (
        f"The loss normalises {what}; replace BatchNorm by GroupNorm or LayerNorm, or "
        "freeze its statistics (use_running_average=True), and give every other norm "
        "more than one number."
    )


def _over_batch(fact: Fact) -> bool:
    """Whether a mean goes over an axis of one example, but not over its features."""
    axes, shape = fact.axes, fact.shape
    if not axes:
        return len(shape) > 0 and math.prod(shape) > 1
    first, rank = axes[0], len(shape)
    kept = [k for k in range(first, rank) if k not in axes]
    if shape[first] != 1 or len(kept) != 1 or shape[kept[0]] == 1:
        return False
    if kept[0] not in (first + 1, rank - 1):
        return False
    alone = math.prod(shape[k] for k in axes) == 1
    return alone or (first == 0 and bool(fact.source & PARAMETER))


class _Walk:
    """Reads a program once, equation by equation."""

    def __init__(self) -> None:
        self.count = 0
        self.centred: list[Fact] = []
        self.squared: set[tuple[int, tuple[int, ...]]] = set()
        self.kept: set[tuple[int, tuple[int, ...]]] = set()

    def fresh(self, atom: Any, source: int) -> Fact:
        """A value of which nothing is known but where it came from."""
        self.count += 1
        return Fact(self.count, "value", (), tuple(atom.aval.shape), source)

    def walk(self, jaxpr: Any, inputs: list[Fact]) -> list[Fact]:
        """The facts of a program's outputs."""
        facts = dict(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> Fact:
            known = None if isinstance(atom, Literal) else facts.get(atom)
            return self.fresh(atom, 0) if known is None else known

        for equation in jaxpr.eqns:
            outputs = self._outputs(equation, [read(v) for v in equation.invars])
            facts.update(zip(equation.outvars, outputs, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _outputs(self, equation: Any, inputs: list[Fact]) -> list[Fact]:
        source = 0
        for fact in inputs:
            source |= fact.source
        for inner in _programs(equation):
            apart = equation.primitive.name in _APART
            fits = len(inner.invars) == len(inputs) and not apart
            fits = fits and len(inner.outvars) == len(equation.outvars)
            given = inputs if fits else [self.fresh(v, source) for v in inner.invars]
            found = self.walk(inner, given)
            if fits:
                return found
        known = self._known(equation, inputs)
        if known is not None:
            return [known._replace(source=source)]
        return [self.fresh(v, source) for v in equation.outvars]

    def _known(self, equation: Any, inputs: list[Fact]) -> Fact | None:
        """What an equation makes of its first input, where that can be said."""
        name = equation.primitive.name
        if not inputs or len(equation.outvars) != 1:
            return None
        if name == "mul" and _is_constant(inputs[0]):
            inputs = inputs[::-1]
        first = inputs[0]
        mean = "mean" in first.kind
        if name in _SAME or (mean and name in _SPREAD):
            return first
        if name in _SCALED and mean and _is_constant(inputs[1]):
            return first
        if name == "add":
            self.kept |= {(f.root, f.axes) for f in _running(inputs)}
        if name == "sub" and _own_mean(first, inputs[1]):
            self.centred.append(inputs[1]._replace(source=first.source))
            return first
        if first.kind == "value" and _squares(equation, inputs):
            return first._replace(kind="square")
        if name == "reduce_sum" and first.kind in ("value", "square"):
            return self._mean(first, tuple(map(int, equation.params["axes"])))
        return None

    def _mean(self, of: Fact, axes: tuple[int, ...]) -> Fact:
        if of.kind == "square":
            self.squared.add((of.root, axes))
            return of._replace(kind="mean_square", axes=axes)
        return of._replace(kind="mean", axes=axes)


def _own_mean(value: Fact, mean: Fact) -> bool:
    same = value.root == mean.root
    return same and value.kind == "value" and mean.kind == "mean"


def _running(inputs: list[Fact]) -> list[Fact]:
    """Means that are added to what is no example: running statistics."""
    pairs = zip(inputs, reversed(inputs), strict=True)
    kept = [(a, b) for a, b in pairs if a.kind == "mean" and not b.source & DATA]
    return [mean for mean, other in kept if other.shape]


def _squares(equation: Any, inputs: list[Fact]) -> bool:
    name = equation.primitive.name
    if name == "integer_pow":
        return equation.params["y"] == 2
    twice = name == "mul" and inputs[0].root == inputs[1].root
    return name == "square" or (twice and inputs[1].kind == "value")


def _is_constant(fact: Fact) -> bool:
    return fact.source == 0 and math.prod(fact.shape) == 1


def _programs(equation: Any) -> Iterator[Any]:
    """The programs inside an equation, without their constants' wrapping."""
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(part, "jaxpr", part)
            if hasattr(inner, "eqns"):
                yield inner
