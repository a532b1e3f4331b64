"""Fine-tuning: which parameters of a network are trained, as rows of a table.

A `Tuning` divides a network's parameters into a frozen base and the small tree that is
trained: the head, the biases, everything, or low-rank adapters beside dense layers. The
base has no gradient, no noise, no moments, and is an argument of the compiled step, so
that it is in memory once. The guarantee is that of the trained part; the base must
come from public data.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from dp_ilg.base import Example, LossFn, Params, PrivateTransformation
from dp_ilg.clipping.clipped_grad import clipped_grad
from dp_ilg.geometry.layers import paths
from dp_ilg.training.lora import adapters, merge, with_adapters
from dp_ilg.validation import nearest

Where = Callable[[tuple[str, ...]], bool]


class Tuning(NamedTuple):
    """What of a network is trained.

    Attributes:
        trained: the parameters of the private optimizer.
        frozen: the base; never changed.
        loss_fn: ``(frozen, trained, example) -> scalar``, for ONE example.
        merged: ``(frozen, trained)`` to the parameters of the whole network, as it was
            before it was divided.

    Example:
        >>> Tuning({}, {}, lambda frozen, trained, example: 0.0).trained
        {}
    """

    trained: Params
    frozen: Params
    loss_fn: Callable[[Params, Params, Example], Any]
    merged: Callable[[Params, Params], Params] = lambda frozen, trained: trained


def tune_selected(where: Where, loss_fn: LossFn, params: Params) -> Tuning:
    """Trains the leaves whose path a function picks.

    Args:
        where: path, as a tuple of strings, to whether the leaf is trained.
        loss_fn: loss of one example under all parameters.
        params: all parameters.

    Returns:
        The tuning; `trained` and `frozen` map paths, joined by "/", to leaves.

    Raises:
        ValueError: if nothing is picked.

    Privacy:
        The choice must not depend on private data.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"a": jnp.ones(2), "b": jnp.zeros(2)}
        >>> loss = lambda p, x: jnp.sum(p["a"] * x + p["b"])
        >>> tuning = tune_selected(lambda path: path == ("b",), loss, params)
        >>> sorted(tuning.trained), sorted(tuning.frozen)
        (['b'], ['a'])
    """
    found = {"/".join(path): (where(path), leaf) for path, leaf in paths(params)}
    names, treedef = list(found), jax.tree.structure(params)
    trained = {name: leaf for name, (picked, leaf) in found.items() if picked}
    if not trained:
        raise ValueError(
            "No parameter is picked for training; the parameters are "
            f"{', '.join(names[:8])}."
        )
    frozen = {name: leaf for name, (picked, leaf) in found.items() if not picked}
    del found  # the loss below holds names, not arrays

    def merged(frozen: Params, trained: Params) -> Params:
        joined = {**frozen, **trained}
        return jax.tree.unflatten(treedef, [joined[name] for name in names])

    def bound(frozen: Params, trained: Params, example: Example) -> Any:
        return loss_fn(merged(frozen, trained), example)

    return Tuning(trained, frozen, bound, merged)


def _tune_head(loss_fn: LossFn, params: Params, **options: Any) -> Tuning:
    head = options["head"]
    return tune_selected(lambda path: path[0] == head, loss_fn, params)


def _tune_bias(loss_fn: LossFn, params: Params, **options: Any) -> Tuning:
    head = options["head"]
    return tune_selected(lambda p: p[-1] == "bias" or p[0] == head, loss_fn, params)


def _tune_all(loss_fn: LossFn, params: Params, **options: Any) -> Tuning:
    return tune_selected(lambda path: True, loss_fn, params)


def _tune_lora(loss_fn: LossFn, params: Params, **options: Any) -> Tuning:
    made = adapters(
        loss_fn, params, options["example"], key=options["key"], rank=options["rank"]
    )
    return Tuning(made, params, with_adapters(loss_fn), merge)


def _tune_lora_head(loss_fn: LossFn, params: Params, **options: Any) -> Tuning:
    """Adapters everywhere but in the head, which is trained itself."""
    head = options["head"]
    beside = _tune_lora(loss_fn, params, **options).trained
    beside = {p: own for p, own in beside.items() if p.split("/")[0] != head}
    if not beside:
        raise ValueError(
            f"Every dense layer is part of the head, {head!r}, so that no adapter is "
            'left; use "head".'
        )
    divided = _tune_head(loss_fn, params, **options)

    def bound(frozen: Params, trained: Params, example: Example) -> Any:
        base = divided.merged(frozen, trained["head"])
        return with_adapters(loss_fn)(base, trained["adapters"], example)

    def merged(frozen: Params, trained: Params) -> Params:
        return merge(divided.merged(frozen, trained["head"]), trained["adapters"])

    trained = {"adapters": beside, "head": divided.trained}
    return Tuning(trained, divided.frozen, bound, merged)


TUNINGS: dict[str, Callable[..., Tuning]] = {
    "head": _tune_head,
    "lora": _tune_lora,
    "lora_head": _tune_lora_head,
    "bias": _tune_bias,
    "all": _tune_all,
}


def tune(
    name: str,
    loss_fn: LossFn,
    params: Params,
    example: Example,
    *,
    key: Any,
    head: str | None = None,
    rank: int = 8,
) -> Tuning:
    """Divides a network's parameters by a row of `TUNINGS`.

    What is trained are the arrays of `params` themselves, adapters apart: a step
    consumes them, so copy `params` first if they are needed afterwards.

    Args:
        name: "head", "bias" (with the head), "lora", "lora_head" (adapters, and a head
            that may be new) or "all".
        loss_fn: loss of one example, of a linen network for adapters.
        params: all parameters.
        example: ONE example, without a batch axis; only shapes are read, and only for
            adapters, so that a batch is not always noticed.
        key: draws the adapters' first factors.
        head: the top-level name of the head, for all rows but "lora" and "all"; by
            default "head", if there is one.
        rank: of the adapters.

    Returns:
        The tuning.

    Raises:
        ValueError: for an unknown row, a head that is not there, or nothing to train.

    Privacy:
        The base must be public: what is trained is all that is protected.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"body": {"w": jnp.ones((2, 2))}, "head": {"bias": jnp.ones(2)}}
        >>> loss = lambda p, x: jnp.sum(x @ p["body"]["w"] + p["head"]["bias"])
        >>> tuning = tune("bias", loss, params, jnp.ones(2), key=jax.random.key(0))
        >>> list(tuning.trained)
        ['head/bias']

    Reference: Zaken et al. 2022 (bias only); Hu et al. 2022 (LoRA); Yu et al. 2022
    (both with differential privacy).
    """
    if name not in TUNINGS:
        raise ValueError(
            f"There is no way of tuning {name!r}; {nearest(name, tuple(TUNINGS))}"
        )
    tops = sorted({path[0] for path, _ in paths(params) if path})
    if head is not None and head not in tops:
        raise ValueError(
            f"head is {head!r}, but there is no such part of the network; "
            f"{nearest(head, tuple(tops))}"
        )
    options = dict(example=example, key=key, head=head or "head", rank=rank)
    return TUNINGS[name](loss_fn, params, **options)


def make_tuning_step(
    loss_fn: Callable[[Params, Params, Example], Any],
    tx: PrivateTransformation,
    **clip: Any,
) -> Callable[..., tuple[Params, Any]]:
    """Compiles a private step whose frozen base is an argument, not a constant.

    Args:
        loss_fn: ``(frozen, trained, example) -> scalar``.
        tx: a private optimizer of the trained part; its state and that part are
            donated, the base is not.
        **clip: what `dp_ilg.clipped_grad` takes: ``l2_clip_norm=`` and so on.

    Returns:
        ``step(frozen, trained, state, batch, is_padding_example)`` ->
        ``(trained, state)``; a jitted function, with ``lower`` for its cost.

    Privacy:
        As `dp_ilg.training.step.make_train_step`, for the trained part.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(0))
        >>> loss = lambda base, p, x: jnp.tanh(x @ base) @ p
        >>> step = make_tuning_step(loss, tx, l2_clip_norm=plan.l2_clip_norm)
        >>> base, params = jnp.ones((3, 2)), jnp.zeros(2)
        >>> params, _ = step(base, params, tx.init(params), jnp.ones((4, 3)), None)
        >>> params.shape
        (2,)
    """

    def step(
        frozen: Params, trained: Params, state: Any, batch: Example, mask: Any
    ) -> tuple[Params, Any]:
        grad_fn = clipped_grad(lambda p, e: loss_fn(frozen, p, e), **clip)
        geometry = tx.geometry(state)
        clipped = grad_fn(trained, batch, geometry=geometry, is_padding_example=mask)
        updates, state = tx.update(clipped, state, trained)
        return optax.apply_updates(trained, updates), state

    return jax.jit(step, donate_argnums=(1, 2))
