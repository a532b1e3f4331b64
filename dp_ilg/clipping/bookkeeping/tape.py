"""Finds where a program reads parameters, and plays it with probes at these places.

A *use* is an equation with a rule that reads a `View` of a parameter. Playing adds a
zero, the probe, to its output and keeps its other operands: the derivative by the
probe is the derivative at the output, and both together are the parameter's gradient
in factors. Parameters that are read in any other way are *spoiled*: they are
differentiated example by example, which is always exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal

from dp_ilg.clipping.bookkeeping.max_pooling import pooling
from dp_ilg.clipping.bookkeeping.program import (
    as_closed,
    constants,
    evaluate,
    flat,
    read,
    write,
)
from dp_ilg.clipping.bookkeeping.rules import RULES, Linear, linear_in
from dp_ilg.clipping.bookkeeping.views import (
    Digits,
    Held,
    Turns,
    View,
    each_view,
    join,
    span,
    view_op,
    views_in,
)


@dataclass(frozen=True)
class Use:
    """One equation that reads a parameter by a rule."""

    eqn: Any
    position: int
    view: View
    linear: Linear


@dataclass
class Level:
    """A program, its uses by equation, and the loops that contain more of them."""

    closed: ClosedJaxpr
    uses: dict[int, tuple[Use, ...]] = field(default_factory=dict)
    inner: dict[int, Level] = field(default_factory=dict)

    def all_uses(self) -> list[tuple[tuple[int, ...], Use]]:
        """Every use with its address: equation numbers, outermost first."""
        own = [((index,), use) for index, uses in self.uses.items() for use in uses]
        deep = [
            ((index, *address), use)
            for index, level in self.inner.items()
            for address, use in level.all_uses()
        ]
        return own + deep


Spoiled = dict[int, str]


def survey(
    closed: ClosedJaxpr, views: Sequence[Held | None], spoiled: Spoiled
) -> Level:
    """Marks the uses of a flat program.

    Args:
        closed: the program.
        views: what each of its inputs holds.
        spoiled: leaves to leave alone; leaves found to be read otherwise are added,
            with the reason.

    Returns:
        The program as a `Level`.
    """
    level = Level(closed)
    env: dict[Any, Held] = {}
    for var, held in zip(closed.jaxpr.invars, views, strict=True):
        kept = held and each_view(held, lambda v: None if v.leaf in spoiled else v)
        if kept is not None:
            env[var] = kept
    for index, eqn in enumerate(closed.jaxpr.eqns):
        found = [None if isinstance(v, Literal) else env.get(v) for v in eqn.invars]
        if any(view is not None for view in found):
            outs = _step(level, index, eqn, found, spoiled)
            env.update(zip(eqn.outvars, outs, strict=False))
    for var in closed.jaxpr.outvars:
        held = None if isinstance(var, Literal) else env.get(var)
        _spoil(held, "it is returned or carried by a loop", spoiled)
    return level


def _spoil(held: Held | None, reason: str, spoiled: Spoiled) -> None:
    """Notes the first reason against every leaf that is held."""
    for view in views_in(held) if held is not None else ():
        spoiled.setdefault(view.leaf, reason)


def _step(
    level: Level, index: int, eqn: Any, found: list[Held | None], spoiled: Spoiled
) -> Sequence[Held]:
    """Decides one equation; returns what its outputs hold."""
    name = eqn.primitive.name
    present = [(k, held) for k, held in enumerate(found) if held is not None]
    (position, one), *others = present
    outs = view_op(eqn, one) if not others else None
    if name == "concatenate":
        joined = join(eqn, found)
        outs = outs if joined is None else [joined]
    if outs is not None:
        return outs
    if name == "stop_gradient" or not _differentiable(eqn):
        return []
    if name in _LOOPS:
        level.inner[index] = _LOOPS[name].survey(eqn, found, spoiled)
        return []
    reason = f"{name} reads it"
    if not others and name in RULES and _real(eqn):
        uses = linear_in(eqn, position, one)
        reason = "nothing of it is read"
        if isinstance(uses, str):
            reason = f"it is read by {uses}"
        elif not any(_empty(linear) for _, linear in uses):
            own = (Use(eqn, position, view, linear) for view, linear in uses)
            level.uses[index] = tuple(own)
            return []
    for _, held in present:
        _spoil(held, reason, spoiled)
    return []


def _real(eqn: Any) -> bool:
    """Whether nothing in an equation is complex."""
    dtypes = [v.aval.dtype for v in (*eqn.invars, *eqn.outvars)]
    return not any(jnp.issubdtype(d, jnp.complexfloating) for d in dtypes)


def _empty(linear: Linear) -> bool:
    sizes = [span(d) for d in (linear.batch, linear.first, linear.second)]
    return 0 in (linear.terms, *sizes)


def _differentiable(eqn: Any) -> bool:
    return any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.outvars)


Tree = dict[int, Any]


def probes(level: Level) -> Tree:
    """Zeros like the output of every use, by equation number, loops nested."""
    own: Tree = {
        index: jnp.zeros(use.eqn.outvars[0].aval.shape, use.eqn.outvars[0].aval.dtype)
        for index, (use, *_) in level.uses.items()
    }
    for index, inner in level.inner.items():
        eqn = level.closed.jaxpr.eqns[index]
        own[index] = _LOOPS[eqn.primitive.name].probes(eqn, probes(inner))
    return own


def play(level: Level, args: Sequence[Any], probe: Tree) -> tuple[list[Any], Tree]:
    """Runs a program with probes.

    Args:
        level: the surveyed program.
        args: its inputs.
        probe: as `probes` gives.

    Returns:
        Its outputs, and what every use read, in a tree like `probe`.
    """
    env: dict[Any, Any] = {}
    records: Tree = {}
    write(env, level.closed.jaxpr.constvars, constants(level.closed))
    write(env, level.closed.jaxpr.invars, args)
    for index, eqn in enumerate(level.closed.jaxpr.eqns):
        values = [read(env, v) for v in eqn.invars]
        if index in level.uses:
            use = level.uses[index][0]
            apply = use.linear.apply
            (out,) = [apply(*values)] if apply else evaluate(eqn, values)
            outs = [out + probe[index]]
            records[index] = jnp.asarray(values[use.linear.reads])
        elif index in level.inner:
            loop = _LOOPS[eqn.primitive.name]
            outs, records[index] = loop.play(
                eqn, level.inner[index], values, probe[index]
            )
        else:
            faster = _FASTER.get(eqn.primitive.name, lambda eqn: None)(eqn)
            outs = [faster(*values)] if faster else evaluate(eqn, values)
        write(env, eqn.outvars, outs)
    return [read(env, v) for v in level.closed.jaxpr.outvars], records


@dataclass(frozen=True)
class Loop:
    """How probes and records pass through an equation that contains a program."""

    survey: Callable[[Any, list[Held | None], Spoiled], Level]
    probes: Callable[[Any, Tree], Tree]
    play: Callable[[Any, Level, list[Any], Tree], tuple[list[Any], Tree]]


def _survey_scan(eqn: Any, found: list[Held | None], spoiled: Spoiled) -> Level:
    """Constants are shared by all turns; stacked inputs give each turn its own."""
    length, consts = eqn.params["length"], eqn.params["num_consts"]
    carry_end = consts + eqn.params["num_carry"]
    inner: list[Held | None] = []
    for place, held in enumerate(found):
        turned = None
        if consts <= place < carry_end:
            _spoil(held, "it starts a loop's carry", spoiled)
        elif held is not None and place < consts:
            turned = each_view(held, lambda v: _turned(v, length, None))
        elif isinstance(held, View):
            own = replace(held, axes=held.axes[1:])
            turned = _turned(own, length, held.axes[0])
        else:
            _spoil(held, "concatenate makes what a loop runs over", spoiled)
        inner.append(turned)
    return survey(flat(as_closed(eqn.params["jaxpr"])), inner, spoiled)


def _turned(view: View, length: int, digits: Digits | None) -> View:
    return replace(view, loops=(*view.loops, Turns(length, digits)))


def _stack(eqn: Any, inner: Tree) -> Tree:
    length = eqn.params["length"]
    return jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), inner)


def _play_scan(
    eqn: Any, level: Level, values: list[Any], probe: Tree
) -> tuple[list[Any], Tree]:
    p = eqn.params
    consts, carried = p["num_consts"], p["num_carry"]
    fixed, start = values[:consts], values[consts : consts + carried]

    def body(carry: Any, turn: Any) -> Any:
        own, own_probe = turn
        outs, records = play(level, [*fixed, *carry, *own], own_probe)
        return outs[:carried], (outs[carried:], records)

    stacked = (values[consts + carried :], probe)
    carry, (outs, records) = lax.scan(
        body, start, stacked, p["length"], p["reverse"], p["unroll"]
    )
    return [*carry, *outs], records


def _survey_remat(eqn: Any, found: list[Held | None], spoiled: Spoiled) -> Level:
    return survey(flat(as_closed(eqn.params["jaxpr"])), found, spoiled)


def _play_remat(
    eqn: Any, level: Level, values: list[Any], probe: Tree
) -> tuple[list[Any], Tree]:
    p = eqn.params
    again = jax.checkpoint(
        lambda args, own: play(level, args, own),
        policy=p["policy"],
        prevent_cse=p["prevent_cse"],
    )
    return again(values, probe)


_REMAT = Loop(_survey_remat, lambda eqn, inner: inner, _play_remat)
_LOOPS = {
    "checkpoint": _REMAT,
    "remat2": _REMAT,
    "scan": Loop(_survey_scan, _stack, _play_scan),
}
_FASTER: dict[str, Callable[[Any], Callable[..., Any] | None]] = {
    "reduce_window_max": pooling,
}
"""Equations whose own derivative is slow, and what evaluates them otherwise."""
