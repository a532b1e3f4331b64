"""One sentence for losses of other arguments, and for losses of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dp_ilg.base import Example, LossFn, Params


def needed_arguments(function: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """Names of the arguments without a default: by place, and by keyword.

    Args:
        function: any callable.

    Returns:
        Both lists; two arguments for what has no signature, or takes any number.

    Example:
        >>> needed_arguments(lambda params, example, scale=1.0, *, key: 0)
        (['params', 'example'], ['key'])
    """
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return ["params", "example"], []
    needed = [p for p in found if p.default is p.empty]
    by_place = [
        p.name for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if any(p.kind is p.VAR_POSITIONAL for p in found):
        by_place += ["params", "example"][len(by_place) :]
    return by_place, [p.name for p in needed if p.kind is p.KEYWORD_ONLY]


def check_arguments(loss_fn: LossFn) -> None:
    """Raises for a loss that cannot be called with parameters and example.

    Args:
        loss_fn: the loss.

    Raises:
        TypeError: for no function, or one that needs other arguments than these two.

    Example:
        >>> check_arguments(lambda params, example, key: 0.0)
        Traceback (most recent call last):
        TypeError: loss_fn takes the arguments (params, example, key), but is given ...
    """
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn is {type(loss_fn).__name__}, but must be a function (params, "
            "example) -> scalar."
        )
    by_place, by_name = needed_arguments(loss_fn)
    optional = _optional(loss_fn)
    if not by_name and len(by_place) <= 2 <= len(by_place) + optional:
        return
    names = ", ".join([*by_place, *by_name])
    raise TypeError(
        f"loss_fn takes the arguments ({names}), but is given parameters and ONE "
        "example: make x, y and a key one example, such as a tuple, and bind the rest "
        "with functools.partial; dp_ilg.private_training also takes a loss (params, "
        "example, key), and makes the keys."
    )


def _optional(function: Callable[..., Any]) -> int:
    """How many arguments by place have a default."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 0
    places = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    return sum(p.kind in places and p.default is not p.empty for p in found)


def traced_loss(loss_fn: LossFn, params: Params, example: Example) -> tuple[Any, Any]:
    """The loss of one example as a program; where that fails, why it may have.

    Args:
        loss_fn: the loss.
        params: the parameters.
        example: one example, as shapes and dtypes.

    Returns:
        What ``jax.make_jaxpr(..., return_shape=True)`` does.

    Raises:
        ValueError: for a loss that fails on one example and works on a batch.
        Exception: what else the loss raises.

    Example:
        >>> x = jax.ShapeDtypeStruct((2,), jnp.float32)
        >>> traced_loss(lambda w, x: jnp.sum(x * w, axis=1).mean(), jnp.ones(2), x)
        Traceback (most recent call last):
        ValueError: loss_fn fails on one example, of shapes [(2,)], and works on a ...
    """
    try:
        return jax.make_jaxpr(loss_fn, return_shape=True)(params, example)
    except NameError:
        raise  # an axis that nobody names
    except Exception as error:
        if not _takes_batches(loss_fn, params, example):
            raise
        shapes = [x.shape for x in jax.tree.leaves(example)]
        raise ValueError(
            f"loss_fn fails on one example, of shapes {shapes}, and works on a batch; "
            "write it for ONE example, without the batch axis and the mean over it."
        ) from error


def _takes_batches(loss_fn: LossFn, params: Params, example: Example) -> bool:
    """Whether a loss that fails on an example gives a number for two of them."""
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype), example
    )
    try:
        found = jax.tree.leaves(jax.eval_shape(loss_fn, params, batch))
    except Exception:
        return False
    return bool(found) and jnp.shape(found[0]) == ()
