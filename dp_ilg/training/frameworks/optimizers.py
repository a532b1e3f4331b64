"""Any Optax transformation behind the noise, and what cannot stand there.

Behind the noise everything sees releases only, so every optimizer of the gradient alone
is welcome. What asks for the loss of the batch, or for a function that computes it
again, asks for private facts, and is refused with what to do instead.
"""

from __future__ import annotations

import inspect
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dp_ilg.base import Params
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.training.frameworks.adapt import parts_of

_PRIVATE_FACTS = {
    "value": "the loss of the batch, which is private; let the rate follow an Optax "
    "schedule of the step in place of reduce_on_plateau, momo or Polyak steps",
    "grad": "the gradient without noise, which is private; use lbfgs(linesearch=None)",
    "value_fn": "a function that computes the private loss again and again; use "
    "lbfgs(linesearch=None) or a schedule of the step in place of a line search",
    "grad_fn": "a function that computes private gradients beside the step's own; use "
    "sam with opaque_mode=False, each half of which is a step of its own",
    "obj_fn": "the private loss, to differentiate it twice; use Adam, whose second "
    "moment comes from the release",
}
"""What an update may ask for beside the gradient; later rows say more than earlier."""


def optimizer_of(model: Any, optimizer: Any = None) -> optax.GradientTransformation:
    """The Optax transformation that is to stand behind the noise.

    Args:
        model: the model of the training, or None where it is not known yet; with it
            the optimizer is tried on the shapes of the parameters.
        optimizer: an Optax transformation, ``optax.MultiSteps``, or an
            ``nnx.Optimizer``, whose `tx` is meant; None takes the `tx` of the model's
            ``TrainState`` or ``nnx.Optimizer``.

    Returns:
        The transformation. ``optax.lookahead`` takes plain parameters here: its slow
        ones are in the state, ``optax.tree.get(state, "slow")``.

    Raises:
        TypeError: for anything that is no optimizer.
        ValueError: for a model without one where none is given, a private optimizer,
            and one that asks for private facts such as the loss.

    Privacy: what it returns sees releases only, so it is post-processing.

    Example:
        >>> tx = optimizer_of({"w": jnp.ones(2)}, optax.adamw(1e-3))
        >>> optimizer_of({"w": jnp.ones(2)}, optax.contrib.reduce_on_plateau())
        Traceback (most recent call last):
        ValueError: The optimizer asks for `value`, the loss of the batch, which is ...
    """
    tx = _transformation(_given(model, optimizer))
    if getattr(tx, "role", ""):
        raise ValueError(
            "The optimizer is private already, so that its noise would be drawn twice; "
            "pass the plain Optax optimizer, such as optax.adamw(1e-3)."
        )
    if getattr(tx.init, "__qualname__", "").startswith("lookahead."):
        tx = slow_in_state(tx)
    tx = _of_the_gradient_alone(tx)
    if model is not None:
        check_update(tx, parts_of(model).params)
    return tx


def check_update(tx: optax.GradientTransformation, params: Params) -> None:
    """Tries an optimizer on shapes alone, and refuses what asks for private facts.

    Args:
        tx: the transformation.
        params: the parameters; only their shapes and dtypes are read.

    Raises:
        ValueError: for an update that needs more than gradient and parameters, or
            returns another tree than the parameters.

    Example:
        >>> check_update(optax.lion(1e-3), {"w": jnp.ones(2)})
    """
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    given = dict(geometry=Geometry.uniform(params), l2_clip_norm=jnp.float32(1))
    update = optax.with_extra_args_support(tx).update
    try:
        after = jax.eval_shape(lambda p: update(p, tx.init(p), p, **given)[0], shapes)
    except jax.errors.ConcretizationTypeError:
        return  # asks for values; they are known to the first step
    except Exception as error:
        raise _refusal(error) from error
    same = jax.tree.structure(after) == jax.tree.structure(shapes)
    pairs = zip(jax.tree.leaves(after), jax.tree.leaves(shapes), strict=same)
    if not same or any(a.shape != p.shape for a, p in pairs):
        raise _other_shapes()


class SlowInState(NamedTuple):
    """State of `slow_in_state`.

    Attributes:
        lookahead: the state of ``optax.lookahead``.
        slow: the slow parameters, by which to test.
    """

    lookahead: Any
    slow: Params


def slow_in_state(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """``optax.lookahead`` for plain parameters, which are its fast ones.

    Args:
        tx: what ``optax.lookahead`` returned.

    Returns:
        The transformation with the slow parameters in its state.

    Privacy: post-processing.

    Example:
        >>> tx = slow_in_state(optax.lookahead(optax.sgd(1.0), 2, 0.5))
        >>> params = jnp.zeros(1)
        >>> state = tx.init(params)
        >>> updates, state = tx.update(-jnp.ones(1), state, params)
        >>> updates.tolist(), optax.tree.get(state, "slow").tolist()
        ([1.0], [0.0])

    Reference: Zhang et al. 2019 (Lookahead).
    """

    def init(params: Params) -> SlowInState:
        slow = jax.tree.map(jnp.array, params)  # copies: parameters may be donated
        return SlowInState(tx.init(optax.LookaheadParams.init_synced(params)), slow)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, SlowInState]:
        both: Any = optax.LookaheadParams(params, state.slow)
        found: tuple[Any, Any] = tx.update(updates, state.lookahead, both)
        steps, after = found
        moved: Any = optax.apply_updates(both, steps)
        return steps.fast, SlowInState(after, moved.slow)

    return optax.GradientTransformation(init, update)


def _given(model: Any, optimizer: Any) -> Any:
    """What stands for the optimizer: the argument, or the model's own."""
    if optimizer is not None:
        return optimizer
    holder = model[-1] if isinstance(model, tuple) and model else model
    found = getattr(holder, "tx", None)
    if found is None:
        raise ValueError(
            f"No optimizer was given, and {type(holder).__name__} holds none; pass one "
            "of Optax, such as optax.adamw(1e-3)."
        )
    return found


def _transformation(found: Any) -> Any:
    """The transformation in a ``MultiSteps``, an ``nnx.Optimizer`` or a TrainState."""
    found = getattr(found, "tx", found)
    if isinstance(found, optax.MultiSteps):
        found = found.gradient_transformation()
    if not (callable(getattr(found, "init", None)) and hasattr(found, "update")):
        raise TypeError(
            f"optimizer is {type(found).__name__}, but must be a transformation of "
            "Optax, such as optax.adamw(1e-3)."
        )
    return found


def _other_shapes() -> ValueError:
    return ValueError(
        "The optimizer takes or returns other shapes than the parameters; what clips "
        "or adds up examples, such as optax.contrib.dpsgd, has no place behind the "
        "noise, so pass the optimizer alone."
    )


def _of_the_gradient_alone(tx: Any) -> Any:
    """An update that says it takes further arguments, and does not (``optax.sam``)."""
    if not isinstance(tx, optax.GradientTransformationExtraArgs):
        return tx
    kinds = {p.kind for p in inspect.signature(tx.update).parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return tx
    return optax.GradientTransformation(tx.init, tx.update)


def _refusal(error: Exception) -> ValueError:
    """Why an optimizer cannot stand behind the noise, and what can."""
    text = str(error)
    asked = [name for name in _PRIVATE_FACTS if re.search(rf"\b{name}\b", text)]
    if asked and re.search(r"missing|must be provided", text):
        return ValueError(
            f"The optimizer asks for `{asked[-1]}`, {_PRIVATE_FACTS[asked[-1]]}."
        )
    if "batch dimension" in text:
        return _other_shapes()
    if "'fast'" in text:
        return ValueError(
            "optax.lookahead inside of another transformation cannot see its slow "
            "parameters; put it outermost, optax.lookahead(optax.chain(...), ...)."
        )
    return ValueError(
        "The optimizer cannot be used on a gradient and these parameters alone: "
        f"{' '.join(text.split())[:300]}"
    )
