"""Rows of plain trees (Haiku's dictionaries among them) and linen's TrainState."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dp_ilg.training.frameworks.parts import Parts, check_params, whole


def is_train_state(model: Any) -> bool:
    """Whether it is a ``TrainState`` of linen, or one written like it.

    Example:
        >>> is_train_state({"w": 1.0})
        False
    """
    fields = ("params", "tx", "opt_state", "replace", "apply_gradients")
    return not isinstance(model, type) and all(hasattr(model, f) for f in fields)


def split_train_state(model: Any, wrt: Any) -> Parts:
    """The parameters of a ``TrainState``; the loss takes them, as linen's losses do.

    Args:
        model: the state; a class made from ``TrainState`` keeps its other fields.
        wrt: must be None.

    Returns:
        The `Parts`; the state that is rebuilt has the trained parameters, and the
        ``opt_state`` and ``step`` that it came with.

    Raises:
        ValueError: for a `wrt`, and as `split_tree`.
        TypeError: as `split_tree`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from flax.training.train_state import TrainState
        >>> made = TrainState.create(
        ...     apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1))
        >>> parts = split_train_state(made, None)
        >>> parts.rebuild({"w": jnp.zeros(2)}).params["w"].tolist()
        [0.0, 0.0]
    """
    refuse_wrt(wrt, "a TrainState")
    _refuse_collections(model.params, "the TrainState's params")
    check_params(model.params, "the TrainState's params")
    return whole(model.params, lambda params: model.replace(params=params))


def split_tree(model: Any, wrt: Any) -> Parts:
    """A tree of arrays, which is its own parameters.

    Args:
        model: nested dicts, lists, dataclasses or what else JAX knows as a tree.
        wrt: must be None.

    Returns:
        The `Parts`.

    Raises:
        ValueError: for a `wrt`, an empty tree, or linen's batch statistics.
        TypeError: for leaves that are no floating-point arrays, and for a module of
            linen or Haiku in place of its parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> split_tree({"w": jnp.ones(2)}, None).draws
        False
    """
    refuse_wrt(wrt, "a plain tree")
    if callable(getattr(model, "init", None)) and hasattr(model, "apply"):
        raise TypeError(
            f"The model is {type(model).__name__}, which has init and apply, but holds "
            "no parameters; pass what its init returned, for linen model.init(key, x)"
            "['params']."
        )
    _refuse_collections(model, "the tree of parameters")
    check_params(model, "the tree of parameters")
    return whole(model)


def refuse_wrt(wrt: Any, what: str) -> None:
    """Raises where a choice of variables is given to a model that has none.

    Raises:
        ValueError: for anything but None.

    Example:
        >>> refuse_wrt(None, "a plain tree")
    """
    if wrt is not None:
        raise ValueError(
            f"wrt is {wrt!r}, but {what} has no kinds of variables; freeze parts by "
            "layers=dp_ilg.layers.by_module(frozen=[...])."
        )


def _refuse_collections(params: Any, what: str) -> None:
    if isinstance(params, Mapping) and "batch_stats" in params:
        raise ValueError(
            f"{what} holds linen's batch_stats, which would be trained as if they "
            "were parameters; pass variables['params'], and replace BatchNorm by "
            "GroupNorm or LayerNorm, or close over frozen statistics in the loss and "
            "call BatchNorm with use_running_average=True."
        )
