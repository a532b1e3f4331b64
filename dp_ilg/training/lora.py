"""Low-rank adapters beside the dense layers of any linen network.

An adapter adds ``scale * (x @ a) @ b`` to what a dense layer makes of x. The network is
not rewritten: while its loss runs, the calls of its dense layers are intercepted. The
product a @ b is never formed, so both factors have the fast path of `clipped_grad`, and
`merge` adds them to the kernels once training has ended.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict, freeze, unfreeze
from jaxtyping import Array

from dp_ilg import validation
from dp_ilg.base import Example, LossFn, Params

_DENSE = (nn.Dense, nn.DenseGeneral)


def adapters(
    loss_fn: LossFn,
    params: Params,
    example: Example,
    *,
    key: Any,
    rank: int = 8,
    where: str = "*",
) -> Params:
    """Draws adapters for the dense layers that a loss calls; they change nothing yet.

    Args:
        loss_fn: the loss of one example of a linen network.
        params: the network's parameters.
        example: ONE example; only the kernels' shapes are read of what it makes, so a
            batch that gives a scalar loss all the same makes the same adapters.
        key: draws the first factors.
        rank: width of the bottleneck.
        where: shell pattern of the layers' paths, such as "h*/c_attn".

    Returns:
        ``{path: {"a": [inputs..., rank], "b": [rank, outputs...]}}`` in the kernels'
        dtypes: a normal with variance 1 / inputs, b zero.

    Raises:
        ValueError: if no dense layer matches, for a rank below 1, for a loss that is no
            scalar, or for layers whose kernels do not lie at their paths in `params`,
            each at its own: one adapter cannot stand for several.

    Privacy:
        The first factors are random and see no data.

    Example:
        >>> module = nn.Dense(3)
        >>> params = module.init(jax.random.key(0), jnp.ones(4))["params"]
        >>> loss = lambda p, x: module.apply({"params": p}, x).sum()
        >>> made = adapters(loss, params, jnp.ones(4), key=jax.random.key(1), rank=2)
        >>> {name: made[""][name].shape for name in "ab"}
        {'a': (4, 2), 'b': (2, 3)}

    Reference: Hu et al. 2022 (LoRA), section 4.1.
    """
    validation.whole("rank", rank)
    found = _dense_layers(loss_fn, params, example, where)
    chosen = {path: own for path, own in found.items() if fnmatchcase(path, where)}
    if not chosen:
        raise ValueError(
            f"No dense layer matches {where!r}; the network's are "
            f"{', '.join(sorted(found)[:8]) or 'none'}."
        )
    made = {}
    for index, (path, (inputs, outputs, dtype)) in enumerate(chosen.items()):
        _check_place(params, path, (*inputs, *outputs))
        draw = jax.random.normal(jax.random.fold_in(key, index), (*inputs, rank))
        scale = jnp.sqrt(jnp.prod(jnp.array(inputs)))
        first = (draw / scale).astype(dtype)
        made[path] = {"a": first, "b": jnp.zeros((rank, *outputs), dtype)}
    return made


def with_adapters(loss_fn: LossFn, scale: float = 1.0) -> Callable[..., Any]:
    """The loss as a function of a frozen base and its adapters.

    Args:
        loss_fn: the loss of one example of a linen network.
        scale: what the adapters' outputs are multiplied with.

    Returns:
        ``(base, adapters, example) -> scalar``. It raises a ValueError where an adapter
        is not reached, as inside a jitted loss that was traced before, or is reached by
        layers with different kernels.

    Example:
        >>> module = nn.Dense(1, use_bias=False)
        >>> loss = lambda p, x: module.apply({"params": p}, x)[0]
        >>> base = {"kernel": jnp.ones((2, 1))}
        >>> own = {"": {"a": jnp.ones((2, 1)), "b": jnp.full((1, 1), 0.5)}}
        >>> float(with_adapters(loss)(base, own, jnp.array([1.0, 2.0])))
        4.5

    Reference: Hu et al. 2022, Eq. 3.
    """

    def loss(base: Params, own: Params, example: Example) -> Any:
        met: dict[str, Any] = {}

        def call(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out, name = next_call(*args, **kwargs), _name(context)
            if not _is_dense(context) or name not in own:
                return out
            _check_own(met, name, context)
            return out + scale * _product(args[0], own[name], context.module)

        with nn.intercept_methods(call):
            value = loss_fn(base, example)
        if missed := set(own) - set(met):
            raise ValueError(
                f"The adapter of {min(missed)!r} is not reached; pass the loss "
                "without jax.jit, and adapters of the layers that it calls."
            )
        return value

    return loss


def merge(params: Params, own: Params, scale: float = 1.0) -> Params:
    """Adds the adapters to the kernels: the same network without adapters.

    That holds where layers use their kernels as they are, not under a wrapper that
    changes them first, as ``nn.WeightNorm`` does.

    Args:
        params: the base, nested dictionaries, or a FrozenDict of them.
        own: its adapters.
        scale: as in `with_adapters`.

    Returns:
        The parameters of the tuned network, in dictionaries of the same kind; `params`
        is not changed.

    Raises:
        ValueError: for an adapter whose layer is not there, or has another shape.

    Privacy: post-processing.

    Example:
        >>> own = {"dense": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 3))}}
        >>> merged = merge({"dense": {"kernel": jnp.zeros((2, 3))}}, own)
        >>> float(merged["dense"]["kernel"].sum())
        6.0
    """
    merged = unfreeze(params) if isinstance(params, FrozenDict) else params
    merged = jax.tree.map(lambda x: x, merged)
    for path, pair in own.items():
        node, kernel = _layer(merged, path)
        added = scale * jnp.tensordot(pair["a"], pair["b"], 1)
        if added.shape != kernel.shape:
            raise ValueError(
                f"The adapter of {path!r} is for a kernel of shape {added.shape}, but "
                f"that of the parameters is {kernel.shape}; pass the base that it was "
                "made for."
            )
        node["kernel"] = kernel + added.astype(kernel.dtype)
    return freeze(merged) if isinstance(params, FrozenDict) else merged


def _layer(params: Params, path: str) -> tuple[Any, Any]:
    """The parameters of a layer, and its kernel."""
    node = params
    for name in filter(None, path.split("/")):
        node = node.get(name) if isinstance(node, Mapping) else None
    if isinstance(node, Mapping) and "kernel" in node:
        return node, node["kernel"]
    if isinstance(params, Mapping) and set(params) == {"params"}:
        remedy = "pass what is under 'params'"
    else:
        remedy = "pass the parameters as the network is applied to them"
    raise ValueError(
        f"There is no kernel at {path!r} in the parameters; {remedy}, which have one "
        "there."
    )


def _check_own(met: dict[str, Any], name: str, context: Any) -> None:
    """Refuses a second kernel under one name: its layer would share the adapter."""
    kernel = context.module.variables["params"]["kernel"]
    if met.setdefault(name, kernel) is not kernel:
        raise ValueError(
            f"Several layers called {name!r}, or one that nn.remat, nn.jit or nn.scan "
            "wraps more than once, have kernels that cannot be told apart; make layers "
            "parts of one network, and wrap a repeated one once, around all its calls."
        )


def _product(x: Array, pair: Params, module: nn.Module) -> Array:
    """The inputs through the bottleneck, contracted as the layer contracts them."""
    axes = getattr(module, "axis", -1)
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    inner = jnp.tensordot(x, pair["a"], (axes, tuple(range(len(axes)))))
    return jnp.tensordot(inner, pair["b"], 1)


def _is_dense(context: Any) -> bool:
    return isinstance(context.module, _DENSE) and context.method_name == "__call__"


def _name(context: Any) -> str:
    path = getattr(context.module, "path", ())
    return "/".join(path)


def _dense_layers(
    loss_fn: LossFn, params: Params, example: Example, where: str
) -> dict[str, Any]:
    """Inputs, outputs and dtype of the kernel of every dense layer that is called."""
    found: dict[str, Any] = {}
    met: dict[str, Any] = {}

    def call(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = next_call(*args, **kwargs)
        if _is_dense(context):
            name, kernel = _name(context), context.module.variables["params"]["kernel"]
            if fnmatchcase(name, where):
                _check_own(met, name, context)
                _check_batch(name, context.module)
            axes = getattr(context.module, "axis", -1)
            count = 1 if isinstance(axes, int) else len(axes)
            shape = kernel.shape
            found[name] = (shape[:count], shape[count:], kernel.dtype)
        return out

    with nn.intercept_methods(call):
        # A function of its own each time: traces that are kept call no layer.
        loss = jax.eval_shape(lambda p, e: loss_fn(p, e), params, example)
    if loss.shape != ():
        raise ValueError(
            f"The loss has shape {loss.shape}, but must be a scalar; pass ONE example, "
            "not a batch, and the loss of one."
        )
    return found


def _check_batch(name: str, layer: Any) -> None:
    """Refuses a dense layer that is several side by side."""
    if getattr(layer, "batch_dims", ()):
        raise ValueError(
            f"The layer {name!r} has batch_dims, for which there are no adapters; "
            "leave it out with where=, or write it without."
        )


def _check_place(params: Params, path: str, shape: tuple[int, ...]) -> None:
    """Refuses a layer whose kernel is not the one that `merge` would change."""
    kernel = _layer(params, path)[1]
    if kernel.shape != shape:
        raise ValueError(
            f"The layer {path!r} is called with a kernel of shape {shape}, but in the "
            f"parameters it is {kernel.shape}; write stacked layers one by one."
        )
