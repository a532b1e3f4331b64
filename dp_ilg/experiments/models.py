"""Networks of the bundled runs, in Flax linen and in Flax NNX.

A `Model` is three functions of plain parameters, so the training loop does not know
which Flax is behind it. `linen_model` and `nnx_model` make one from any module of
the user's and refuse what per-example clipping cannot protect.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dp_ilg.base import LossFn, Params
from dp_ilg.experiments import (
    linen_models,
    nnx_models,
    transformer_linen,
    transformer_nnx,
)
from dp_ilg.experiments.fields import nearest


@dataclass(frozen=True)
class Model:
    """A network as functions of its parameters.

    Attributes:
        init: key -> parameters.
        loss_fn: (parameters, (x, y) of ONE example) -> scalar loss.
        predict: (parameters, batch of x) -> classes, ``int32[batch]``; for texts to
            continue the next token at each place, ``int32[batch, tokens]``.

    Example:
        >>> model = build_model("mlp", Facts(jnp.zeros(4), num_classes=3), hidden=(8,))
        >>> params = model.init(jax.random.key(0))
        >>> model.predict(params, jnp.zeros((2, 4))).shape
        (2,)
    """

    init: Callable[[Any], Params]
    loss_fn: LossFn
    predict: Callable[[Params, Any], Any]


@dataclass(frozen=True)
class Facts:
    """What a network must know of the data; public facts only.

    Attributes:
        x: one example's input (array or tuple of arrays), only its shapes count.
        num_classes: number of classes.
        num_tokens: vocabulary size where inputs are token ids, else 0.
        num_categories: number of values of each categorical column, else empty.

    Example:
        >>> Facts(jnp.zeros((8, 8)), num_classes=10).num_tokens
        0
    """

    x: Any
    num_classes: int
    num_tokens: int = 0
    num_categories: tuple[int, ...] = ()


def linen_model(module: Any, x: Any) -> Model:
    """Makes a `Model` from any linen module that maps one x to logits.

    Args:
        module: a ``flax.linen.Module``; its ``__call__`` takes a batch of x.
        x: one example's input, for the shapes.

    Returns:
        The model; two classes may share one logit.

    Raises:
        ValueError: for BatchNorm and other mutable collections (when `init` runs).

    Privacy:
        Clipping protects an example only if its gradient is a function of that
        example and the parameters; a collection updated from batches breaks that.

    Example:
        >>> import flax.linen as nn
        >>> model = linen_model(nn.Dense(3), jnp.zeros(4))
        >>> sorted(model.init(jax.random.key(0)))
        ['bias', 'kernel']
    """

    def init(key):
        variables = module.init({"params": key}, _batch_of_one(x))
        return linen_models.linen_params(variables)

    return _classifier(init, lambda params, xs: module.apply({"params": params}, xs))


def nnx_model(make: Callable[[Any], Any]) -> Model:
    """Makes a `Model` from any NNX module that maps a batch of x to logits.

    Args:
        make: ``flax.nnx.Rngs`` -> module.

    Returns:
        The model; its parameters are the ``nnx.State`` of ``nnx.Param``.

    Raises:
        ValueError: for a module with any other state, such as ``nnx.BatchStat``.

    Privacy:
        As for `linen_model`.

    Example:
        >>> from flax import nnx
        >>> model = nnx_model(lambda rngs: nnx.Linear(4, 3, rngs=rngs))
        >>> params = model.init(jax.random.key(0))
        >>> model.predict(params, jnp.zeros((2, 4))).shape
        (2,)
    """
    init, apply = nnx_models.functions(make)
    return _classifier(init, apply)


def _classifier(init: Callable, apply: Callable) -> Model:
    def loss_fn(params, example):
        x, y = example
        logits = apply(params, _batch_of_one(x))[0].astype(jnp.float32)
        if logits.shape[:-1] != jnp.shape(y):
            raise ValueError(
                f"The model gives scores of shape {logits.shape} where labels have "
                f"shape {jnp.shape(y)}; use language_model for texts to continue, and "
                "another model for one label an example."
            )
        if logits.ndim > 1:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return losses.mean()
        if logits.shape[-1] == 1:
            return optax.sigmoid_binary_cross_entropy(logits[0], y.astype(jnp.float32))
        return optax.softmax_cross_entropy_with_integer_labels(logits, y)

    def predict(params, xs):
        logits = apply(params, xs)
        if logits.shape[1:] == (1,):
            return (logits[..., 0] > 0).astype(jnp.int32)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    return Model(init, loss_fn, predict)


def _batch_of_one(x: Any) -> Any:
    return jax.tree.map(lambda a: a[None], x)


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


def _group_norm_cnn(
    facts: Facts, *, channels=(16, 32, 64), hidden=(), activation="tanh"
) -> dict[str, Any]:
    shape = jnp.shape(facts.x)
    if len(shape) != 3 or not channels or min(shape[:2]) < 2 ** len(channels):
        raise ValueError(
            f"The model group_norm_cnn halves an image once for each of its channels "
            f"{tuple(channels)}, which inputs of shape {shape} do not allow; use mlp."
        )
    sizes = dict(image=shape, channels=tuple(channels), hidden=tuple(hidden))
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


# name -> (sizes from the facts and options, linen module, NNX module)
MODELS: dict[str, tuple[Callable, Any, Any]] = {
    "linear": (_linear, linen_models.Linear, nnx_models.Linear),
    "mlp": (_mlp, linen_models.Mlp, nnx_models.Mlp),
    "cnn": (_cnn, linen_models.Cnn, nnx_models.Cnn),
    "group_norm_cnn": (
        _group_norm_cnn,
        linen_models.GroupNormCnn,
        nnx_models.GroupNormCnn,
    ),
    "embedding": (_embedding, linen_models.MeanEmbedding, nnx_models.MeanEmbedding),
    "transformer": (
        _transformer,
        transformer_linen.Transformer,
        transformer_nnx.Transformer,
    ),
    "language_model": (
        _language_model,
        transformer_linen.Transformer,
        transformer_nnx.Transformer,
    ),
    "tabular": (_tabular, linen_models.Tabular, nnx_models.Tabular),
}


def build_model(
    name: str, facts: Facts, *, framework: str = "linen", **options: Any
) -> Model:
    """Builds a row of `MODELS` for some data.

    Args:
        name: the row.
        facts: what the network must know of the data.
        framework: "linen" or "nnx".
        **options: sizes; what is left out is the row's own default.

    Returns:
        The model.

    Raises:
        ValueError: for an unknown name or size, or data the network cannot take.

    Example:
        >>> build_model("mpl", Facts(jnp.zeros(4), num_classes=3))
        Traceback (most recent call last):
        ValueError: model.name is 'mpl', which is no model; did you mean mlp?
    """
    if name not in MODELS:
        advice = nearest(name, MODELS)
        raise ValueError(f"model.name is {name!r}, which is no model; {advice}")
    sizes_of, linen_class, nnx_class = MODELS[name]
    known = [p for p in inspect.signature(sizes_of).parameters if p != "facts"]
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"The model {name} has no size {option}; {takes}.")
    sizes = sizes_of(facts, **options)
    if framework == "linen":
        return linen_model(linen_class(**sizes), facts.x)
    if framework == "nnx":
        return nnx_model(lambda rngs: nnx_class(**sizes, rngs=rngs))
    raise ValueError(f"model.framework is {framework!r}; known are linen, nnx.")
