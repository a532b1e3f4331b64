"""The sensitivity certificate: which bound holds for a model, and by which argument.

Every line is written by the code that the step runs: how each leaf's norm is found and
its sum made, what their rounding costs, on which grid and law the noise lies and what
that costs, and which accountant answered. All of it follows from shapes and the plan;
no data are read.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

from dp_ilg.accounting.correlated import cycles
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.auditing import delta_lower_bound
from dp_ilg.base import Example, Params
from dp_ilg.geometry.layers import group

NORMS = {
    "gram": (
        "inner products of factors, and a bound on their rounding is added",
        "rounding.md",
    ),
    "formed": (
        "the gradient formed once, for norm and sum, and a bound on rounding is added",
        "rounding.md",
    ),
    "per-example gradient": (
        "the gradient itself, and a bound on rounding is added",
        "rounding.md",
    ),
    "none": ("nothing: the leaf has no gradient", ""),
}
"""Path of a leaf -> how its norm is found, and the page with the proof."""
SUMS = {
    "formed": "each example's gradient, added in float64",
    "one term": "one product of two factors an example, added in float64",
    "terms": "products of factors, added in float64",
    "rows": "looked-up rows, each rounded to a grid by itself, added exactly",
    "exact": "each example rounded towards zero by itself, added exactly",
    "none": "nothing",
}
"""How the sum of a leaf is made -> the same in words."""
ASSUMPTIONS = (
    "The compiled program computes the gradient of an example from its own row, "
    "wherever the row lies and whoever else is in the batch; "
    "`rows_are_independent` tests this, and `dp-ilg audit` does for a run.",
    "Float64 and float32 arithmetic round as IEEE 754 says; denormals may be flushed.",
    "The bits of the noise look random to whoever does not know the key.",
)
"""What the bounds rest on beside their proofs."""
_MOST_STEPS = 10_000  # up to which the lower bound on delta says something


class LeafBound(NamedTuple):
    """How one leaf's gradient is bounded and added.

    Attributes:
        leaf: its path in the parameter tree.
        norm: how its norm is found: never below that of the terms that are added.
        sum: how its sum over examples is made.
        error: what that adds to the distance of neighbouring sums, as a part of C.
    """

    leaf: str
    norm: str
    sum: str
    error: float


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What `sensitivity_certificate` found; `as_dict` is what a run folder holds.

    Attributes:
        plan_digest: of the plan it is for.
        parameters: how many are trained.
        microbatch: examples differentiated at once.
        sensitivity: how far one example moves the sum at most, as a part of C: 1.
        margin: by how much the clip stays below C, so that this holds after rounding.
        largest_lot: for how many examples in one step.
        leaves: one `LeafBound` a leaf.
        noise: law, reach and charge of the noise, by name.
        accounting: which accountant, what it said, and which share of delta is needed
            at that epsilon at least, by an independent computation.
        assumptions: what all of it rests on.

    Privacy: from shapes and the plan alone; it may be shown.
    """

    plan_digest: str
    parameters: int
    microbatch: int
    sensitivity: float
    margin: float
    largest_lot: int
    leaves: tuple[LeafBound, ...]
    noise: dict[str, Any]
    accounting: dict[str, Any]
    assumptions: tuple[str, ...] = ASSUMPTIONS

    def as_dict(self) -> dict[str, Any]:
        """The certificate as JSON holds it."""
        found = dataclasses.asdict(self)
        found["leaves"] = [leaf._asdict() for leaf in self.leaves]
        return found


def sensitivity_certificate(
    grad_fn: Any,
    params: Params,
    batch: Example,
    plan: PrivacyPlan,
    layers: Any = "module",
) -> Certificate:
    """Says which bound on norms and sums holds for a model, plan and program, and why.

    Args:
        grad_fn: what `dp_ilg.clipped_grad` returned.
        params: the parameters; only shapes are read.
        batch: a batch of the size that is used; only shapes are read.
        plan: of the run.
        layers: how the geometry groups the leaves, see `dp_ilg.layers`.

    Returns:
        The `Certificate`.

    Raises:
        ValueError: for a model with more parameters than the plan pays noise for, for
            batches that are larger than the bound on sums allows, and as `grad_fn`.

    Privacy: reads no data; everything in it is public.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=1000,
        ...     batch_size=100, num_steps=10)
        >>> loss = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]))
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=plan.l2_clip_norm)
        >>> params, batch = {"w": jnp.zeros((3, 2))}, jnp.zeros((100, 3))
        >>> found = sensitivity_certificate(grad_fn, params, batch, plan)
        >>> found.sensitivity, found.margin < 1e-5, found.leaves[0].sum
        (1.0, True, 'one product of two factors an example, added in float64')

    Reference: docs/rounding.md, docs/sums.md, docs/noise_law.md.
    """
    groups = group(params, layers)
    count = sum(groups.sizes)
    # at most a score for every group, and a number for every metric
    drawn = count + len(groups.names) + len(getattr(grad_fn, "metrics", ()))
    if drawn > plan.most_parameters:
        raise ValueError(
            f"A step draws up to {drawn:,} numbers, but the plan pays for "
            f"{plan.most_parameters:,}; plan with num_parameters={drawn}."
        )
    rows = grad_fn.explain(params, batch, layers)
    errors = grad_fn.sum_error(params, batch, layers)
    if plan.batch_size > errors.largest_lot:
        raise ValueError(
            f"A step draws {plan.batch_size:,} examples on average, but the bound on "
            f"sums holds for {errors.largest_lot:,}; choose a smaller batch."
        )
    return Certificate(
        plan_digest=plan.digest(),
        parameters=count,
        microbatch=rows.microbatch,
        sensitivity=1.0,
        margin=errors.total,
        largest_lot=errors.largest_lot,
        leaves=tuple(
            LeafBound(row.leaf, NORMS[row.path][0], SUMS[row.added], own.error)
            for row, own in zip(rows, errors.leaves, strict=True)
        ),
        noise=_noise(plan),
        accounting=_accounting(plan),
    )


def _noise(plan: PrivacyPlan) -> dict[str, Any]:
    """What is drawn, and what its distance to the law that is accounted costs."""
    drawn = (
        "discrete Gaussian, by an exact sampler under a secret of 256 bits"
        if plan.exact_noise
        else "sums of whole numbers from a table of 96 bits and uniform ones"
    )
    charge = plan.noise_charge
    return {
        "law": drawn,
        "grid": "2^-27 standard deviations; sum and noise are added on it exactly",
        "proof": "noise_law.md",
        "most_parameters": plan.most_parameters,
        "charged_epsilon": charge.epsilon,
        "charged_delta": charge.delta,
    }


def _accounting(plan: PrivacyPlan) -> dict[str, Any]:
    """Which accountant, and what an independent lower bound makes of its claim."""
    epsilon = plan.epsilon()
    found: dict[str, Any] = {
        "accountant": plan.accountant,
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "delta": plan.delta,
        "neighboring_relation": plan.neighboring_relation,
        "least_share_of_delta": None,
    }
    if math.isfinite(epsilon) and plan.num_steps <= _MOST_STEPS:
        steps = cycles.samples(plan)
        found["least_share_of_delta"] = delta_lower_bound(steps, epsilon) / plan.delta
    return found
