"""The row of Equinox: trees in which arrays, functions and settings stand together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax

from dp_ilg.base import Params
from dp_ilg.training.frameworks.parts import Parts, check_params


def equinox() -> Any:
    """``equinox`` if the program uses it, else None.

    Example:
        >>> import equinox as eqx
        >>> equinox() is eqx
        True
    """
    return sys.modules.get("equinox")


def is_filtered(model: Any) -> bool:
    """Whether a tree is, or holds, an Equinox module.

    Example:
        >>> is_filtered({"w": 1.0})
        False
    """
    return equinox() is not None and any(map(_is_node, _nodes(model, _is_node)))


def split_filtered(model: Any, wrt: Any) -> Parts:
    """The floating-point arrays of an Equinox model; all else stays as it is.

    Args:
        model: a module, or a tree with modules in it.
        wrt: a filter in the sense of ``equinox.partition``; None takes every
            floating-point array.

    Returns:
        The `Parts`; parameters are the model with None for all else.

    Raises:
        ValueError: for BatchNorm in training mode, an ``eqx.nn.State`` inside the
            model, or nothing to train.
        TypeError: for a filter that picks other things than floating-point arrays.

    Privacy:
        What is not trained must not have been made from the private data.

    Example:
        >>> import equinox as eqx
        >>> made = eqx.nn.MLP(2, 1, width_size=4, depth=1, key=jax.random.key(0))
        >>> parts = split_filtered(made, None)
        >>> len(jax.tree.leaves(parts.params)), type(parts.rebuild(parts.params))
        (4, <class 'equinox.nn._mlp.MLP'>)
    """
    eqx = equinox()
    _refuse_state(model)
    spec = eqx.is_inexact_array if wrt is None else wrt
    params, others = eqx.partition(model, spec)
    check_params(params, "what the filter picks of the Equinox model")
    frozen, static = eqx.partition(others, eqx.is_array)

    def call(given: Callable[[Any], Any], frozen: Any, params: Params, key: Any) -> Any:
        return given(eqx.combine(params, frozen, static))

    return Parts(params, frozen, call, lambda p: eqx.combine(p, others))


def _is_node(x: Any) -> bool:
    return isinstance(x, (equinox().Module, equinox().nn.State))


def _nodes(model: Any, is_leaf: Callable[[Any], bool]) -> list[Any]:
    return jax.tree.leaves(model, is_leaf=is_leaf)


def _refuse_state(model: Any) -> None:
    eqx = equinox()
    kinds = (eqx.nn.State, eqx.nn.BatchNorm)
    for node in _nodes(model, lambda x: isinstance(x, kinds)):
        if isinstance(node, eqx.nn.State):
            raise ValueError(
                "The model holds an eqx.nn.State, whose arrays are no parameters; pass "
                "the module alone, and close over a state of frozen statistics in the "
                "loss."
            )
        if isinstance(node, eqx.nn.BatchNorm) and not node.inference:
            raise ValueError(
                "eqx.nn.BatchNorm is in training mode, where it mixes the examples of "
                "a batch; replace it by eqx.nn.GroupNorm or eqx.nn.LayerNorm, or "
                "freeze its statistics by eqx.nn.inference_mode."
            )
