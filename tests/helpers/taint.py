"""Which values of a traced program depend on private inputs, and what that steers.

A walk over a jaxpr: an output is tainted if any input of its equation is. A branch or
loop whose predicate is tainted would take time that depends on data; a callback would
carry data to the host, and an effect is a log or an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core


class Finding(NamedTuple):
    """A place where data steer something, or could leave."""

    kind: str  # "branch", "loop", "effect"
    primitive: str
    source: str


def findings(fn: Callable, public: Sequence[Any], private: Sequence[Any]) -> list:
    """Traces ``fn(*public, *private)`` and lists what depends on the private part.

    Args:
        fn: the program.
        public: arguments that may steer: parameters, state, shapes.
        private: arguments that may not.

    Returns:
        The findings, in program order.
    """
    closed = jax.make_jaxpr(fn)(*public, *private)
    count = len(jax.tree.leaves(tuple(public)))
    taint = [i >= count for i in range(len(closed.jaxpr.invars))]
    found: list[Finding] = []
    _walk(closed.jaxpr, taint, found)
    return list(dict.fromkeys(found))


def _walk(jaxpr: Any, taint: Sequence[bool], found: list[Finding]) -> list[bool]:
    """Returns which outputs are tainted."""
    known = dict(zip(jaxpr.invars, taint, strict=True))

    def is_tainted(atom: Any) -> bool:
        return not isinstance(atom, core.Literal) and known.get(atom, False)

    for eqn in jaxpr.eqns:
        inputs = [is_tainted(x) for x in eqn.invars]
        outputs = _equation(eqn, inputs, found)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [is_tainted(x) for x in jaxpr.outvars]


def _equation(eqn: Any, inputs: list[bool], found: list[Finding]) -> list[bool]:
    name = eqn.primitive.name
    source = str(getattr(eqn.source_info.traceback, "frames", [""])[:1])

    def note(kind: str) -> None:
        found.append(Finding(kind, name, source))

    if eqn.effects or "callback" in name or "debug" in name or "infeed" in name:
        note("effect")
    if name == "cond":
        return _cond(eqn, inputs, found, note)
    if name == "while":
        return _while(eqn, inputs, found, note)
    if name == "scan":
        return _scan(eqn, inputs, found)
    inner = _inner(eqn)
    if inner is not None and len(inner.invars) == len(inputs):
        return _walk(inner, inputs, found)
    if inner is not None:  # a call in some other form: all of it depends on all
        any_input = any(inputs)
        _walk(inner, [any_input] * len(inner.invars), found)
    return [any(inputs)] * len(eqn.outvars)


def _inner(eqn: Any) -> Any:
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            inner = eqn.params[name]
            return getattr(inner, "jaxpr", inner)
    return None


def _cond(eqn: Any, inputs: list[bool], found: list, note: Callable) -> list[bool]:
    if inputs[0]:
        note("branch")
    outs = [_walk(b.jaxpr, inputs[1:], found) for b in eqn.params["branches"]]
    return [inputs[0] or any(column) for column in zip(*outs, strict=True)]


def _while(eqn: Any, inputs: list[bool], found: list, note: Callable) -> list[bool]:
    split, both = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    tests, consts = inputs[:split], inputs[split : split + both]
    body, test = eqn.params["body_jaxpr"].jaxpr, eqn.params["cond_jaxpr"].jaxpr
    carry = _settled(lambda c: _walk(body, consts + c, found), inputs[split + both :])
    if _walk(test, tests + carry, found)[0]:
        note("loop")
        return [True] * len(carry)
    return carry


def _scan(eqn: Any, inputs: list[bool], found: list) -> list[bool]:
    split, size = eqn.params["num_consts"], eqn.params["num_carry"]
    consts, xs = inputs[:split], inputs[split + size :]
    body = eqn.params["jaxpr"].jaxpr
    run = lambda c: _walk(body, consts + c + xs, found)  # noqa: E731
    carry = _settled(lambda c: run(c)[:size], inputs[split : split + size])
    return carry + run(carry)[size:]


def _settled(step: Callable, carry: list[bool]) -> list[bool]:
    """Taint that goes round a loop, until no more of it does."""
    while True:
        after = [a or b for a, b in zip(carry, step(carry), strict=True)]
        if after == carry:
            return carry
        carry = after
