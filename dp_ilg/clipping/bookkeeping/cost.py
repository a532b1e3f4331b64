"""What a path costs, from static shapes alone: no choice here sees data."""

from __future__ import annotations

import math
from typing import Any

import jax

from dp_ilg.clipping.bookkeeping.parts import Part
from dp_ilg.clipping.bookkeeping.program import as_closed

_PASSES = 16
_CACHE_BYTES = 12 * 2**20
_CPU_BYTES = 272 * 2**20
_DEVICE_BYTES = 2 * 2**30
_FEW, _MANY = 16, 1024


def forms_gradient(part: Part) -> bool:
    """Whether forming each gradient of a part costs less than Gram products.

    Gram products cost terms squared times both widths; a formed gradient is written
    once and read twice, and then serves the sum as well.
    """
    _, first, second = part.shape
    if part.has_rows or part.terms == 1:
        return False
    return _PASSES * first * second < part.terms**2 * (first + second + _PASSES)


def part_flops(part: Part) -> int:
    """Multiplications and additions for one example's norm and sum."""
    batch, first, second = part.shape
    if part.has_rows:
        return 6 * batch * part.terms * min(first, second)
    product = 2 * batch * part.terms * first * second
    if forms_gradient(part):
        return product + 4 * batch * first * second
    gram = 2 * batch * part.terms**2 * (first + second)
    return product + gram


def part_bytes(part: Part) -> int:
    """Memory one example holds for a part, in float32."""
    batch, first, second = part.shape
    if part.has_rows:
        return 8 * batch * part.terms * min(first, second)
    held = part.terms * (second + first)
    if forms_gradient(part):
        return 4 * batch * (held + first * second)
    return 4 * batch * (held + 2 * part.terms**2)


def footprint(closed: Any) -> int:
    """Bytes of everything a program computes, loops turn by turn."""
    total = 0
    for eqn in closed.jaxpr.eqns:
        total += sum(_bytes(v.aval) for v in eqn.outvars)
        if eqn.primitive.name == "scan":
            inner = footprint(as_closed(eqn.params["jaxpr"]))
            total += inner * eqn.params["length"]
        elif "jaxpr" in eqn.params and eqn.primitive.name != "while":
            total += footprint(as_closed(eqn.params["jaxpr"]))
    return total


def _bytes(aval: Any) -> int:
    size = math.prod(getattr(aval, "shape", ()))
    return size * getattr(getattr(aval, "dtype", None), "itemsize", 4)


def microbatch(
    example_bytes: int, formed_bytes: int, param_bytes: int, batch_size: int
) -> int:
    """How many examples to differentiate at once: a power of 2.

    On a CPU as many as stay in the cache, or as make the sum over micro-batches, which
    touches every parameter, a small part of the work; but a few at least, up to a
    quarter of the batch, since each micro-batch starts hundreds of kernels. Elsewhere
    as many as fit into memory that a step can be expected to have. The constants were
    read off `benchmarks/speed/step.py`.

    Args:
        example_bytes: what one example holds, were nothing freed.
        formed_bytes: what of that are its gradients on the general path, which are
            gone through several times.
        param_bytes: what the parameters hold.
        batch_size: of the whole batch.

    Returns:
        The micro-batch size, at least 1.

    Example:
        >>> microbatch(2**20, 0, 2**20, 256) >= 1
        True
    """
    each = max(1, example_bytes + formed_bytes)
    if jax.default_backend() == "cpu":
        count = max(_CACHE_BYTES, 2 * param_bytes) / each
        few = min(_FEW, batch_size / 4, _CPU_BYTES / each)
        count = max(count, min(few, _CACHE_BYTES / max(1, 3 * formed_bytes)))
    else:
        count = _DEVICE_BYTES / each
    return 2 ** round(math.log2(min(max(count, 1), _MANY)))
