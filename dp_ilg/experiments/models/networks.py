"""Networks of the bundled runs, in Flax linen and in Flax NNX.

A `Model` is three functions of plain parameters, so the training loop does not know
which Flax is behind it. `linen_model` and `nnx_model` make one from any module of
the user's and refuse what per-example clipping cannot protect.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import optax

from dp_ilg.base import LossFn, Params
from dp_ilg.experiments.models import (
    additive_linen,
    additive_nnx,
    linen,
    nnx,
    transformer_linen,
    transformer_nnx,
)
from dp_ilg.experiments.models.sizes import SIZES, Facts, check_sizes
from dp_ilg.registry.lookup import KINDS, described, resolve, table

Range = tuple[float, float] | None


@dataclass(frozen=True)
class Model:
    """A network as functions of its parameters.

    Attributes:
        init: key -> parameters.
        loss_fn: (parameters, (x, y) of ONE example) -> scalar loss.
        predict: (parameters, batch of x) -> classes, ``int32[batch]``; for texts to
            continue the next token at each place, ``int32[batch, tokens]``; where a
            number is asked for, that number, ``float32[batch]``.
        loss_and_right: like `loss_fn`, to the loss and whether the guess is right; for
            texts to continue, the share of tokens; of a number, the squared error of
            what `predict` would say.

    Example:
        >>> model = build_model("mlp", Facts(jnp.zeros(4), num_classes=3), hidden=(8,))
        >>> params = model.init(jax.random.key(0))
        >>> model.predict(params, jnp.zeros((2, 4))).shape
        (2,)
    """

    init: Callable[[Any], Params]
    loss_fn: LossFn
    predict: Callable[[Params, Any], Any]
    loss_and_right: Callable[[Params, Any], Any] | None = None


def linen_model(module: Any, x: Any, target_range: Range = None) -> Model:
    """Makes a `Model` from any linen module that maps one x to logits or a number.

    Args:
        module: a ``flax.linen.Module``; its ``__call__`` takes a batch of x.
        x: one example's input, for the shapes.
        target_range: least and largest answer where a number is asked for.

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
        return linen.linen_params(variables)

    apply = lambda params, xs: module.apply({"params": params}, xs)  # noqa: E731
    return _answering(init, apply, target_range)


def nnx_model(make: Callable[[Any], Any], target_range: Range = None) -> Model:
    """Makes a `Model` from any NNX module that maps a batch of x to logits.

    Args:
        make: ``flax.nnx.Rngs`` -> module.
        target_range: as for `linen_model`.

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
    return _answering(*nnx.functions(make), target_range)


def _answering(init: Callable, apply: Callable, target_range: Range) -> Model:
    """A model of a module's outputs, by what is asked for."""
    if target_range is None:
        return _classifier(init, apply)
    return _regressor(init, apply, target_range)


def _regressor(init: Callable, apply: Callable, target_range: Any) -> Model:
    """Squared error around the middle of a public range; answers stay inside it."""
    low, high = target_range
    middle = (low + high) / 2

    def number_of(params, x):
        found = apply(params, _batch_of_one(x))
        if found.shape != (1, 1):
            raise ValueError(
                f"The model gives {found.shape[1:]} scores where one number is asked "
                "for; use a model with one output."
            )
        return middle + found[0, 0].astype(jnp.float32)

    def loss_fn(params, example):
        x, y = example
        return jnp.square(number_of(params, x) - y)

    def loss_and_right(params, example):
        x, y = example
        found = number_of(params, x)
        return jnp.square(found - y), jnp.square(jnp.clip(found, low, high) - y)

    def predict(params, xs):
        return jnp.clip(middle + apply(params, xs)[:, 0], low, high)

    return Model(init, loss_fn, predict, loss_and_right)


def _classifier(init: Callable, apply: Callable) -> Model:
    def logits_of(params, example):
        x, y = example
        logits = apply(params, _batch_of_one(x))[0].astype(jnp.float32)
        if logits.shape[:-1] != jnp.shape(y):
            raise ValueError(
                f"The model gives scores of shape {logits.shape} where labels have "
                f"shape {jnp.shape(y)}; use language_model for texts to continue, and "
                "another model for one label an example."
            )
        return logits, y

    def loss_and_right(params, example):
        logits, y = logits_of(params, example)
        right = jnp.mean(_guess(logits) == y, dtype=jnp.float32)
        return _cross_entropy(logits, y), right

    return Model(
        init,
        lambda params, example: _cross_entropy(*logits_of(params, example)),
        lambda params, xs: _guess(apply(params, xs)),
        loss_and_right,
    )


def _cross_entropy(logits: Any, y: Any) -> Any:
    if logits.ndim > 1:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean()
    if logits.shape[-1] == 1:
        return optax.sigmoid_binary_cross_entropy(logits[0], y.astype(jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def _guess(logits: Any) -> Any:
    """The class, or the next token at each place; two classes may share one logit."""
    if logits.shape[-1:] == (1,):
        return (logits[..., 0] > 0).astype(jnp.int32)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _batch_of_one(x: Any) -> Any:
    return jax.tree.map(lambda a: a[None], x)


# name -> (linen module, NNX module)
_ROWS: dict[str, tuple[Any, Any]] = {
    "linear": (linen.Linear, nnx.Linear),
    "mlp": (linen.Mlp, nnx.Mlp),
    "cnn": (linen.Cnn, nnx.Cnn),
    "group_norm_cnn": (linen.GroupNormCnn, nnx.GroupNormCnn),
    "embedding": (linen.MeanEmbedding, nnx.MeanEmbedding),
    "transformer": (transformer_linen.Transformer, transformer_nnx.Transformer),
    "language_model": (transformer_linen.Transformer, transformer_nnx.Transformer),
    "tabular": (linen.Tabular, nnx.Tabular),
    "additive": (additive_linen.Additive, additive_nnx.Additive),
}
MODELS = table("model", _ROWS)


def build_model(
    name: str, facts: Facts, *, framework: str = "linen", **options: Any
) -> Model:
    """Builds a row of `MODELS`, or a model from outside, for some data.

    Args:
        name: the row, an entry point of ``dp_ilg.models``, or ``package.module:name``
            or ``./file.py:name`` of a Flax module, a pair of functions (init, apply),
            or a function ``(facts, **options)`` that returns one of these.
        facts: what the network must know of the data.
        framework: "linen" or "nnx"; of a row.
        **options: sizes; what is left out is the row's own default.

    Returns:
        The model.

    Raises:
        ValueError: for an unknown name or size, or data the network cannot take.

    Example:
        >>> build_model("mpl", Facts(jnp.zeros(4), num_classes=3))
        Traceback (most recent call last):
        ValueError: model.name is 'mpl', which is unknown; did you mean mlp? (one of \
your own: ./file.py:name or package.module:name)
    """
    found = resolve("model", name, MODELS, "model.name")
    if name not in MODELS:
        return _outside_model(name, found, facts, options)
    check_sizes(name, options)
    linen_class, nnx_class = MODELS[name]
    sizes = SIZES[name](facts, **options)
    if framework == "linen":
        return linen_model(linen_class(**sizes), facts.x, facts.target_range)
    if framework == "nnx":
        make = lambda rngs: nnx_class(**sizes, rngs=rngs)  # noqa: E731
        return nnx_model(make, facts.target_range)
    raise ValueError(f"model.framework is {framework!r}; known are linen, nnx.")


def _outside_model(
    name: str, found: Any, facts: Facts, options: dict[str, Any]
) -> Model:
    """Whatever a user gives as a model, or a sentence that says what it is."""
    is_module = isinstance(found, type) or isinstance(found, flax.linen.Module)
    if callable(found) and not is_module:
        found = _tried(name, found, facts, **options)
        options = {}
    if isinstance(found, type) and issubclass(found, flax.linen.Module):
        found = _tried(name, found, **options)
    if isinstance(found, flax.linen.Module):
        return linen_model(found, facts.x, facts.target_range)
    if isinstance(found, type) and issubclass(found, flax.nnx.Module):
        made: Any = found
        make = lambda rngs: _tried(name, made, **options, rngs=rngs)  # noqa: E731
        return nnx_model(make, facts.target_range)
    if isinstance(found, tuple) and len(found) == 2 and all(map(callable, found)):
        return _answering(*found, facts.target_range)
    if isinstance(found, Model):
        return found
    raise ValueError(
        f"model.name is {name!r}, which gives {described(found)}, but a model is "
        f"{KINDS['model'].words}; see docs/guides/extend.md."
    )


def _tried(name: str, make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What somebody else's function returns; a mistake in it is one sentence."""
    try:
        return make(*args, **options)
    except Exception as error:  # noqa: BLE001 - somebody else's code
        words = " ".join(str(error).split())
        raise ValueError(
            f"model.name is {name!r}, which cannot be made ({type(error).__name__}: "
            f"{words}); a function of a model takes the data's facts and the sizes "
            f"given: {', '.join(options) or 'none'}."
        ) from error
