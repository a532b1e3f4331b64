"""Sizes of the bundled networks: what data and a configuration make of each."""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from dp_ilg.validation import listed


@dataclass(frozen=True)
class Facts:
    """What a network must know of the data; public facts only.

    Attributes:
        x: one example's input (array or tuple of arrays), only its shapes count.
        num_classes: number of classes.
        num_tokens: vocabulary size where inputs are token ids, else 0.
        num_categories: number of values of each categorical column, else empty.
        target_range: least and largest answer where a number is asked for, else None.

    Example:
        >>> Facts(jnp.zeros((8, 8)), num_classes=10).num_tokens
        0
    """

    x: Any
    num_classes: int
    num_tokens: int = 0
    num_categories: tuple[int, ...] = ()
    target_range: tuple[float, float] | None = None


def _mlp(facts: Facts, *, hidden=(64,), activation="tanh") -> dict[str, Any]:
    inputs = math.prod(jnp.shape(facts.x))
    sizes = dict(inputs=inputs, outputs=facts.num_classes)
    return dict(sizes, hidden=tuple(hidden), activation=activation)


def _linear(facts: Facts) -> dict[str, Any]:
    return dict(inputs=math.prod(jnp.shape(facts.x)), outputs=facts.num_classes)


def _cnn(
    facts: Facts, *, channels=(16, 32), hidden=(32,), activation="tanh"
) -> dict[str, Any]:
    shape = jnp.shape(facts.x)
    if len(shape) not in (2, 3) or min(shape[:2]) < 20 or len(channels) != 2:
        raise ValueError(
            f"The model cnn takes images of at least 20 x 20 and two channels, not "
            f"inputs of shape {shape} and channels {tuple(channels)}; use mlp."
        )
    sizes = dict(image=shape, channels=tuple(channels), hidden=tuple(hidden))
    return dict(sizes, outputs=facts.num_classes, activation=activation)


_NORM_LAST = {"conv_norm_relu": False, "conv_relu_norm": True}


def _group_norm_cnn(
    facts: Facts,
    *,
    channels=(16, 32, 64),
    hidden=(),
    activation="tanh",
    order="conv_norm_relu",
) -> dict[str, Any]:
    shape = jnp.shape(facts.x)
    if len(shape) != 3 or not channels or min(shape[:2]) < 2 ** len(channels):
        raise ValueError(
            f"The model group_norm_cnn halves an image once for each of its channels "
            f"{tuple(channels)}, which inputs of shape {shape} do not allow; use mlp."
        )
    sizes = dict(image=shape, channels=tuple(channels), hidden=tuple(hidden))
    if order not in _NORM_LAST:
        raise ValueError(f"model.order is {order!r}; known are {listed(_NORM_LAST)}.")
    sizes |= dict(norm_last=_NORM_LAST[order])
    return dict(sizes, outputs=facts.num_classes, activation=activation)


def _embedding(
    facts: Facts,
    *,
    embed_dim=16,
    embed_scale=8.0,
    embed_init=1.0,
    hidden=(16,),
    activation="tanh",
) -> dict[str, Any]:
    if not facts.num_tokens:
        raise ValueError("The model embedding takes token ids; use mlp or tabular.")
    outputs = 1 if facts.num_classes == 2 else facts.num_classes
    sizes = dict(tokens=facts.num_tokens, width=embed_dim, counted=_counted(facts))
    sizes |= dict(scale=float(embed_scale), stddev=float(embed_init))
    return dict(sizes, hidden=tuple(hidden), outputs=outputs, activation=activation)


def _transformer(
    facts: Facts,
    *,
    embed_dim=32,
    embed_scale=8.0,
    embed_init=1.0,
    depth=2,
    heads=4,
    length=None,
) -> dict[str, Any]:
    _check_tokens("transformer", facts)
    outputs = 1 if facts.num_classes == 2 else facts.num_classes
    sizes = _blocks(facts, embed_dim, depth, heads, length)
    sizes |= dict(scale=float(embed_scale), stddev=float(embed_init))
    return dict(sizes, outputs=outputs, is_causal=False)


def _language_model(
    facts: Facts, *, embed_dim=32, embed_init=1.0, depth=2, heads=4
) -> dict[str, Any]:
    _check_tokens("language_model", facts)
    sizes = _blocks(facts, embed_dim, depth, heads, None)
    sizes |= dict(scale=1.0, stddev=float(embed_init))
    return dict(sizes, outputs=facts.num_tokens, is_causal=True)


def _counted(facts: Facts) -> bool:
    """Whether texts come as counts of words, not as the words."""
    return facts.x.dtype == np.uint8


def _check_tokens(name: str, facts: Facts) -> None:
    if facts.num_tokens and _counted(facts):
        raise ValueError(
            f"The model {name} takes words in their order, but data.features makes "
            "counts of them; set it to raw."
        )
    if not facts.num_tokens:
        raise ValueError(f"The model {name} takes token ids; use mlp or tabular.")
    if (facts.num_classes == facts.num_tokens) != (name == "language_model"):
        other = {"transformer": "language_model", "language_model": "transformer"}[name]
        raise ValueError(
            f"The model {name} is not for {facts.num_classes} classes of "
            f"{facts.num_tokens} tokens; use {other}."
        )


def _blocks(
    facts: Facts, width: int, depth: int, heads: int, length: int | None
) -> dict[str, Any]:
    if width % heads:
        raise ValueError(
            f"model.embed_dim is {width}, which {heads} heads do not divide; choose a "
            "multiple of model.heads."
        )
    known = jnp.shape(facts.x)[0]
    shape = dict(depth=depth, heads=heads, length=min(length or known, known))
    return dict(shape, tokens=facts.num_tokens, width=width)


def _tabular(
    facts: Facts, *, embed_dim=8, hidden=(64,), activation="tanh"
) -> dict[str, Any]:
    if not facts.num_categories:
        raise ValueError("The model tabular takes categorical columns; use mlp.")
    numbers = jnp.shape(facts.x[1])[-1]
    sizes = dict(categories=facts.num_categories, numbers=numbers, width=embed_dim)
    return dict(
        sizes, hidden=tuple(hidden), outputs=facts.num_classes, activation=activation
    )


def _additive(
    facts: Facts, *, scales=None, slopes=None, embed_dim=0, embed_init=0.1
) -> dict[str, Any]:
    if not facts.num_categories:
        raise ValueError("The model additive takes categorical columns; use linear.")
    columns, numbers = len(facts.num_categories), jnp.shape(facts.x[1])[-1]
    scales = (1.0,) * (columns + 2) if scales is None else tuple(scales)
    slopes = (0.0,) * columns if slopes is None else tuple(slopes)
    if len(scales) != columns + 2 or len(slopes) != columns:
        raise ValueError(
            f"The model additive has {columns} columns here, so model.scales takes "
            f"{columns + 2} numbers (columns, numbers, bias) and model.slopes takes "
            f"{columns}, not {len(scales)} and {len(slopes)}."
        )
    sizes = dict(categories=facts.num_categories, numbers=numbers)
    sizes |= dict(scales=scales, slopes=slopes if numbers else (0.0,) * columns)
    factors = dict(rank=embed_dim, stddev=float(embed_init))
    return dict(sizes, **factors, outputs=facts.num_classes)


# name -> sizes from the facts and options
SIZES: dict[str, Callable[..., dict[str, Any]]] = {
    "linear": _linear,
    "mlp": _mlp,
    "cnn": _cnn,
    "group_norm_cnn": _group_norm_cnn,
    "embedding": _embedding,
    "transformer": _transformer,
    "language_model": _language_model,
    "tabular": _tabular,
    "additive": _additive,
}


def check_sizes(name: str, options: Iterable[str]) -> None:
    """Raises unless a model has all these sizes.

    Args:
        name: a row of `SIZES`.
        options: names of sizes.

    Raises:
        ValueError: for the first one that it has not.

    Example:
        >>> check_sizes("linear", ["depth"])
        Traceback (most recent call last):
        ValueError: The model linear has no size depth; it takes none.
    """
    known = [p for p in inspect.signature(SIZES[name]).parameters if p != "facts"]
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    for option in options:
        if option not in known:
            raise ValueError(f"The model {name} has no size {option}; {takes}.")
