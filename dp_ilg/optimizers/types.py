"""What a step relies on: types that do not change, and arrays held once."""

from __future__ import annotations

from typing import Any

import jax

from dp_ilg.geometry.groups import Groups


def like_parameters(updates: Any, groups: Groups) -> Any:
    """Updates in the parameters' own dtypes.

    ``equinox.apply_updates`` adds and does not cast: a float32 update would turn
    bfloat16 parameters into float32, trace the step again and break ``jax.lax.scan``.

    Args:
        updates: a tree like the parameters.
        groups: the groups of the parameters, which know their dtypes.

    Returns:
        The same tree; anything that is no tree like the parameters as it is.

    Example:
        >>> import jax.numpy as jnp
        >>> from dp_ilg.geometry.layers import group
        >>> groups = group({"w": jnp.ones(2, jnp.bfloat16)})
        >>> str(like_parameters({"w": jnp.ones(2)}, groups)["w"].dtype)
        'bfloat16'
    """
    leaves, treedef = jax.tree.flatten(updates)
    if len(leaves) != len(groups.leaves):
        return updates
    pairs = zip(leaves, groups.leaves, strict=True)
    return jax.tree.unflatten(treedef, [x.astype(leaf.dtype) for x, leaf in pairs])


def like_before(state: Any, before: Any) -> Any:
    """A state in the dtypes it had: those of `init`, whatever a step computed in.

    With x64 on, a Python or NumPy number somewhere in a transformation makes float64
    of float32.

    Args:
        state: after a step.
        before: the state the step was given.

    Returns:
        `state`, cast; as it is where the two are not the same tree.

    Example:
        >>> import jax.numpy as jnp
        >>> str(like_before(jnp.ones(2), jnp.ones(2, jnp.float16)).dtype)
        'float16'
    """
    if jax.tree.structure(state) != jax.tree.structure(before):
        return state
    return jax.tree.map(_cast, state, before)


def apart(state: Any, params: Any) -> Any:
    """A state that holds no array of the parameters, and none of its own twice.

    Many optimizers keep the first parameters (``prodigy``, ``dog``, ``mechanize``). A
    step that is given parameters and state to overwrite must not meet one array twice.

    Args:
        state: what `init` made of `params`.
        params: the parameters.

    Returns:
        The state, with copies in place of what was there before.

    Example:
        >>> import jax.numpy as jnp
        >>> params = jnp.ones(2)
        >>> apart((params, params), params)[0] is params
        False
    """
    met = {id(leaf) for leaf in jax.tree.leaves(params)}

    def own(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and id(leaf) in met:
            return leaf.copy()
        met.add(id(leaf))
        return leaf

    return jax.tree.map(own, state)


def _cast(now: Any, before: Any) -> Any:
    dtype = getattr(before, "dtype", None)
    changed = dtype is not None and getattr(now, "dtype", dtype) != dtype
    return now.astype(dtype) if changed else now
