"""Which outputs of a program are its inputs, handed through.

``nnx.jit``, ``nnx.remat`` and ``nnx.scan`` write every variable back, changed or not.
The program shows which ones did change.
"""

from __future__ import annotations

from typing import Any

from jax.extend.core import Literal

_SAME = {"copy", "copy_p", "optimization_barrier"}


def handed_through(jaxpr: Any) -> list[int | None]:
    """For each output of a program, the number of the input it always equals.

    Args:
        jaxpr: the program.

    Returns:
        A number for each output, None where that cannot be said.

    Example:
        >>> import jax
        >>> program = jax.make_jaxpr(lambda a, b: (jax.jit(lambda b: b)(b), a + b))
        >>> handed_through(program(1.0, 2.0).jaxpr)
        [1, None]
    """
    known: dict[Any, int] = {v: k for k, v in enumerate(jaxpr.invars)}

    def number(atom: Any) -> int | None:
        return None if isinstance(atom, Literal) else known.get(atom)

    for equation in jaxpr.eqns:
        inputs = [number(v) for v in equation.invars]
        for out, place in zip(equation.outvars, _places(equation), strict=True):
            found = None if place is None else inputs[place]
            if found is not None:
                known[out] = found
    return [number(v) for v in jaxpr.outvars]


def _places(equation: Any) -> list[int | None]:
    """For each output of an equation, the place of the input it equals."""
    name, params = equation.primitive.name, equation.params
    if name in _SAME:
        return list(range(len(equation.outvars)))
    if name == "scan":
        return _scanned(params)
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)
    fits = hasattr(inner, "eqns") and len(inner.invars) == len(equation.invars)
    if not fits or len(inner.outvars) != len(equation.outvars):
        return [None] * len(equation.outvars)
    return handed_through(inner)


def _scanned(params: dict[str, Any]) -> list[int | None]:
    """A carry that each round returns as it is, and slices that are stacked again."""
    consts, carries = params["num_consts"], params["num_carry"]
    found = handed_through(params["jaxpr"].jaxpr)
    carried = [p if p == consts + k else None for k, p in enumerate(found[:carries])]
    first = consts + carries
    stacked = [p if p is not None and p >= first else None for p in found[carries:]]
    return carried + stacked
