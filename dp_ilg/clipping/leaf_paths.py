"""What an engine says about its paths: one row a leaf, printable as a table."""

from __future__ import annotations

from typing import NamedTuple

_HEAD = ("leaf", "path", "MFLOP/example", "MiB", "why")
_LEGEND = {
    "gram": "norms from products of the factors; no gradient of an example is formed",
    "formed": "each example's gradient is formed from factors, for norm and sum",
    "per-example gradient": "each example is differentiated; exact, but takes memory",
    "none": "contributes nothing",
    "MFLOP/example": "millions of operations beyond the ordinary backward pass",
    "MiB": "what a micro-batch holds for the leaf",
}


class LeafPlan(NamedTuple):
    """How one leaf's gradient is clipped.

    Attributes:
        leaf: its path in the parameter tree.
        path: what is computed: "gram", "formed" or "per-example gradient".
        why: the reason, in words.
        flops: multiplications and additions for one example beyond the ordinary
            backward pass; for per-example gradients a lower bound.
        bytes: what a micro-batch holds for it.
        advice: what to change in the model for a faster path; empty if nothing.
        added: how the sum over examples is made, as in `sum_error.SumError.leaves`.
    """

    leaf: str
    path: str
    why: str
    flops: int
    bytes: int
    advice: str
    added: str = "formed"


class Explanation(tuple[LeafPlan, ...]):
    """The rows of all leaves; ``print`` shows a table and what its words mean.

    Attributes:
        microbatch: how many examples are differentiated at once, None if not known.

    Example:
        >>> row = LeafPlan("w", "gram", "one term", 8, 2**20, "")
        >>> print(Explanation([row]))
        leaf  path  MFLOP/example  MiB   why
        w     gram  0.000          1.00  one term
        <BLANKLINE>
        gram: norms from products of the factors; no gradient of an example is formed
        MFLOP/example: millions of operations beyond the ordinary backward pass
        MiB: what a micro-batch holds for the leaf
    """

    microbatch: int | None = None

    def __str__(self) -> str:
        """A table of fixed width, and a legend of the words in it."""
        lines: list[tuple[str, ...]] = [_HEAD]
        for row in self:
            why = row.why + (f"; {row.advice}" if row.advice else "")
            size = f"{row.bytes / 2**20:.2f}"
            lines.append((row.leaf, row.path, f"{row.flops / 1e6:.3f}", size, why))
        widths = [max(len(line[k]) for line in lines) for k in range(len(_HEAD) - 1)]
        table = [
            "  ".join(
                [*(x.ljust(w) for x, w in zip(line, widths, strict=False)), line[-1]]
            )
            for line in lines
        ]
        words = {*_HEAD, *(row.path for row in self)}
        legend = [f"{key}: {text}" for key, text in _LEGEND.items() if key in words]
        if self.microbatch is not None:
            legend[-1] = legend[-1].replace("batch", f"batch of {self.microbatch}")
        return "\n".join([*table, "", *legend])
