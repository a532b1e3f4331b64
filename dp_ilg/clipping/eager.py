"""Calls outside of ``jax.jit``: one compiled program for all of one kind.

A loop over micro-batches that is run without ``jax.jit`` compiles its body anew at
every call, since JAX knows a loop by its Python function. Here the loss is traced at
every call, which takes milliseconds and sees whatever has changed in it; the program
that sums its clipped gradients is compiled for the first loss that reads the same.
"""

from __future__ import annotations

import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from dp_ilg.base import ClippedGrad, Example, LossFn, Params
from dp_ilg.clipping.purity import equations, has_own_derivative

Total = Callable[..., ClippedGrad]
MOST_PROGRAMS = 32
"""How many programs are kept; the one that was not asked for longest goes first."""

_LOOPS = {"scan", "while", "cond", "checkpoint", "remat2"}
_PROGRAMS: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()


def is_eager(*values: Any) -> bool:
    """Whether none of the values is traced.

    Example:
        >>> is_eager({"w": 1.0}), jax.jit(lambda x: x + is_eager(x))(0).item()
        (True, 0)
    """
    return not any(isinstance(x, Tracer) for x in jax.tree.leaves(values))


def traced(loss_fn: LossFn, params: Params, batch: Example) -> ClosedJaxpr:
    """The loss of one example as a program, with what it closes over as constants."""
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    return jax.make_jaxpr(loss_fn)(params, example)


def has_loops(closed: ClosedJaxpr) -> bool:
    """Whether a program has loops or branches, which run eagerly compile every time."""
    return any(eqn.primitive.name in _LOOPS for eqn in equations(closed.jaxpr))


def compiled(
    closed: ClosedJaxpr, owner: Any, facts: Hashable, total: Total
) -> Callable[..., ClippedGrad]:
    """The compiled form of a clipped sum, made anew only for what is new.

    Args:
        closed: the loss of one example, of `traced`. Its constants are arguments of
            the compiled program: none is kept, and changed ones are seen.
        owner: the user's loss, told apart by identity where it has derivatives of its
            own, which a program does not show; no reference is kept.
        facts: whatever else `total` depends on.
        total: ``(loss_fn, *inputs) -> ClippedGrad``.

    Returns:
        ``(*inputs) -> ClippedGrad``.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = lambda p, x: p * x
        >>> closed = traced(loss, jnp.ones(()), jnp.ones(3))
        >>> run = compiled(closed, loss, "doctest", lambda f, p, x: f(p, x)[0])
        >>> float(run(jnp.float32(2.0), jnp.float32(3.0)))
        6.0
    """
    key = (str(closed.jaxpr), _identity(closed, owner), facts)
    if key not in _PROGRAMS:
        _PROGRAMS[key] = _program(closed.jaxpr, total)
        while len(_PROGRAMS) > MOST_PROGRAMS:
            _PROGRAMS.popitem(last=False)
    _PROGRAMS.move_to_end(key)
    program = _PROGRAMS[key]
    return lambda *inputs: program(closed.consts, *inputs)


def forget() -> None:
    """Drops all programs; for tests that plant a fault in what was compiled."""
    _PROGRAMS.clear()


def _program(jaxpr: Any, total: Total) -> Callable[..., Any]:
    def run(consts: Any, *inputs: Any) -> Any:
        def loss_fn(params: Params, example: Example) -> Any:
            flat = jax.tree.leaves((params, example))
            return jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*flat)

        return total(loss_fn, *inputs)

    return jax.jit(run)


def _identity(closed: ClosedJaxpr, owner: Any) -> Any:
    if not any(map(has_own_derivative, equations(closed.jaxpr))):
        return None
    try:
        kind = weakref.WeakMethod if inspect.ismethod(owner) else weakref.ref
        reference = kind(owner)
        hash(reference)
        return reference
    except TypeError:
        return object()  # known by nothing: compiled every time
