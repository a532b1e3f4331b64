"""Standard normal draws: those of ``jax.random.normal``, bit for bit, but faster.

On the CPU, JAX keeps threefry's rounds in a loop that passes over memory five times,
and XLA leaves the kernel scalar where a size is odd. Here the rounds are written out,
so that counter, rounds and inverse error function are one vectorised kernel, and odd
sizes are drawn padded. Leaves of one size share a kernel, and so do small ones: less
to compile. For keys of other generators JAX draws.

Reference: Salmon et al. 2011 (Threefry-2x32, 20 rounds).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt32

Shape = tuple[int, ...]
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_LANES = 64  # rows of a multiple of this vectorise
_ROW = 512  # entries of a row of the small leaves' common draw
_SMALL = 1 << 15  # entries up to which a leaf is drawn with others
_LOWEST = np.nextafter(np.float32(-1), np.float32(0))
_SHARDINGS: ContextVar[tuple | None] = ContextVar("shardings", default=None)


@contextlib.contextmanager
def sharded_draws(shardings: Sequence[Any]) -> Iterator[None]:
    """Makes each device draw its own part of the leaves, and nothing else.

    Counters are a leaf's own, so that the bits are those of one device on any mesh.
    Leaves drawn together have no sharding: those given here are drawn one by one.

    Args:
        shardings: one a leaf of `standard_normals`: a ``jax.sharding.NamedSharding``,
            or None for a leaf that every device holds whole.

    Yields:
        Nothing. What is traced meanwhile is affected, so it goes inside the function
        that is jitted.

    Privacy: as `standard_normal`; one draw for the whole leaf, wherever its parts are.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
        >>> mesh = Mesh(np.array(jax.devices()[:1]), "shards")
        >>> rows = NamedSharding(mesh, PartitionSpec("shards"))
        >>> def draw(key):
        ...     with sharded_draws([rows]):
        ...         return standard_normals(key, [jnp.zeros((2, 3))])[0]
        >>> key = jax.random.key(0)
        >>> ours, whole = jax.jit(draw)(key), standard_normals(key, [jnp.zeros((2, 3))])
        >>> bool((ours == whole[0]).all())
        True
    """
    token = _SHARDINGS.set(tuple(shardings))
    try:
        yield
    finally:
        _SHARDINGS.reset(token)


def standard_normal(key: Array, shape: Shape) -> Array:
    """Independent standard normal numbers, float32.

    Args:
        key: one PRNG key; used up by this call.
        shape: of the result.

    Returns:
        What ``jax.random.normal(key, shape, "float32")`` returns with JAX's default,
        partitionable threefry.

    Privacy: none by itself. The generator is Threefry-2x32 with a 64-bit key; draws
    end at 5.4 standard deviations, as JAX's do in float32.

    Example:
        >>> import jax
        >>> key = jax.random.key(0)
        >>> ours = standard_normal(key, (5,))
        >>> bool((ours == jax.random.normal(key, 5)).all())
        True
    """
    if not _ours(key, shape, jnp.float32):
        return jax.random.normal(key, shape, jnp.float32)
    size = math.prod(shape)
    row = _draw(jax.random.key_data(key)[None], np.zeros(1), _padded(size))
    return row[:size].reshape(shape)


def standard_normals(
    key: Array, leaves: Sequence[Any], wanted: Any = True
) -> list[Any]:
    """One draw for each leaf: leaf i takes the key ``fold_in(key, i)``.

    Args:
        key: one PRNG key; used up by this call.
        leaves: arrays whose shapes and dtypes are to be drawn; None draws nothing.
        wanted: a public bool, perhaps traced; where False, all numbers are NaN.

    Returns:
        Arrays (or None), each what ``jax.random.normal`` returns for its key.

    Raises:
        ValueError: inside `sharded_draws` of another number of leaves.

    Privacy: as `standard_normal`; the draws of different leaves are independent.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> a, b = standard_normals(jax.random.key(0), [jnp.zeros((2, 3)), jnp.ones(4)])
        >>> a.shape, b.shape
        ((2, 3), (4,))
    """
    placed = _sharded(key, leaves, wanted)
    rest: list[Any] = [None if i in placed else x for i, x in enumerate(leaves)]
    ours = [x is not None and _ours(key, x.shape, x.dtype) for x in rest]
    shapes = tuple(
        x.shape if mine else None for x, mine in zip(rest, ours, strict=True)
    )
    drawn: list[Any] = [None] * len(shapes)
    if any(ours):
        drawn = _leaves(jax.random.key_data(key), wanted, shapes)
    for index, (leaf, mine) in enumerate(zip(rest, ours, strict=True)):
        if leaf is not None and not mine:
            own = jax.random.fold_in(key, index)
            draw = jax.random.normal(own, leaf.shape, leaf.dtype)
            drawn[index] = jnp.where(wanted, draw, jnp.nan)
    return [placed.get(index, draw) for index, draw in enumerate(drawn)]


def _sharded(key: Array, leaves: Sequence[Any], wanted: Any) -> dict[int, Array]:
    """The draws of leaves that `sharded_draws` gave a sharding, by their index.

    Behind a branch on the CPU, as in `_leaves`; the sharding is told inside of it.
    """
    shardings = _SHARDINGS.get() or (None,) * len(leaves)
    if len(shardings) != len(leaves):
        raise ValueError(
            f"sharded_draws got {len(shardings)} shardings, but {len(leaves)} leaves "
            "are drawn; give one a leaf of the parameters."
        )
    chosen = {
        index: (leaf, sharding)
        for index, (leaf, sharding) in enumerate(zip(leaves, shardings, strict=True))
        if leaf is not None and sharding is not None
    }

    def drawn(key: Array, wanted: Any) -> dict[int, Array]:
        made = {}
        for index, (leaf, sharding) in chosen.items():
            draw = jnp.where(wanted, _one(key, index, leaf), jnp.nan)
            made[index] = lax.with_sharding_constraint(draw, sharding)
        return made

    def branched(key: Array, wanted: Any) -> dict[int, Array]:
        hole = lambda x, s: lax.with_sharding_constraint(  # noqa: E731
            jnp.full(x.shape, jnp.nan, x.dtype), s
        )
        holes = {index: hole(*pair) for index, pair in chosen.items()}
        return lax.cond(wanted, lambda: drawn(key, True), lambda: holes)

    if not chosen:
        return {}
    return lax.platform_dependent(key, wanted, cpu=branched, default=drawn)


def _one(key: Array, index: int, leaf: Any) -> Array:
    """One leaf's draw, every entry from the counter that is its place in the leaf."""
    own = jax.random.fold_in(key, index)
    if not _ours(key, leaf.shape, leaf.dtype):
        return jax.random.normal(own, leaf.shape, leaf.dtype)
    strides = np.cumprod([1, *leaf.shape[:0:-1]])[::-1]
    count = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        step = lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        count = count + step * np.uint32(stride)
    first, second = jax.random.key_data(own)
    return _normal(_bits(first, second, count))


def _ours(key: Array, shape: Shape, dtype: Any) -> bool:
    """Whether it is a float32 draw of threefry, and JAX does not watch its keys."""
    watched = getattr(jax.config, "jax_debug_key_reuse", False)
    plain = jnp.dtype(dtype) == jnp.float32 and math.prod(shape) < 2**32
    return plain and str(jax.random.key_impl(key)) == "threefry2x32" and not watched


@functools.partial(jax.jit, static_argnames="shapes")
def _leaves(key: UInt32[Array, "2"], wanted: Any, shapes: tuple[Any, ...]) -> list[Any]:
    """All leaves' draws, on the CPU behind a branch.

    There XLA would draw again wherever a draw is used, for every leaf cut out of one
    and for both moments of Adam: it fuses across anything but a branch.
    """
    count = jnp.arange(len(shapes), dtype=jnp.uint32)
    keys = jnp.stack(_threefry(key[0], key[1], count), axis=1)
    plans = [_plan(shapes, kind) for kind in _kinds(shapes)]

    def drawn(keys: Array, wanted: Any) -> list[Array]:
        values = [_draw(keys[p.owner], p.first, p.width) for p in plans]
        return [jnp.where(wanted, value, jnp.nan) for value in values]

    def branched(keys: Array, wanted: Any) -> list[Array]:
        holes = [jnp.full(len(p.owner) * p.width, jnp.nan, jnp.float32) for p in plans]
        return lax.cond(wanted, lambda: drawn(keys, True), lambda: holes)

    values = lax.platform_dependent(keys, wanted, cpu=branched, default=drawn)
    leaves: list[Any] = [None] * len(shapes)
    for p, value in zip(plans, values, strict=True):
        for index, start in zip(p.members, p.starts, strict=True):
            own = value[start : start + math.prod(shapes[index])]
            leaves[index] = own.reshape(shapes[index])
    return leaves


class _Plan(NamedTuple):
    """Leaves drawn by one kernel, in rows: whose a row is, and from which entry on."""

    members: list[int]
    starts: np.ndarray
    owner: np.ndarray
    first: np.ndarray
    width: int


def _kinds(shapes: tuple[Any, ...]) -> list[list[int]]:
    """Leaves that share a kernel: small ones of all sizes, others of one size."""
    kinds: dict[int, list[int]] = {}
    for index, shape in enumerate(shapes):
        if shape is not None:
            size = math.prod(shape)
            kinds.setdefault(size if size > _SMALL else 0, []).append(index)
    return list(kinds.values())


def _plan(shapes: tuple[Any, ...], members: list[int]) -> _Plan:
    """Rows as long as the leaves where those are large, else as many as are needed."""
    sizes = np.array([math.prod(shapes[i]) for i in members])
    width = _ROW if sizes[0] <= _SMALL else _padded(int(sizes[0]))
    rows = -(-sizes // width)
    ends = np.cumsum(rows)
    owner = np.repeat(np.arange(len(members)), rows)
    first = (np.arange(len(owner)) - (ends - rows)[owner]) * width
    starts = (ends - rows) * width
    return _Plan(members, starts, np.array(members)[owner], first, width)


def _padded(size: int) -> int:
    return -(-size // _LANES) * _LANES


def _draw(keys: UInt32[Array, "rows 2"], first: np.ndarray, width: int) -> Array:
    """Rows of normal numbers, end to end: counters from `first` on, under own keys."""
    count = lax.broadcasted_iota(jnp.uint32, (len(first), width), 1)
    count = count + jnp.asarray(first, jnp.uint32)[:, None]
    return _normal(_bits(keys[:, :1], keys[:, 1:], count)).reshape(-1)


def _bits(first: Array, second: Array, count: UInt32[Array, "..."]) -> Array:
    """32 bits for each counter: both words of its block, joined by exclusive or."""
    x, y = _threefry(first, second, count)
    return x ^ y


def _threefry(first: Array, second: Array, count: Array) -> tuple[Array, Array]:
    """The block of (0, count) under a key of two words."""
    keys = (first, second, first ^ second ^ _PARITY)
    x, y = jnp.broadcast_to(first, count.shape), count + second
    for block in range(5):
        for turn in _ROTATIONS[block % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn)))
        x = x + keys[(block + 1) % 3]
        y = y + keys[(block + 2) % 3] + np.uint32(block + 1)
    return x, y


def _normal(bits: UInt32[Array, "..."]) -> Array:
    """23 of the bits to a uniform number in (-1, 1), and that to a normal one."""
    one_to_two = (bits >> np.uint32(9)) | np.uint32(0x3F800000)
    unit = lax.bitcast_convert_type(one_to_two, jnp.float32) - np.float32(1)
    uniform = unit * (np.float32(1) - _LOWEST) + _LOWEST
    return np.float32(np.sqrt(2)) * lax.erf_inv(jnp.maximum(uniform, _LOWEST))
