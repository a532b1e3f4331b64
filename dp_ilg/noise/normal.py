"""Normal draws whose law is known to the last bit: integers, from 192 random bits.

``jax.random.normal`` makes a draw of 23 bits: it ends at 5.42 standard deviations, and
what lies beyond would tell that an example was there. Here a draw is an integer number
of steps of 2^-27 standard deviations, made by integer operations and one table
(`dp_ilg.noise.table`), so that its law is exact, the same on every machine, and reaches
15.8. How far it is from a Gaussian's is bounded and charged
(`dp_ilg.accounting.noise_law`): a density off by less than 1e-20 on average, 2e-17
at 6 standard deviations and 2e-16 at 7.

On the CPU, JAX keeps threefry's rounds in a loop that passes over memory five times,
and XLA leaves the kernel scalar where a size is odd. Here the rounds are written out,
so that counter, rounds and table are one kernel, and odd sizes are drawn padded. Leaves
of one size share a kernel, and so do small ones: less to compile. For keys of other
generators JAX makes the bits.

Reference: Salmon et al. 2011 (Threefry-2x32, 20 rounds); docs/noise_law.md (the law).
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
from jaxtyping import Array, Int32, UInt32

from dp_ilg.noise.steps import WORDS, Words, in_stddevs, steps_of

Shape = tuple[int, ...]
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
_LANES = 64  # rows of a multiple of this vectorise
_ROW = 512  # entries of a row of the small leaves' common draw
_SMALL = 1 << 15  # entries up to which a leaf is drawn with others
_BLOCKS = WORDS // 2  # of 64 bits each, for one draw
_SHARDINGS: ContextVar[tuple | None] = ContextVar("shardings", default=None)


@contextlib.contextmanager
def sharded_draws(shardings: Sequence[Any]) -> Iterator[None]:
    """Makes each device draw its own part of the leaves, and nothing else.

    Counters are a leaf's own, so that the bits are those of one device on any mesh.
    Leaves drawn together have no sharding: those given here are drawn one by one.

    Args:
        shardings: one a leaf of `normal_steps`: a ``jax.sharding.NamedSharding``,
            or None for a leaf that every device holds whole.

    Yields:
        Nothing. What is traced meanwhile is affected, so it goes inside the function
        that is jitted.

    Privacy: as `normal_steps`; one draw for the whole leaf, wherever its parts are.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec
        >>> mesh = Mesh(np.array(jax.devices()[:1]), "shards")
        >>> rows = NamedSharding(mesh, PartitionSpec("shards"))
        >>> def draw(key):
        ...     with sharded_draws([rows]):
        ...         return normal_steps(key, [jnp.zeros((2, 3))])[0]
        >>> key = jax.random.key(0)
        >>> ours, whole = jax.jit(draw)(key), normal_steps(key, [jnp.zeros((2, 3))])
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
        Those of `normal_steps`, times 2^-27 and rounded to float32.

    Privacy: none by itself. A private release adds the integers before it rounds:
    `dp_ilg.noise.release.noised`.

    Example:
        >>> import jax
        >>> draw = standard_normal(jax.random.key(0), (1000,))
        >>> 0.9 < float(draw.std()) < 1.1
        True
    """
    return in_stddevs(array_steps(key, shape))


def array_steps(key: Array, shape: Shape) -> Int32[Array, "..."]:
    """The draw for one array that is no leaf of the parameters: scores, counts.

    Args:
        key: one PRNG key; used up by this call.
        shape: of the result.

    Returns:
        What `normal_steps` draws for one such leaf, whatever `sharded_draws` says.

    Privacy: as `normal_steps`.

    Example:
        >>> import jax
        >>> with sharded_draws([None, None]):
        ...     array_steps(jax.random.key(0), (3,)).shape
        (3,)
    """
    with sharded_draws([None]):
        return normal_steps(key, [jax.ShapeDtypeStruct(shape, jnp.float32)])[0]


def normal_steps(key: Array, leaves: Sequence[Any], wanted: Any = True) -> list[Any]:
    """One draw for each leaf: leaf i takes the key ``fold_in(key, i)``.

    Args:
        key: one PRNG key; used up by this call.
        leaves: arrays whose shapes are to be drawn; None draws nothing.
        wanted: a public bool, perhaps traced; where False nothing is drawn, and all
            numbers are 0: the caller has to release NaN then.

    Returns:
        int32 arrays (or None) in steps of 2^-27 standard deviations; ``X + 1/2`` is
        symmetric.

    Raises:
        ValueError: inside `sharded_draws` of another number of leaves.

    Privacy: the draws are independent and of the law that
    `dp_ilg.accounting.noise_law` charges for, if threefry's bits (a key of 64) are
    random. As secret as the key.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> a, b = normal_steps(jax.random.key(0), [jnp.zeros((2, 3)), jnp.ones(4)])
        >>> a.shape, b.dtype
        ((2, 3), dtype('int32'))
    """
    _seen(key)
    placed = _sharded(key, leaves, wanted)
    rest: list[Any] = [None if i in placed else x for i, x in enumerate(leaves)]
    ours = [x is not None and _ours(key, x.shape) for x in rest]
    shapes = tuple(
        x.shape if mine else None for x, mine in zip(rest, ours, strict=True)
    )
    drawn: list[Any] = [None] * len(shapes)
    if any(ours):
        drawn = _leaves(jax.random.key_data(key), wanted, shapes)
    for index, (leaf, mine) in enumerate(zip(rest, ours, strict=True)):
        if leaf is not None and not mine:
            drawn[index] = _by_jax(jax.random.fold_in(key, index), leaf.shape)
    return [placed.get(index, draw) for index, draw in enumerate(drawn)]


def _seen(key: Array) -> None:
    """Uses the key in a way that JAX sees, where it watches for keys used twice."""
    if getattr(jax.config, "jax_debug_key_reuse", False):
        jax.random.bits(key, ())


def _by_jax(key: Array, shape: Shape) -> Int32[Array, "..."]:
    """Draws from the bits of another generator."""
    bits = jax.random.bits(key, (WORDS, *shape), jnp.uint32)
    return steps_of(tuple(bits))


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
        del wanted  # poison is the caller's: a NaN that integers do not have
        made = {}
        for index, (leaf, sharding) in chosen.items():
            draw = _one(key, index, leaf)
            made[index] = lax.with_sharding_constraint(draw, sharding)
        return made

    def branched(key: Array, wanted: Any) -> dict[int, Array]:
        hole = lambda x, s: lax.with_sharding_constraint(  # noqa: E731
            jnp.zeros(x.shape, jnp.int32), s
        )
        holes = {index: hole(*pair) for index, pair in chosen.items()}
        return lax.cond(wanted, lambda: drawn(key, True), lambda: holes)

    if not chosen:
        return {}
    return lax.platform_dependent(key, wanted, cpu=branched, default=drawn)


def _one(key: Array, index: int, leaf: Any) -> Array:
    """One leaf's draw, every entry from the counter that is its place in the leaf."""
    own = jax.random.fold_in(key, index)
    if not _ours(key, leaf.shape):
        return _by_jax(own, leaf.shape)
    strides = np.cumprod([1, *leaf.shape[:0:-1]])[::-1]
    count = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        step = lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        count = count + step * np.uint32(stride)
    first, second = jax.random.key_data(own)
    return steps_of(_words(first, second, count))


def _ours(key: Array, shape: Shape) -> bool:
    """Whether it is a draw of threefry, of fewer numbers than a counter counts."""
    threefry = str(jax.random.key_impl(key)) == "threefry2x32"
    return threefry and math.prod(shape) < 2**32


@functools.partial(jax.jit, static_argnames="shapes")
def _leaves(key: UInt32[Array, "2"], wanted: Any, shapes: tuple[Any, ...]) -> list[Any]:
    """All leaves' draws, on the CPU behind a branch.

    There XLA would draw again wherever a draw is used, for every leaf cut out of one
    and for both moments of Adam: it fuses across anything but a branch.
    """
    count = jnp.arange(len(shapes), dtype=jnp.uint32)
    keys = jnp.stack(_threefry(key[0], key[1], 0, count), axis=1)
    plans = [_plan(shapes, kind) for kind in _kinds(shapes)]

    def drawn(keys: Array, wanted: Any) -> list[Array]:
        del wanted  # poison is the caller's: a NaN that integers do not have
        return [_draw(keys[p.owner], p.first, p.width) for p in plans]

    def branched(keys: Array, wanted: Any) -> list[Array]:
        holes = [jnp.zeros(len(p.owner) * p.width, jnp.int32) for p in plans]
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
    """Rows of draws, end to end: counters from `first` on, under own keys."""
    count = lax.broadcasted_iota(jnp.uint32, (len(first), width), 1)
    count = count + jnp.asarray(first, jnp.uint32)[:, None]
    return steps_of(_words(keys[:, :1], keys[:, 1:], count)).reshape(-1)


def _words(first: Array, second: Array, count: UInt32[Array, "..."]) -> Words:
    """Six words for each counter: the blocks of (0, count), (1, count), (2, count)."""
    blocks = [_threefry(first, second, high, count) for high in range(_BLOCKS)]
    return tuple(word for block in blocks for word in block)


def _threefry(
    first: Array, second: Array, high: int, count: Array
) -> tuple[Array, Array]:
    """The block of (high, count) under a key of two words."""
    keys = (first, second, first ^ second ^ _PARITY)
    x, y = jnp.broadcast_to(first + np.uint32(high), count.shape), count + second
    for block in range(5):
        for turn in _ROTATIONS[block % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn)))
        x = x + keys[(block + 1) % 3]
        y = y + keys[(block + 2) % 3] + np.uint32(block + 1)
    return x, y
