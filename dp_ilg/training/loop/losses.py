"""The loss of one example with its own key, and the mean over its views."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from dp_ilg.base import Example, Params

KeyedLoss = Callable[[Params, Example, Any], Any]
_KIND = "threefry2x32"


class Adapted(NamedTuple):
    """A model and a loss as the library takes them.

    Attributes:
        params: the tree of arrays that is trained.
        loss: ``(params, example, key) -> scalar``, or with aux, of ONE example.
        rebuild: parameters -> the user's kind of object.
    """

    params: Params
    loss: KeyedLoss
    rebuild: Callable[[Params], Any]


def adapt(model: Any, loss_fn: Callable[..., Any]) -> Adapted:
    """A plain tree of parameters, and a loss of two or three arguments.

    Args:
        model: the tree.
        loss_fn: ``(params, example)`` or ``(params, example, key)``.

    Returns:
        The `Adapted`.

    Example:
        >>> adapt({"w": 1.0}, lambda params, x: params["w"] * x).loss({"w": 2}, 3, None)
        6
    """
    if takes_a_key(loss_fn):
        return Adapted(model, loss_fn, lambda params: params)
    return Adapted(model, lambda p, e, key: loss_fn(p, e), lambda params: params)


def takes_a_key(loss_fn: Callable[..., Any]) -> bool:
    """Whether a loss has a third argument without a default.

    Args:
        loss_fn: of two or three arguments.

    Returns:
        False where nothing is known of its arguments.

    Example:
        >>> takes_a_key(lambda params, x, key: 0.0), takes_a_key(lambda params, x: 0.0)
        (True, False)
    """
    try:
        parameters = inspect.signature(loss_fn).parameters.values()
    except (TypeError, ValueError):
        return False
    placed = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    needed = [p for p in parameters if p.kind in placed and p.default is p.empty]
    return len(needed) == 3


def example_key(key: Any, step: Any, row: Any) -> Any:
    """The key of an example at a step: a function of (key, step, row number) alone.

    Args:
        key: the run's typed key for examples.
        step: which step, from 0; may be traced.
        row: two uint32 words, the high and the low one of the row number.

    Returns:
        A typed key: ``fold_in`` of step, high word and low word, one after the other.

    Example:
        >>> key, row = jax.random.key(0), jnp.array([0, 7], jnp.uint32)
        >>> by_hand = jax.random.fold_in(jax.random.fold_in(key, 3), 0)
        >>> bool((example_key(key, 3, row) == jax.random.fold_in(by_hand, 7)).all())
        True
    """
    for word in (step, row[0], row[1]):
        key = jax.random.fold_in(key, word)
    return key


def with_row_words(loss: KeyedLoss) -> Callable[[Params, Example], Any]:
    """A loss of two arguments whose example carries what its key is made of.

    Args:
        loss: of parameters, example and key.

    Returns:
        A loss of parameters and ``(example, words)``, see `rows.row_words`.

    Example:
        >>> loss = with_row_words(lambda p, x, key: p * x + jax.random.uniform(key))
        >>> words = jnp.array([0, 0, 3, 0, 7], jnp.uint32)
        >>> key = example_key(jax.random.key(0), 3, words[3:])
        >>> bool(loss(2.0, (3.0, words)) == 6.0 + jax.random.uniform(key))
        True
    """

    def of_row(params: Params, example: Example) -> Any:
        rows, words = example
        key = jax.random.wrap_key_data(words[:2], impl=_KIND)
        return loss(params, rows, example_key(key, words[2], words[3:]))

    return of_row


def without_key(loss: KeyedLoss) -> Callable[[Params, Example], Any]:
    """The loss of two arguments, of one that reads no key.

    Example:
        >>> without_key(lambda p, x, key: p * x)(2, 3)
        6
    """
    return lambda params, example: loss(params, example, jax.random.key(0, impl=_KIND))


def reads_key(loss: KeyedLoss, params: Params, example: Example) -> bool:
    """Whether the key decides anything in a loss.

    Args:
        loss: of parameters, example and key.
        params: the parameters, or their shapes.
        example: one example, or its shapes.

    Returns:
        Whether any equation of the loss reads the key.

    Example:
        >>> reads_key(lambda p, x, key: p * x, 1.0, 2.0)
        False
    """
    key = jax.eval_shape(lambda: jax.random.key(0, impl=_KIND))
    jaxpr = jax.make_jaxpr(loss)(params, example, key).jaxpr
    last = jaxpr.invars[-1]
    read = [v for eqn in jaxpr.eqns for v in eqn.invars] + list(jaxpr.outvars)
    return any(v is last for v in read if not isinstance(v, Literal))


def over_views(
    loss: KeyedLoss, views: int, augment: Callable[[Example, Any], Example] | None
) -> KeyedLoss:
    """The mean of a loss over several views of an example: one gradient, one clip.

    Args:
        loss: of one view.
        views: how many there are.
        augment: ``(example, key) -> view``; None where the leaves of an example hold
            the views along a first axis of length `views`. Leaves without such an axis
            (a label, say) are shared by all views.

    Returns:
        The mean loss. View k has the key ``fold_in(key, k)``, split in two: the first
        half goes to `augment`, the second to the loss.

    Example:
        >>> loss = over_views(lambda p, x, key: p * x, 2, None)
        >>> float(loss(2.0, jnp.array([1.0, 3.0]), jax.random.key(0)))
        4.0

    Reference: De et al. 2022, section 3 (augmentation multiplicity).
    """
    if views == 1 and augment is None:
        return loss

    def mean(params: Params, example: Example, key: Any) -> Any:
        def of_view(k: Any, view: Example) -> Any:
            first, second = jax.random.split(jax.random.fold_in(key, k))
            seen = view if augment is None else augment(view, first)
            return loss(params, seen, second)

        axes = jax.tree.map(lambda x: None, example)
        if augment is None:
            axes = view_axes(example, views)
        found = jax.vmap(of_view, (0, axes))(jnp.arange(views), example)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), found)

    return mean


def view_axes(example: Example, views: int) -> Any:
    """Which leaves of an example hold views: those with a first axis of that length.

    Args:
        example: one example, or its shapes.
        views: how many views there are.

    Returns:
        A tree of 0 (a view each) and None (shared by all).

    Raises:
        ValueError: if no leaf has such an axis.

    Example:
        >>> view_axes({"x": jnp.zeros((4, 9)), "y": jnp.zeros(())}, 4)
        {'x': 0, 'y': None}
    """
    axes = jax.tree.map(lambda x: 0 if jnp.shape(x)[:1] == (views,) else None, example)
    if not jax.tree.leaves(axes):
        shapes = [jnp.shape(x) for x in jax.tree.leaves(example)]
        raise ValueError(
            f"views is {views}, but no leaf of an example has a first axis of that "
            f"length (shapes {shapes}); give augment=, or examples that hold their "
            "views along a first axis."
        )
    return axes
