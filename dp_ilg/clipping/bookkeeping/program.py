"""A loss of one example as a flat program, and how to run one.

Tracing one example, not the batch, keeps the batch axis out of every shape, so that
nothing has to guess which axis it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import (
    ClosedJaxpr,
    DebugInfo,
    DropVar,
    Jaxpr,
    Literal,
    jaxpr_as_fun,
)

_DEBUG = DebugInfo("evaluate", "dp_ilg", None, None)
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr"}


def flat(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program with calls written out and dead equations gone."""
    shapes = [
        jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype, weak_type=_weak(v))
        for v in closed.jaxpr.invars
    ]

    def program(*args: Any) -> list[Any]:
        return run(closed, args, inline=True)

    traced = jax.make_jaxpr(program)(*shapes)
    return ClosedJaxpr(_alive(traced.jaxpr), traced.consts)


def run(closed: ClosedJaxpr, args: Sequence[Any], inline: bool = False) -> list[Any]:
    """Evaluates a program, its calls equation by equation if asked."""
    env: dict[Any, Any] = {}
    write(env, closed.jaxpr.constvars, constants(closed))
    write(env, closed.jaxpr.invars, args)
    for eqn in closed.jaxpr.eqns:
        values = [read(env, v) for v in eqn.invars]
        inner = inner_program(eqn) if inline else None
        outs = evaluate(eqn, values) if inner is None else run(inner, values, True)
        write(env, eqn.outvars, outs)
    return [read(env, v) for v in closed.jaxpr.outvars]


def evaluate(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of one equation, run as a program of its own."""
    given = {
        var: value
        for var, value in zip(eqn.invars, values, strict=True)
        if not isinstance(var, Literal)
    }
    alone = Jaxpr((), tuple(given), eqn.outvars, [eqn], eqn.effects, _DEBUG)
    return jaxpr_as_fun(ClosedJaxpr(alone, ()))(*given.values())


def constants(closed: ClosedJaxpr) -> list[Any]:
    """The constants of a program as arrays, which derivatives in Python expect."""
    return [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in closed.consts]


def inner_program(eqn: Any) -> ClosedJaxpr | None:
    """What a call equation calls, or None."""
    name = _CALLS.get(eqn.primitive.name)
    return None if name is None else as_closed(eqn.params[name])


def as_closed(jaxpr: Any) -> ClosedJaxpr:
    """A program with its constants, of which an open one has none."""
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def read(env: dict[Any, Any], var: Any) -> Any:
    """The value of a variable or literal."""
    return var.val if isinstance(var, Literal) else env[var]


def write(env: dict[Any, Any], variables: Sequence[Any], values: Sequence[Any]) -> None:
    """Stores the values of variables."""
    for var, value in zip(variables, values, strict=True):
        env[var] = value


def _weak(var: Any) -> bool:
    return bool(getattr(var.aval, "weak_type", False))


def _alive(jaxpr: Any) -> Any:
    """Drops the equations no output needs; programs with effects do not come here."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        outs = [v for v in eqn.outvars if not isinstance(v, DropVar)]
        if needed & set(outs):
            kept.append(eqn)
            needed |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return jaxpr.replace(eqns=kept[::-1])
