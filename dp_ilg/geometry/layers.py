"""Leaves to named groups.

A *layer* is any group of entries: a module, a leaf, a block of a leaf along one
axis, or whatever a function of the path says.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dp_ilg.base import PyTree
from dp_ilg.geometry.groups import Groups, LeafGroups, group_sizes
from dp_ilg.validation import shown

Path = tuple[str, ...]

_MOST_BLOCKS = 100_000


@dataclass(frozen=True)
class Blocks:
    """Where to cut a leaf: see `blocks`."""

    path: str
    axis: int
    edges: tuple[int, ...] | None
    num_blocks: int | None


@dataclass(frozen=True)
class Layering:
    """How to name the groups of a parameter tree: see `by_module`."""

    name_of: Callable[[Path], str | None]
    blocks: tuple[Blocks, ...] = ()
    frozen: tuple[str, ...] = ()


def blocks(
    path: str,
    *,
    axis: int = 0,
    edges: Sequence[int] | None = None,
    num_blocks: int | None = None,
) -> Blocks:
    """Cuts a leaf along one axis into groups of their own.

    Rows of an embedding sorted by frequency, or blocks of a kernel's inputs, carry
    very different signal: a private norm pooled over a block is accurate where one
    per coordinate is noise.

    Args:
        path: name of the leaf or of its module, e.g. "embedding" or
            "Embed_0/embedding"; shell wildcards work within a segment.
        axis: the axis to cut.
        edges: inner cut points, ascending, e.g. ``[10, 100, 1000]``.
        num_blocks: number of log-spaced blocks instead of `edges`.

    Returns:
        A `Blocks`, to be passed as ``layers=`` or to `by_module` and the like.

    Raises:
        ValueError: unless exactly one of `edges` and `num_blocks` is given, and
            the edges ascend from above 0.
        TypeError: for a path that is no string or an axis that is no whole number.

    Privacy: cut points must be public facts.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"embed": {"embedding": jnp.zeros((1000, 4))}}
        >>> group(params, blocks("embedding", num_blocks=3)).names[:2]
        ('embed/embedding[0:10]', 'embed/embedding[10:100]')
    """
    if not isinstance(path, str):
        raise TypeError(f"path is {shown(path)}, but must be a string.")
    if type(axis) is not int:
        raise TypeError(f"axis is {shown(axis)}, but must be a whole number.")
    if (edges is None) == (num_blocks is None):
        raise ValueError(
            f"blocks({path!r}) takes exactly one of edges and num_blocks, not "
            f"edges={edges} and num_blocks={num_blocks}."
        )
    if num_blocks is not None and (
        type(num_blocks) is not int or not 1 <= num_blocks <= _MOST_BLOCKS
    ):
        raise ValueError(
            f"num_blocks is {shown(num_blocks)}, but must be at least 1 and at most "
            f"{_MOST_BLOCKS}."
        )
    cuts = None if edges is None else tuple(int(e) for e in edges)
    if cuts is not None and any(a >= b for a, b in zip((0, *cuts), cuts, strict=False)):
        raise ValueError(f"edges are {list(cuts)}, but must ascend from above 0.")
    return Blocks(path, axis, cuts, num_blocks)


def by_module(*cuts: Blocks, frozen: Sequence[str] = ()) -> Layering:
    """One group a module: all leaves whose path differs only in the last part.

    Args:
        *cuts: leaves to be cut into `blocks` of their own.
        frozen: paths that take no part: no norm, no noise, a zero update.

    Returns:
        A `Layering`, to be passed as ``layers=``.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
        >>> group(params, by_module()).sizes
        (9,)
    """
    return Layering(_module_name, cuts, tuple(frozen))


def by_leaf(*cuts: Blocks, frozen: Sequence[str] = ()) -> Layering:
    """One group a leaf; arguments as in `by_module`.

    Example:
        >>> import jax.numpy as jnp
        >>> group({"a": jnp.ones(2), "b": jnp.ones(3)}, by_leaf()).names
        ('a', 'b')
    """
    return Layering("/".join, cuts, tuple(frozen))


def by_path(
    name_of: Callable[[Path], str | None],
    *cuts: Blocks,
    frozen: Sequence[str] = (),
) -> Layering:
    """Groups by a function from the path (a tuple of strings) to a name.

    Args:
        name_of: returns the group's name, or None for a frozen leaf.
        *cuts: as in `by_module`.
        frozen: as in `by_module`.

    Returns:
        A `Layering`, to be passed as ``layers=``.

    Example:
        >>> import jax.numpy as jnp
        >>> tree = {"a": {"w": jnp.ones(2)}, "b": {"w": jnp.ones(3)}}
        >>> group(tree, by_path(lambda path: path[-1])).names
        ('w',)
    """
    return Layering(name_of, cuts, tuple(frozen))


def as_layering(spec: Any) -> Layering:
    """Reads "module", "leaf", blocks, a sequence of blocks, a function or a Layering.

    Args:
        spec: what a user passed as ``layers=``.

    Returns:
        The `Layering` it means.

    Raises:
        ValueError: for anything else.

    Example:
        >>> as_layering("leaf").name_of(("a", "b"))
        'a/b'
    """
    if isinstance(spec, Layering):
        return spec
    named = {"module": by_module, "leaf": by_leaf}
    if isinstance(spec, str) and spec in named:
        return named[spec]()
    if isinstance(spec, Blocks):
        return by_module(spec)
    if isinstance(spec, (list, tuple)) and all(isinstance(s, Blocks) for s in spec):
        return by_module(*spec)
    if callable(spec):
        name_of: Any = spec
        return by_path(name_of)
    raise ValueError(
        f"layers is {shown(spec)}, but must be 'module', 'leaf', "
        "dp_ilg.layers.blocks(...), a function of the path, or a Layering."
    )


def group(params: PyTree, layers: Any = "module") -> Groups:
    """Finds the groups of a parameter tree.

    Args:
        params: arrays, or anything with shape and dtype, in any tree.
        layers: see `as_layering`.

    Returns:
        The `Groups`, leaves in the order of ``jax.tree.leaves``.

    Raises:
        ValueError: for an empty tree, masked nodes, mutable collections, unknown
            paths or edges outside the leaf.
        TypeError: for integer or complex parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> group({"w": jnp.ones((2, 2)), "b": jnp.ones(2)}).names
        ('b', 'w')
    """
    layering = as_layering(layers)
    found = [(p, x) for p, x in paths(params)]
    _check_leaves(found)
    _check_patterns(layering, [p for p, _ in found])
    names: dict[str, int] = {}
    leaves = tuple(_leaf_groups(p, x, layering, names) for p, x in found)
    if not names:
        raise ValueError("Every parameter is frozen; leave at least one to train.")
    return Groups(tuple(names), group_sizes(leaves, len(names)), leaves)


def paths(tree: PyTree) -> list[tuple[Path, Any]]:
    """Leaves of a tree with their paths as strings (a Variable's ".value" dropped).

    Example:
        >>> [path for path, _ in paths({"a": [1, 2]})]
        [('a', '0'), ('a', '1')]
    """
    is_masked = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)
    return [(_path_strings(path), leaf) for path, leaf in flat]


def _leaf_groups(
    path: Path, value: Any, layering: Layering, names: dict[str, int]
) -> LeafGroups:
    text, shape, dtype = "/".join(path), tuple(value.shape), str(value.dtype)
    own = None if _frozen(path, layering) else layering.name_of(path)
    cut = next((c for c in layering.blocks if matches(c.path, path)), None)
    if own is None:
        return LeafGroups(text, shape, dtype, 0, (), ())
    if cut is None:
        owner = names.setdefault(own, len(names))
        return LeafGroups(text, shape, dtype, 0, (), (owner,))
    axis, edges = _edges(cut, text, shape)
    labels = [
        f"{text}[{', '.join([':'] * axis + [f'{a}:{b}'])}]"
        for a, b in zip(edges, edges[1:], strict=False)
    ]
    owners = tuple(names.setdefault(label, len(names)) for label in labels)
    return LeafGroups(text, shape, dtype, axis, edges, owners)


def _edges(cut: Blocks, text: str, shape: tuple[int, ...]) -> tuple[int, tuple]:
    if not -len(shape) <= cut.axis < len(shape):
        raise ValueError(
            f"blocks axis {cut.axis} does not exist in {text} of shape {shape}."
        )
    axis = cut.axis % len(shape)
    size = shape[axis]
    inner = cut.edges
    if inner is None:
        steps = range(1, cut.num_blocks or 1)
        inner = sorted({round(size ** (i / (cut.num_blocks or 1))) for i in steps})
        inner = tuple(e for e in inner if 0 < e < size)
    elif inner and inner[-1] == size:
        inner = inner[:-1]
    if inner and inner[-1] >= size:
        raise ValueError(
            f"edge {inner[-1]} lies outside {text}, whose axis {axis} has {size} "
            "entries; use smaller edges."
        )
    return axis, (0, *inner, size)


def _frozen(path: Path, layering: Layering) -> bool:
    return any(matches(pattern, path) for pattern in layering.frozen)


def matches(pattern: str, path: Path) -> bool:
    """Whether the pattern's segments match consecutive segments of the path.

    Example:
        >>> matches("Embed_*/embedding", ("Embed_0", "embedding"))
        True
    """
    parts = pattern.strip("/").split("/")
    for start in range(len(path) - len(parts) + 1):
        segments = path[start : start + len(parts)]
        if all(fnmatch.fnmatchcase(s, p) for s, p in zip(segments, parts, strict=True)):
            return True
    return False


def _module_name(path: Path) -> str:
    return "/".join(path[:-1]) or path[-1]


def _path_strings(path: tuple[Any, ...]) -> Path:
    parts = []
    for entry in path:
        for field in ("key", "name", "idx"):
            if hasattr(entry, field):
                parts.append(str(getattr(entry, field)))
                break
    is_variable = len(parts) > 1 and parts[-1] in ("value", "raw_value")
    if is_variable and isinstance(path[-1], jax.tree_util.GetAttrKey):
        parts = parts[:-1]
    return tuple(parts) or ("params",)


def _check_patterns(layering: Layering, found: list[Path]) -> None:
    for pattern in [c.path for c in layering.blocks] + list(layering.frozen):
        if not any(matches(pattern, path) for path in found):
            known = ", ".join("/".join(p) for p in found[:8])
            raise ValueError(
                f"No parameter matches {pattern!r}; the parameters are {known}."
            )


def _check_leaves(found: list[tuple[Path, Any]]) -> None:
    if not found:
        raise ValueError("The parameter tree is empty; there is nothing to train.")
    for path, leaf in found:
        text = "/".join(path)
        if isinstance(leaf, optax.MaskedNode):
            raise ValueError(
                f"{text} is masked out by optax.masked, which would let its raw "
                "gradients through; use layers=dp_ilg.layers.by_module(frozen=...)."
            )
        if "batch_stats" in path:
            raise ValueError(
                f"{text} is a batch statistic, which mixes examples; replace BatchNorm "
                "by GroupNorm or LayerNorm and pass variables['params'] only."
            )
        if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"{text} is {kind}, but parameters must be real floating-point arrays; "
                "keep the rest out of them (equinox.partition does it for modules, "
                "nnx.split for those of NNX, and dp_ilg.private_training for both)."
            )
