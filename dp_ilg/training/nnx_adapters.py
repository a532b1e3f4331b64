"""Low-rank adapters for Flax NNX: Flax's own ``nnx.LoRA`` around linear layers.

What is trained are the adapters' variables, ``nnx.LoRAParam``, and a new head if there
is one; the module goes through `dp_ilg.private_training` like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import jax.numpy as jnp

from dp_ilg import validation


def with_lora(module: Any, *, rngs: Any, rank: int = 8, where: str = "*") -> Any:
    """A copy of a module with adapters around its linear layers; it computes the same.

    Args:
        module: the base, an ``nnx.Module``; it is not changed.
        rngs: ``nnx.Rngs``, which draws the first factors.
        rank: width of the bottleneck.
        where: shell pattern of the layers' paths, such as "blocks/*/query".

    Returns:
        The module, with an ``nnx.LoRA`` in place of each ``nnx.Linear`` that matches.
        Train it with ``wrt=lora_variables()``.

    Raises:
        ValueError: if no linear layer matches, or for a rank below 1.

    Privacy:
        The first factors are random and see no data. The base must be public.

    Example:
        >>> from flax import nnx
        >>> base = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        >>> made = with_lora(base, rngs=nnx.Rngs(1), rank=2)
        >>> made.lora_a.shape, bool((made(jnp.ones(4)) == base(jnp.ones(4))).all())
        ((4, 2), True)

    Reference: Hu et al. 2022 (LoRA), section 4.1.
    """
    from flax import nnx  # here, so that a loop in plain JAX needs no Flax

    validation.whole("rank", rank)
    copied = nnx.clone(module)
    found = dict(_linear_layers(copied))
    chosen = {
        p: x for p, x in found.items() if fnmatchcase("/".join(map(str, p)), where)
    }
    if not chosen:
        names = ["/".join(map(str, path)) for path in found][:8]
        raise ValueError(
            f"No nnx.Linear matches {where!r}; the module's are "
            f"{', '.join(names) or 'none'}."
        )
    for path, layer in chosen.items():
        made = nnx.LoRA(
            layer.in_features,
            rank,
            layer.out_features,
            base_module=layer,
            dtype=layer.dtype,
            param_dtype=layer.kernel.dtype,
            a_initializer=nnx.initializers.lecun_normal(),
            rngs=rngs,
        )
        copied = _replaced(copied, path, made)
    return copied


def lora_variables(head: str | None = None) -> Any:
    """The NNX filter of what is trained: adapters, and the head if it is new.

    Args:
        head: a name on the path of the head's parameters, or None.

    Returns:
        A filter, for ``nnx.Optimizer(..., wrt=)`` and ``train.init(..., wrt=)``.

    Example:
        >>> from flax import nnx
        >>> made = with_lora(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
        >>> sorted(nnx.to_pure_dict(nnx.state(made, lora_variables())))
        ['lora_a', 'lora_b']
    """
    from flax import nnx

    if head is None:
        return nnx.LoRAParam
    return nnx.Any(nnx.LoRAParam, nnx.All(nnx.Param, nnx.PathContains(head)))


def merge_lora(module: Any) -> Any:
    """A copy in which the adapters are added to the kernels, and are gone.

    Args:
        module: what `with_lora` made, trained.

    Returns:
        A module like the base.

    Raises:
        ValueError: for a module without adapters.

    Privacy: post-processing.

    Example:
        >>> from flax import nnx
        >>> made = with_lora(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
        >>> made.lora_b[...] += 1.0
        >>> merged = merge_lora(made)
        >>> type(merged).__name__, bool(jnp.allclose(
        ...     merged(jnp.ones(4)), made(jnp.ones(4)), atol=1e-5))
        ('Linear', True)
    """
    from flax import nnx

    copied = nnx.clone(module)
    found = [(p, x) for p, x in nnx.iter_modules(copied) if isinstance(x, nnx.LoRA)]
    found = [(p, x) for p, x in found if isinstance(x.base_module, nnx.Linear)]
    if not found:
        raise ValueError(
            "The module has no adapter around a linear layer; pass what with_lora made."
        )
    for path, adapter in found:
        layer: Any = adapter.base_module
        kernel = layer.kernel
        added = jnp.matmul(adapter.lora_a[...], adapter.lora_b[...])
        kernel[...] = kernel[...] + added.astype(kernel.dtype)
        copied = _replaced(copied, path, layer)
    return copied


def _linear_layers(module: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Linear layers with their paths, but for those that have an adapter."""
    from flax import nnx

    for path, layer in nnx.iter_modules(module):
        has_own = isinstance(layer, nnx.LoRALinear) or path[-1:] == ("base_module",)
        if isinstance(layer, nnx.Linear) and not has_own:
            yield path, layer


def _replaced(module: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The module with another one at a path; another one itself for the empty path."""
    if not path:
        return new
    parent = module
    for name in path[:-1]:
        parent = parent[name] if isinstance(name, int) else getattr(parent, name)
    if isinstance(path[-1], int):
        parent[path[-1]] = new
    else:
        setattr(parent, path[-1], new)
    return module
