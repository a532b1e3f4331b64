"""One door for the models of all frameworks: a table, a row a framework.

Whatever a model is, training needs the tree of its floating-point arrays, the loss of
one example as a pure function of that tree, and the way back to the user's own object.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from dp_ilg.base import Example, Params
from dp_ilg.training.frameworks import filtered, modules, trees
from dp_ilg.training.frameworks.losses import keyed
from dp_ilg.training.frameworks.parts import Parts


class Framework(NamedTuple):
    """A row of `FRAMEWORKS`.

    Attributes:
        name: of the framework, and of the kind of object.
        recognises: whether a model is of this kind; imports nothing.
        split: ``(model, wrt) -> Parts``; refuses what mixes examples.

    Example:
        >>> FRAMEWORKS[-1].name
        'plain tree'
    """

    name: str
    recognises: Callable[[Any], bool]
    split: Callable[[Any, Any], Parts]


FRAMEWORKS: tuple[Framework, ...] = (
    Framework("nnx.Optimizer", modules.is_with_optimizer, modules.split_with_optimizer),
    Framework("nnx.Module", modules.is_module, modules.split_module),
    Framework("linen TrainState", trees.is_train_state, trees.split_train_state),
    Framework("equinox.Module", filtered.is_filtered, filtered.split_filtered),
    Framework("plain tree", lambda model: True, trees.split_tree),
)
"""The first row that recognises a model takes it apart."""


class Adapted(NamedTuple):
    """A model and its loss, ready for training.

    Attributes:
        params: tree of the floating-point arrays that are trained.
        loss: ``(params, example, key=None)`` to what the user's loss returns, of ONE
            example: a scalar, or (scalar, aux). Pure; it holds `frozen`.
        rebuild: ``params`` to the user's kind of object with these parameters.
        random: whether `loss` reads its key.
        frozen: tree of arrays that the loss reads beside the parameters.
        loss_with: ``(frozen, params, example, key)``, for who would rather hand
            `frozen` to a compiled step than have it inside.
        framework: name of the row.

    Privacy: `loss` gives raw values of an example, which must not leave.

    Example:
        >>> import jax.numpy as jnp
        >>> adapt({"w": jnp.ones(2)}, lambda p, x: p["w"] @ x).framework
        'plain tree'
    """

    params: Params
    loss: Callable[..., Any]
    rebuild: Callable[[Params], Any]
    random: bool
    frozen: Any
    loss_with: Callable[[Any, Params, Example, Any], Any]
    framework: str


def adapt(model: Any, loss_fn: Callable[..., Any], *, wrt: Any = None) -> Adapted:
    """Takes a model of any framework apart, and makes its loss a pure function.

    Args:
        model: a tree of arrays (a linen or Haiku dictionary), a linen ``TrainState``,
            an ``nnx.Module``, ``(nnx.Module, nnx.Optimizer)``, or an Equinox module.
        loss_fn: ``(model, example)`` or ``(model, example, key)``, of ONE example, to
            a scalar, or (scalar, aux). It takes what the framework's own losses take:
            parameters for trees and a ``TrainState``, else the module.
        wrt: what is trained: an NNX filter (``nnx.Param``), or a filter of
            ``equinox.partition``; None for the usual.

    Returns:
        The `Adapted`. The key is the example's own; a loss of two arguments ignores
        it, and an NNX module with ``Rngs`` of its own draws from it.

    Raises:
        ValueError: for batch norm in training mode, other state that mixes examples,
            nothing to train, or a `wrt` that the model has no use for.
        TypeError: for parameters that are no floating-point arrays, or a loss with
            other arguments.

    Privacy:
        The loss sees one example and one key. Everything of the model that is not
        trained must be public, or come from other private training that is accounted.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> module = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> adapted = adapt(module, lambda module, x: module(x)[0] ** 2)
        >>> sorted(adapted.params), type(adapted.rebuild(adapted.params)).__name__
        (['bias', 'kernel'], 'Linear')
        >>> adapted.loss(adapted.params, jnp.zeros(2), jax.random.key(0)).shape
        ()
    """
    call, takes_key = keyed(loss_fn)
    row, parts = framework_of(model), parts_of(model, wrt)

    def loss_with(frozen: Any, params: Params, example: Example, key: Any) -> Any:
        given = lambda model: call(model, example, key)  # noqa: E731
        return parts.call(given, frozen, params, key)

    def loss(params: Params, example: Example, key: Any = None) -> Any:
        return loss_with(parts.frozen, params, example, key)

    facts = (takes_key or parts.draws, parts.frozen, loss_with, row.name)
    return Adapted(parts.params, loss, parts.rebuild, *facts)


def framework_of(model: Any) -> Framework:
    """The row of `FRAMEWORKS` that a model belongs to.

    Args:
        model: any model.

    Returns:
        The first row that recognises it.

    Example:
        >>> framework_of({"linear": {"w": 1.0}}).name
        'plain tree'
    """
    return next(row for row in FRAMEWORKS if row.recognises(model))


def parts_of(model: Any, wrt: Any = None) -> Parts:
    """A model in parts, as its framework's row takes it apart.

    Args:
        model: as for `adapt`.
        wrt: as for `adapt`.

    Returns:
        The `Parts`.

    Raises:
        ValueError: as `adapt`.
        TypeError: as `adapt`.

    Example:
        >>> import jax.numpy as jnp
        >>> parts_of({"w": jnp.ones(2)}).params["w"].shape
        (2,)
    """
    return framework_of(model).split(model, wrt)
