"""Rows of Flax NNX: modules, with or without the optimizer beside them.

A module is split once into its graph and three trees: what is trained, its random
streams, and the rest. The loss puts it together anew for every example, inside the
trace, so that no module object is shared by traces and none is left changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax

from dp_ilg.base import Params
from dp_ilg.training.frameworks.parts import Parts, check_params
from dp_ilg.training.frameworks.unchanged import handed_through

_STREAMS = 0x524E6773
"""Folded into an example's key for the streams, which the loss's own key must not
meet."""


def nnx() -> Any:
    """``flax.nnx`` if the program uses it, else None.

    Example:
        >>> from flax import nnx as flax_nnx
        >>> nnx() is flax_nnx
        True
    """
    return sys.modules.get("flax.nnx")


def is_module(model: Any) -> bool:
    """Whether it is an ``nnx.Module``.

    Example:
        >>> is_module({"w": 1.0})
        False
    """
    return nnx() is not None and isinstance(model, nnx().Module)


def is_optimizer(model: Any) -> bool:
    """Whether it is an ``nnx.Optimizer``.

    Example:
        >>> is_optimizer({"w": 1.0})
        False
    """
    return nnx() is not None and isinstance(model, nnx().Optimizer)


def is_with_optimizer(model: Any) -> bool:
    """Whether it is an ``nnx.Optimizer``, alone or behind its module.

    Example:
        >>> is_with_optimizer(({"w": 1.0}, {"b": 1.0}))
        False
    """
    pair = isinstance(model, tuple) and len(model) == 2 and is_module(model[0])
    return is_optimizer(model) or (pair and is_optimizer(model[1]))


def split_with_optimizer(model: Any, wrt: Any) -> Parts:
    """A module and its optimizer: the module, trained where the optimizer says.

    Args:
        model: ``(module, optimizer)``, or an ``nnx.ModelAndOptimizer``.
        wrt: a filter in place of the optimizer's own, or None.

    Returns:
        The `Parts`; what is rebuilt is of the same kind, and its optimizer is the one
        given, whose own state private training does not use.

    Raises:
        ValueError: for an optimizer alone, which has no module, and as `split_module`.
        TypeError: as `split_module`.

    Example:
        >>> import optax
        >>> from flax import nnx
        >>> module = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
        >>> sorted(split_with_optimizer((module, optimizer), None).params)
        ['bias', 'kernel']
    """
    if isinstance(model, tuple):
        module, optimizer = model
        parts = split_module(module, optimizer.wrt if wrt is None else wrt)
        return parts._replace(rebuild=lambda p: (parts.rebuild(p), optimizer))
    if not isinstance(model, nnx().ModelAndOptimizer):
        raise ValueError(
            "An nnx.Optimizer holds no module; pass the module, or both as (module, "
            "optimizer)."
        )
    parts = split_module(model.model, model.wrt if wrt is None else wrt)

    def rebuild(params: Params) -> Any:
        rebuilt = nnx().clone(model)
        nnx().update(rebuilt.model, params)
        return rebuilt

    return parts._replace(rebuild=rebuild)


def split_module(model: Any, wrt: Any) -> Parts:
    """The variables of a module that are trained, and the rest of it.

    Args:
        model: the module; it is read once and not changed.
        wrt: an NNX filter of what is trained; None is ``nnx.Param``.

    Returns:
        The `Parts`. Parameters are nested dictionaries. The streams of its ``Rngs``
        are seeded anew for every example, from the example's key.

    Raises:
        ValueError: for a module with BatchNorm in training mode, or without anything
            to train; the call raises where a loss writes other variables.
        TypeError: for variables of `wrt` that are no floating-point arrays.

    Privacy:
        Each example is computed by a module of its own, so that nothing goes from one
        to the next.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> module = nnx.Sequential(
        ...     nnx.Linear(2, 1, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
        >>> parts = split_module(module, None)
        >>> parts.draws, list(parts.params)
        (True, ['layers'])
    """
    flax = nnx()
    _refuse_batch_norm(model)
    wrt = flax.Param if wrt is None else wrt
    graph, rngs, trained, rest = flax.split(model, flax.RngState, wrt, ...)
    params = flax.to_pure_dict(trained)
    check_params(params, f"the module's variables of wrt={_named(wrt)}")
    frozen = flax.to_pure_dict(rngs), flax.to_pure_dict(rest)
    draws = bool(jax.tree.leaves(frozen[0]))

    def merged(params: Params, rngs: Any, rest: Any) -> Any:
        return flax.merge(graph, params, rngs, rest)

    def call(given: Callable[[Any], Any], frozen: Any, params: Params, key: Any) -> Any:
        rngs, rest = frozen
        rngs = reseeded(rngs, key) if draws else rngs
        module = merged(params, rngs, rest)
        before = _values(module)
        value = given(module)

        def after(params: Params, rest: Any) -> dict[Any, Any]:
            again = merged(params, rngs, rest)
            given(again)
            return {path: value for path, (_, value) in _values(again).items()}

        _refuse_writes(before, _values(module), lambda: _changes(after, params, rest))
        return value

    return Parts(params, frozen, call, lambda p: merged(p, *frozen), draws)


def reseeded(rngs: Any, key: Any) -> Any:
    """Random streams that begin anew, each with a key of its own.

    Args:
        rngs: nested dictionary of the keys and counts of the streams.
        key: an example's key.

    Returns:
        The same dictionary, with other keys, and counts of 0.

    Raises:
        ValueError: for no key.

    Example:
        >>> streams = {"key": jax.random.key(1), "count": jax.numpy.uint32(3)}
        >>> int(reseeded(streams, jax.random.key(2))["count"])
        0
    """
    if key is None:
        raise ValueError(
            "The module draws from its own Rngs, but no key was given; pass one key an "
            "example, or call module.eval()."
        )
    base = jax.random.fold_in(key, _STREAMS)
    leaves, treedef = jax.tree.flatten(rngs)
    fresh = [_seeded(jax.random.fold_in(base, k), x) for k, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, fresh)


def _seeded(key: Any, leaf: Any) -> Any:
    if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.numpy.zeros_like(leaf)
    return jax.random.split(key, leaf.shape) if leaf.shape else key


def _named(wrt: Any) -> str:
    return getattr(wrt, "__name__", repr(wrt))


def _refuse_batch_norm(model: Any) -> None:
    for path, module in nnx().iter_modules(model):
        if isinstance(module, nnx().BatchNorm) and not module.use_running_average:
            place = "/".join(map(str, path)) or "the module itself"
            raise ValueError(
                f"BatchNorm ({place}) is in training mode, where it mixes the examples "
                "of a batch; replace it by nnx.GroupNorm or nnx.LayerNorm, or freeze "
                "its statistics by model.set_attributes(nnx.BatchNorm, "
                "use_running_average=True)."
            )


def _values(module: Any) -> dict[Any, tuple[Any, Any]]:
    """Each variable's kind and value by its path, random streams left out."""
    flat = nnx().to_flat_state(nnx().state(module))
    kinds = (nnx().RngState, nnx().Intermediate)
    kept = [(path, v) for path, v in flat if not isinstance(v, kinds)]
    return {path: (type(v), v.get_raw_value()) for path, v in kept}


def _changes(after: Callable[..., Any], params: Params, rest: Any) -> set[Any]:
    """Paths of the variables that a loss leaves with another value."""
    inputs = jax.tree_util.tree_leaves_with_path((params, rest))
    paths = [tuple(getattr(k, "key", k) for k in path[1:]) for path, _ in inputs]
    closed, out = jax.make_jaxpr(after, return_shape=True)(params, rest)
    names = jax.tree.leaves({path: _Name(path) for path in out})
    found = handed_through(closed.jaxpr)
    pairs = zip(names, found, strict=True)
    return {n.path for n, k in pairs if k is None or paths[k] != n.path}


class _Name:
    """A path where a tree has a leaf."""

    def __init__(self, path: Any) -> None:
        self.path = path


def _refuse_writes(
    before: dict[Any, Any], now: dict[Any, Any], changes: Callable[[], set[Any]]
) -> None:
    """A value that is written would be of one example; it must go nowhere."""
    written = [
        p for p, (_, v) in now.items() if p not in before or before[p][1] is not v
    ]
    if not written or not (real := [p for p in written if p in changes()]):
        return
    path = real[0]
    raise ValueError(
        f"The loss writes {'/'.join(map(str, path))} ({now[path][0].__name__}) of the "
        "module, which would carry one example to the next; call the module so that it "
        "keeps its state, such as BatchNorm with use_running_average=True, or return "
        "the value as aux."
    )
