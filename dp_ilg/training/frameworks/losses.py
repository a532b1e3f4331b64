"""Losses of two or three arguments: which of them get a key of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from dp_ilg.clipping.losses.advice import needed_arguments

_KEYS = ("key", "rng", "rngs")
"""Names under which a loss may ask for its key by keyword."""


def keyed(loss_fn: Callable[..., Any]) -> tuple[Callable[..., Any], bool]:
    """A loss as a function of model, example and key, and whether it uses the key.

    Args:
        loss_fn: ``(model, example)``, ``(model, example, key)`` or
            ``(model, example, *, key)``; further arguments must have defaults.

    Returns:
        ``(model, example, key) -> what loss_fn returns``, and whether it takes a key.

    Raises:
        TypeError: for no function, or for other arguments.

    Example:
        >>> call, takes = keyed(lambda model, example: model * example)
        >>> call(2, 3, None), takes, keyed(lambda model, example, key: 0)[1]
        (6, False, True)
        >>> keyed(lambda params, x, y, key: 0)
        Traceback (most recent call last):
        TypeError: loss_fn takes 4 arguments (params, x, y, key), but must take ...
    """
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn is {type(loss_fn).__name__}, but must be a function (model, "
            "example) or (model, example, key)."
        )
    asked, by_name = arguments(loss_fn)
    if len(asked) > 3 or len(asked) + len(by_name) < 2 or len(by_name) > 1:
        names = ", ".join([*asked, *by_name])
        raise TypeError(
            f"loss_fn takes {len(asked) + len(by_name)} arguments ({names}), but must "
            "take (model, example) or (model, example, key): make the example one tree,"
            " such as a tuple, and bind anything else with functools.partial."
        )
    if by_name:
        name = by_name[0]
        return lambda model, example, key: loss_fn(model, example, **{name: key}), True
    if len(asked) == 3:
        return lambda model, example, key: loss_fn(model, example, key), True
    return lambda model, example, key: loss_fn(model, example), False


def arguments(function: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """Names of what a loss is given: by place, and by keyword.

    A third argument, or one by keyword, that is called key or rng counts even if it has
    a default.

    Args:
        function: any callable; one without a signature counts as of two arguments.

    Returns:
        Both lists.

    Example:
        >>> arguments(lambda model, example, key=None, scale=1.0: 0)
        (['model', 'example', 'key'], [])
    """
    by_place, by_name = needed_arguments(function)
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return by_place, by_name
    places = [
        p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    for place, p in enumerate(places[:3]):
        wanted = place < 2 or p.name in _KEYS
        if p.default is not p.empty and wanted and len(by_place) == place:
            by_place.append(p.name)
    words = [p.name for p in found if p.kind is p.KEYWORD_ONLY]
    by_name += [n for n in words if n in _KEYS and n not in by_name]
    return by_place, by_name
