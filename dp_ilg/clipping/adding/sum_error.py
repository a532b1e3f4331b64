"""How far apart sums with and without one example can be, beyond C: derived bounds.

docs/sums.md derives every term. None depends on data, and `clip_sum` takes them all off
the bound it clips to, so that what it promises is C itself.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from dp_ilg.clipping.adding.sums import CANCELLATION, LONGEST, LOOKED_UP_BITS, MOST_ROWS
from dp_ilg.geometry.grid import RANGE_BITS, STEP_BITS
from dp_ilg.geometry.rounding import weighted_norm_rounding

COEFFICIENT_ERROR = 2.0**-21
"""Eight roundings of a coefficient, those of the geometry's norm aside."""
GRID_ERROR = 2.0**-STEP_BITS
"""Both sums are rounded to the grid once: half a step an entry each."""
BLOCK_ERROR = 2.0**-20
"""All blocks of both sums are rounded to ``2^-22`` steps."""
ADDING_ERROR = 2.0**-19
"""What float64 rounds by in the blocks of both sums."""
LOOKED_UP_ERROR = 2.0**-20
"""What an example's looked-up rows are rounded by before they are added."""
SUM_ERROR = GRID_ERROR + BLOCK_ERROR + ADDING_ERROR + LOOKED_UP_ERROR
"""All of it, as a part of C: 5.7e-6."""
MOST_BLOCKS = 2**21
"""Blocks, of one micro-batch each, of all batches of a lot."""
ARGUMENTS = ("none", "exact", "formed", "one term", "rows", "terms")
"""How sums over examples are made, the one with the largest bound last."""
_UNIT = 2.0**-53
_SPARE_TERMS = 64


def coefficient_error(groups: int) -> float:
    """What float32 may make a coefficient too large by, relatively.

    Args:
        groups: how many norms are added up.

    Returns:
        The bound: the rounding of the geometry's norm, and eight roundings more.

    Example:
        >>> coefficient_error(8) < 2e-6
        True
    """
    return weighted_norm_rounding(groups) + COEFFICIENT_ERROR


def largest_lot(parameters: int, has_terms: bool = True) -> int:
    """For how many examples the bound holds, all batches of a lot together.

    Args:
        parameters: of the whole model.
        has_terms: whether some leaf's gradient is kept as several terms an example.

    Returns:
        The number; above it a sum may leave the range of the grid, or its rounding the
        bound.

    Example:
        >>> largest_lot(10**6), largest_lot(10**4, has_terms=False)
        (30840, 1342174)
    """
    ratio = CANCELLATION if has_terms else 1.0
    longest = LONGEST if has_terms else MOST_ROWS
    adding = ADDING_ERROR / (2 * _UNIT * ratio * (longest + _SPARE_TERMS))
    room = 2.0 ** (RANGE_BITS - STEP_BITS - 1) / math.sqrt(max(1, parameters))
    return int(min(adding, room * (1 - 2.0**-19), MOST_BLOCKS))


def check_lot(examples: int, parameters: int) -> None:
    """Raises where a lot is larger than the public grid holds.

    Args:
        examples: of the lot, padding included.
        parameters: of the whole model.

    Raises:
        ValueError: above `largest_lot` of a model whose examples have one term a leaf.

    Example:
        >>> check_lot(10**5, 10**8)
        Traceback (most recent call last):
        ValueError: The lot has 100000 examples, but the public grid of a model of ...
    """
    most = largest_lot(parameters, has_terms=False)
    if examples > most:
        raise ValueError(
            f"The lot has {examples} examples, but the public grid of a model of "
            f"{parameters} parameters holds sums of {most}; make smaller lots."
        )


def looked_up_error(terms: int, width: int, examples: int) -> float:
    """What rounding an example's looked-up rows moves its gradient by, as a part of C.

    Args:
        terms: rows that an example looks up.
        width: entries of a row.
        examples: of one sum.

    Returns:
        The bound; `LOOKED_UP_ERROR` is charged.

    Example:
        >>> looked_up_error(512, 768, 64) < LOOKED_UP_ERROR
        True
    """
    # Units are at most 2^(1 - bits) CANCELLATION 2^21 sqrt(n) examples steps, and a
    # step C w 2^-19 / sqrt(n).
    unit = CANCELLATION * examples * 2.0 ** (3 - LOOKED_UP_BITS)
    return terms * math.sqrt(width) * unit / 2


class LeafError(NamedTuple):
    """By which argument the sum of one leaf is bounded.

    Attributes:
        leaf: its path in the parameter tree.
        argument: one of `ARGUMENTS`; see `SumError`.
        error: what is charged for how it is added, as a part of C.
    """

    leaf: str
    argument: str
    error: float


class SumError(NamedTuple):
    """How far sums with and without one example can be apart, beyond C.

    Attributes:
        total: b: neighbouring sums of raw coefficients would be within ``C (1 + b)``;
            the clip leaves room for it, so that they are within C.
        coefficients: of it, what the coefficients' own rounding takes.
        grid: of it, for rounding the sums to the grid, blocks and whole.
        adding: of it, for adding in float64, and for rounding looked-up rows before.
        largest_lot: for how many examples this holds, all batches of a step together.
        leaves: how every leaf is added: "formed" (each example's gradient, added in
            float64), "one term" or "terms" (products of factors, added in float64 at
            most 1,024 at a time), "rows" (each term rounded, then added without
            rounding), "exact" (each example rounded towards zero, then added without
            rounding) or "none".

    Example:
        >>> import jax.numpy as jnp, dp_ilg
        >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]))
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
        >>> found = grad_fn.sum_error({"w": jnp.zeros((3, 2))}, jnp.zeros((8, 3)))
        >>> found.total < 1e-5, found.leaves[0].argument
        (True, 'one term')
    """

    total: float
    coefficients: float
    grid: float
    adding: float
    largest_lot: int
    leaves: tuple[LeafError, ...]


def sum_error(arguments: Any, groups: Any) -> SumError:
    """The bound of a model, from how each leaf is added.

    Args:
        arguments: (leaf, one of `ARGUMENTS`) of every leaf.
        groups: the `dp_ilg.geometry.groups.Groups`.

    Returns:
        The `SumError`.

    Example:
        >>> import jax.numpy as jnp
        >>> from dp_ilg.geometry.layers import group
        >>> sum_error([("w", "formed")], group({"w": jnp.ones(4)})).total < 1e-5
        True
    """
    own = {"rows": LOOKED_UP_ERROR, "exact": 0.0, "none": 0.0}
    rows = tuple(LeafError(leaf, a, own.get(a, ADDING_ERROR)) for leaf, a in arguments)
    first = coefficient_error(len(groups.names))
    has_terms = any(row.argument == "terms" for row in rows)
    return SumError(
        total=first + SUM_ERROR,
        coefficients=first,
        grid=GRID_ERROR + BLOCK_ERROR,
        adding=ADDING_ERROR + LOOKED_UP_ERROR,
        largest_lot=largest_lot(sum(groups.sizes), has_terms),
        leaves=rows,
    )
