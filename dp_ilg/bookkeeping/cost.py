"""What a path costs, from static shapes alone."""

from __future__ import annotations

from dp_ilg.bookkeeping.parts import Part

_PASSES = 8


def forms_gradient(part: Part) -> bool:
    """Whether forming each gradient of a part costs less than Gram products.

    Gram products cost terms squared times both widths; a formed gradient is written
    once and read twice, and then serves the sum as well.
    """
    _, first, second = part.shape
    if part.has_rows or part.terms == 1:
        return False
    return _PASSES * first * second < part.terms**2 * (first + second + _PASSES)
