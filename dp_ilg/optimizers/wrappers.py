"""Optax wrappers that would undo a private chain if they stood around it.

Inside a chain, behind the noise, each of them is harmless: there they see releases.
"""

from __future__ import annotations

import logging
from typing import Any

import jax
import numpy as np
import optax

from dp_ilg.base import ClippedGrad
from dp_ilg.geometry.groups import Groups
from dp_ilg.validation import callers


def refuse_wrappers(updates: Any, groups: Groups, clipped_grad: Any = None) -> None:
    """Raises if updates come through a wrapper that voids the guarantee.

    Args:
        updates: what a private transformation is given.
        groups: the groups of the parameters.
        clipped_grad: what it is given beside, in place of `updates`.

    Raises:
        ValueError: for ``optax.apply_if_finite`` and its kin (a choice made by raw
            gradients), ``optax.masked`` (raw gradients let through) and
            ``optax.MultiSteps`` (examples averaged before they are clipped).

    Example:
        >>> import jax.numpy as jnp
        >>> from dp_ilg.geometry.layers import group
        >>> params = {"w": jnp.ones(2)}
        >>> refuse_wrappers({"w": jnp.ones((5, 2))}, group(params))
        >>> refuse_wrappers({"w": jnp.ones(2)}, group(params))
        Traceback (most recent call last):
        ValueError: The gradient of w has the parameter's own shape (2,) and no ...
    """
    _refuse_conditions()
    _refuse_masked(updates)
    if clipped_grad is None and not isinstance(updates, ClippedGrad):
        _refuse_averages(updates, groups)


_HIDING = {
    "optax.transforms._combining": "chain",
    "optax.transforms._accumulation": "MultiSteps",
    "optax.transforms._conditionality": "apply_if_finite",
    "optax.transforms._masking": "masked",
    "optax.schedules._inject": "inject_hyperparams",
}
"""Modules whose wrappers hide ``geometry(state)`` of what they wrap, and their name."""
_LOG = logging.getLogger("dp_ilg")


def tell_hidden() -> None:
    """Says in one sentence that an Optax wrapper hides the geometry of a chain.

    Whoever asks the wrapper for it gets Python's own ``AttributeError``, which we
    cannot word; ``init`` comes before, and can be seen from inside.

    Example:
        >>> tell_hidden()  # no wrapper here
    """
    for module, usual in _HIDING.items():
        for frame in callers(module):
            name = frame.f_code.co_qualname.partition(".")[0]
            name = name if hasattr(optax, name) else usual
            _LOG.warning(
                "optax.%s around a private chain has no geometry(state), and what it"
                " does first would see raw gradients: put it behind, as in "
                "dp_ilg.chain(tx, optax.%s(...)), and ask that chain for its geometry.",
                *(name, name),
            )
            return


def _refuse_conditions() -> None:
    """These compute both outcomes of a condition, so JAX's own error comes too late."""
    for frame in callers("optax.transforms._conditionality"):
        wrapper = frame.f_code.co_qualname.partition(".")[0]
        raise ValueError(
            f"optax.{wrapper} around a private chain would choose by raw gradients "
            "whether to step, or let them through; put it behind the noise, as in "
            f"dp_ilg.chain(tx, optax.{wrapper}(optax.identity(), ...)), or leave it "
            "out, since a non-finite example removes only itself."
        )


def _refuse_masked(updates: Any) -> None:
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    if any(is_masked(x) for x in jax.tree.leaves(updates, is_leaf=is_masked)):
        raise ValueError(
            "optax.masked around a private chain would let the raw gradients of "
            "masked-out parameters through; use layers=by_module(frozen=...)."
        )


def _refuse_averages(updates: Any, groups: Groups) -> None:
    """Gradients shaped like the parameters hold no single examples."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(updates)]
    if shapes == [leaf.shape for leaf in groups.leaves]:
        first = groups.leaves[0]
        raise ValueError(
            f"The gradient of {first.path} has the parameter's own shape {first.shape} "
            "and no batch axis; pass the whole ClippedGrad or jax.vmap(jax.grad(...)), "
            "give what a private optimizer released to optax.apply_updates, and instead"
            " of MultiSteps, which averages before clipping, use clipped_grad(..., "
            "microbatch_size=) or add ClippedGrads."
        )
