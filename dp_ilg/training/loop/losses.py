"""The loss of one example with its own key, and the mean over its views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dp_ilg.base import Example, Params
from dp_ilg.training.frameworks.keys import example_key

KeyedLoss = Callable[[Params, Example, Any], Any]
_KIND = "threefry2x32"


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
