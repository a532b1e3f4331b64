"""What a framework's row hands over: a model, taken apart and put together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dp_ilg.base import Params


class Parts(NamedTuple):
    """A model in parts.

    Attributes:
        params: tree of the floating-point arrays that are trained.
        frozen: tree of arrays that the loss reads and nothing changes.
        call: ``(given, frozen, params, key)`` calls `given` with the object that the
            user's loss takes; the key seeds what the model itself draws.
        rebuild: ``params`` to the user's kind of object.
        draws: whether the model itself draws random numbers.

    Example:
        >>> parts = whole({"w": jnp.ones(2)})
        >>> float(parts.call(lambda p: p["w"].sum(), parts.frozen, parts.params, None))
        2.0
    """

    params: Params
    frozen: Any
    call: Callable[[Callable[[Any], Any], Any, Params, Any], Any]
    rebuild: Callable[[Params], Any]
    draws: bool = False


def whole(params: Params, rebuild: Callable[[Params], Any] = lambda p: p) -> Parts:
    """The parts of a model that is nothing but its parameters.

    Args:
        params: any tree of floating-point arrays.
        rebuild: makes the user's kind of object of trained parameters.

    Returns:
        The `Parts`.

    Example:
        >>> whole({"w": jnp.ones(2)}).draws
        False
    """
    return Parts(params, (), lambda given, _, params, key: given(params), rebuild)


def check_params(params: Params, what: str) -> None:
    """Raises unless every leaf is a floating-point array, and there is one.

    Args:
        params: what would be trained.
        what: how the sentence calls it.

    Raises:
        ValueError: for an empty tree.
        TypeError: for other leaves.

    Example:
        >>> check_params({"w": 3}, "the tree of parameters")
        Traceback (most recent call last):
        TypeError: the tree of parameters holds int at ['w'], but only arrays of ...
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError(f"{what} holds no array to be trained; pass a model with one.")
    for path, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            found = type(leaf).__name__ if dtype is None else f"an array of {dtype}"
            raise TypeError(
                f"{what} holds {found} at {jax.tree_util.keystr(path)}, but only "
                "arrays of real floating-point numbers can be trained; close over it "
                "in the loss, or put it into the example."
            )
