"""Refuses, at the door, losses that mix examples, show them or do without them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from dp_ilg.base import Example, LossFn, Params
from dp_ilg.clipping.losses.advice import traced_loss
from dp_ilg.clipping.losses.row_statistics import refuse_row_statistics

_HOME = str(Path(jax.__file__).parent)
_REFUSED = {
    "pure_callback": "hands whole batches to a function on the host, where examples "
    "can be mixed or shown; compute its result beforehand as a part of the example, or "
    "write it in JAX",
    "custom_vmap_call": "has a rule of its own for batches, which can mix examples; "
    "take jax.custom_batching.custom_vmap out of the loss",
}


def check_loss(
    loss_fn: LossFn, params: Params, example: Example, measures: bool = False
) -> None:
    """Raises unless the loss of one example is one real number that depends on it.

    Args:
        loss_fn: the loss.
        params: the parameters.
        example: one example, as shapes and dtypes.
        measures: whether it gives the values of metrics beside its own.

    Raises:
        ValueError: for a loss that is not scalar, ignores the example, has effects
            such as printing, calls back to the host (``jax.pure_callback`` too), has
            a rule of its own for batches, or asks for statistics of the batch,
            also of a batch of one row; forward or in a derivative of its own.

    Privacy: what is refused could mix examples behind the engine's back, or show
    single ones; what a foreign kernel (``jax.ffi``) does cannot be seen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.ShapeDtypeStruct((2,), jnp.float32)
        >>> check_loss(lambda w, x: jnp.sum(w), jnp.ones(2), x)
        Traceback (most recent call last):
        ValueError: The loss ignores the example; it must use its second argument.
    """
    jaxpr, out = _traced(loss_fn, params, example)
    shapes = jax.tree.leaves(out)
    if len(shapes) != 1 + measures or shapes[0].shape != ():
        raise no_scalar(shapes)
    if not jnp.issubdtype(shapes[0].dtype, jnp.floating):
        raise ValueError(
            f"The loss is {shapes[0].dtype}, but must be a real floating-point number."
        )
    if not _depends(jaxpr, len(jax.tree.leaves(example))):
        raise ValueError(
            "The loss ignores the example; it must use its second argument."
        )
    refuse_row_statistics(jaxpr, len(jax.tree.leaves(params)))


def no_scalar(outputs: list[Any]) -> ValueError:
    """What to raise for a loss of these outputs, which are not one number."""
    return ValueError(
        f"The loss of one example has shapes {[jnp.shape(x) for x in outputs]}, but "
        "must be one scalar; reduce it, and return nothing beside it, or a pair (loss, "
        "aux) with has_aux=True."
    )


def _depends(jaxpr: Any, count: int) -> bool:
    """Whether the loss is reached from the last `count` inputs."""
    reached = set(jaxpr.invars[-count:]) if count else set()
    for equation in jaxpr.eqns:
        inputs = {v for v in equation.invars if not isinstance(v, Literal)}
        if inputs & reached:
            reached |= set(equation.outvars)
    loss = jaxpr.outvars[:1]
    return any(v in reached for v in loss if not isinstance(v, Literal))


def _traced(loss_fn: LossFn, params: Params, example: Example) -> tuple[Any, Any]:
    """The loss of one example as a program, refusing what reaches beyond it."""
    try:
        closed, out = traced_loss(loss_fn, params, example)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise _mixing(str(error).split(".")[0]) from None
    _refuse_effects(closed)
    if any(map(has_own_derivative, equations(closed.jaxpr))):
        whole = lambda *args: sum(map(jnp.sum, jax.tree.leaves(loss_fn(*args))), 0.0)  # noqa: E731
        _refuse_effects(jax.make_jaxpr(jax.grad(whole))(params, example))
    return closed.jaxpr, out


def _refuse_effects(closed: Any) -> None:
    """Raises for effects, and for calls that leave the program of one example."""
    effects = closed.effects
    if any("NamedAxis" in type(effect).__name__ for effect in effects):
        raise _mixing("it names a mapped axis")
    names = {equation.primitive.name for equation in equations(closed.jaxpr)}
    for name in sorted(names & set(_REFUSED)):
        raise ValueError(f"The loss contains {name}, which {_REFUSED[name]}.")
    kinds = sorted({type(effect).__name__ for effect in effects})
    if any("MutableArray" in kind for kind in kinds):
        raise ValueError(
            "The loss writes into an array in place (jax.new_ref), which no engine "
            "takes; write it with x.at[...].set, or with jax.lax.scan."
        )
    if kinds:
        raise ValueError(
            f"The loss has effects ({', '.join(kinds)}), which would show single "
            "examples; take jax.debug.print, io_callback, checkify.check and the like "
            "out of it."
        )


def _mixing(found: str) -> ValueError:
    return ValueError(
        f"The loss asks for statistics over other examples ({found}), which would mix "
        "them; replace BatchNorm by GroupNorm or LayerNorm and drop axis_name."
    )


def has_own_derivative(equation: Any) -> bool:
    """Whether an equation's derivative is not JAX's: it is no part of the program."""
    name = equation.primitive.name
    if name.startswith("custom_jvp"):
        inner = equation.params["call_jaxpr"].jaxpr
        return not str(inner.debug_info.func_filename).startswith(_HOME)
    return name.startswith("custom_vjp")


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation of a program, the ones within others included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
