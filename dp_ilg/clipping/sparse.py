"""Sparse arrays in a batch, as the arrays they are made of.

``jax.vmap`` maps a ``BCOO`` or ``BCSR`` with a batch axis to one without; engines see
plain arrays only. So the arrays become the batch, and the loss puts an example's
together again.
"""

from __future__ import annotations

import sys
from typing import Any

import jax

from dp_ilg.base import Example, LossFn, Params

_MODULE = "jax.experimental.sparse"


def plain(loss_fn: LossFn, batch: Example) -> tuple[LossFn, Example]:
    """A batch without sparse arrays, and the loss of its examples.

    Args:
        loss_fn: ``(params, example) -> scalar``, whose example may be sparse.
        batch: any tree; a ``BCOO`` or ``BCSR`` needs a batch axis (``n_batch=1``).

    Returns:
        The two as they are if nothing is sparse; else a loss of a list of arrays.

    Raises:
        ValueError: for a sparse array whose axis of examples is not a batch axis.

    Privacy: which entries an example stores is a part of it; how many are stored of
    each is the same for all, and public.

    Example:
        >>> import jax.numpy as jnp
        >>> from jax.experimental.sparse import BCOO
        >>> rows = BCOO.fromdense(jnp.eye(3), n_batch=1)
        >>> loss, arrays = plain(lambda w, x: x @ w, rows)
        >>> [x.shape for x in arrays]
        [(3, 1), (3, 1, 1)]
        >>> float(loss(jnp.arange(3.0), [x[2] for x in arrays]))
        2.0
    """
    leaves, treedef = jax.tree.flatten(batch, is_leaf=_is_sparse)
    if not any(map(_is_sparse, leaves)):
        return loss_fn, batch
    for x in filter(_is_sparse, leaves):
        _check(x)
    parts = [jax.tree.flatten(x) for x in leaves]

    def whole(params: Params, arrays: Example) -> Any:
        given = iter(arrays)
        example = []
        for old, (values, structure) in zip(leaves, parts, strict=True):
            own = [next(given) for _ in values]
            example.append(_example(old, structure, own))
        return loss_fn(params, jax.tree.unflatten(treedef, example))

    return whole, [value for values, _ in parts for value in values]


def _is_sparse(value: Any) -> bool:
    """Whether it is a sparse array; where the module is not loaded there is none."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(value, (module.BCOO, module.BCSR))


def _example(old: Any, structure: Any, own: list[Any]) -> Any:
    if not _is_sparse(old):
        return jax.tree.unflatten(structure, own)
    flags = dict(indices_sorted=old.indices_sorted, unique_indices=old.unique_indices)
    return type(old)(tuple(own), shape=old.shape[1:], **flags)


def _check(x: Any) -> None:
    if not x.n_batch:
        raise ValueError(
            f"The batch holds a sparse array of shape {x.shape} without a batch axis; "
            f"make it with {type(x).__name__}.fromdense(..., n_batch=1)."
        )
