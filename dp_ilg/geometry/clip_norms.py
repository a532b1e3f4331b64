"""Clip norms given as a tree, one a leaf or subtree, read as a geometry.

jax-privacy's way of saying how long each layer's gradient may be. Here such bounds are
the sides of a box inside an ellipsoid, so that they are weights and one clip norm.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from dp_ilg import validation
from dp_ilg.base import PyTree
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.layers import by_path, paths


def from_clip_norms(params: PyTree, clip_norms: Any) -> tuple[Geometry, float]:
    """Reads one clip norm a leaf or subtree as weights and the clip norm of the whole.

    Args:
        params: the parameter tree.
        clip_norms: the same tree, or a prefix of it: a number in the place of a subtree
            bounds the norm of all of its leaves together. Public numbers.

    Returns:
        ``(geometry, l2_clip_norm)``: one group a number C_j, with ``l2_clip_norm`` the
        root of the sum of C_j^2, and weights in proportion to C_j. With
        ``clip_mode="per_layer"`` group j is clipped to C_j; with "joint" examples may
        be anywhere in the ellipsoid around that box, at the same noise.

    Raises:
        ValueError: for a tree that is no prefix of the parameters', and a number that
            is not positive and finite.

    Privacy: the sum's sensitivity is ``l2_clip_norm`` in the geometry's norm. Noise has
    standard deviation sigma sqrt(J) C_j in group j of J. One standard deviation
    of sigma ``l2_clip_norm`` in every group, as without weights, costs the same.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> params = {"body": {"w": jnp.zeros(2), "b": jnp.zeros(1)},
        ...     "head": jnp.zeros(2)}
        >>> geometry, c = from_clip_norms(params, {"body": 3.0, "head": 4.0})
        >>> geometry.groups.names, c
        (('body', 'head'), 5.0)
        >>> loss = lambda p, x: 9 * jnp.sum(p["head"] * x) + jnp.sum(p["body"]["w"] * x)
        >>> grad_fn = dp_ilg.clipped_grad(
        ...     loss, l2_clip_norm=c, clip_mode="per_layer")
        >>> found = grad_fn(params, jnp.array([[0.6, 0.8]]), geometry=geometry)
        >>> [round(float(x), 3) for x in found.gradients["head"]]
        [2.4, 3.2]

    Reference: He et al. 2023 (group-wise clipping); McMahan et al. 2018.
    """
    marks = paths(clip_norms)
    tree = jax.tree.unflatten(jax.tree.structure(clip_norms), range(len(marks)))
    try:
        owners = jax.tree.map(
            lambda mark, part: jax.tree.map(lambda _: mark, part), tree, params
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            "clip_norms is no prefix of the parameters' tree; give one number for each "
            "leaf, or one in the place of a subtree."
        ) from error
    for path, norm in marks:
        validation.positive(f"clip_norms of {'/'.join(path)}", norm)
    places = [path for path, _ in paths(params)]
    names = ["/".join(path) for path, _ in marks]
    if len(set(names)) < len(names):
        raise ValueError(
            f"clip_norms names {min(names, key=lambda x: -names.count(x))!r} twice; "
            "rename the key that has a slash in it."
        )
    named = {
        path: names[owner]
        for path, owner in zip(places, jax.tree.leaves(owners), strict=True)
    }
    norms = np.array([float(norm) for _, norm in marks])
    total = math.hypot(*norms)
    weights = dict(zip(names, norms * math.sqrt(len(norms)) / total, strict=True))
    return Geometry.of(params, weights, by_path(named.get)), total
