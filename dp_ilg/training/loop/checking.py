"""What can be said before training: one table of layers, costs and warnings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import Example, Params
from dp_ilg.clipping.batches import batch_length
from dp_ilg.clipping.clipped_grad import ClippedGradFn
from dp_ilg.clipping.memory import temporary_bytes
from dp_ilg.geometry.layers import group


class LayerCheck(NamedTuple):
    """A layer before training.

    Attributes:
        layer: its name.
        parameters: how many are trained.
        paths: how the engine finds the norms of its leaves.
        noise: length of the noise on the mean gradient of the layer, in units of the
            clip norm, while all weights are 1: ``sigma sqrt(n_j) / B``.
        signal: length of the mean clipped gradient in the layer at these parameters,
            in the same units, measured on a public batch; without one the most it can
            be, 1.
        trouble: what is wrong with it, and what to do; else empty.
    """

    layer: str
    parameters: int
    paths: str
    noise: float
    signal: float
    trouble: str


@dataclasses.dataclass(frozen=True)
class Check:
    """What ``train.check`` found; ``print`` shows one table.

    Attributes:
        layers: a `LayerCheck` each.
        memory_mib: what a gradient holds beside parameters and batch, by XLA's account.
        microbatch: examples differentiated at once.
        warnings: what is wrong with plan or model, each with its remedy.
        measured: whether signals are those of a public batch.

    Privacy:
        From shapes, the plan and, if one was given, a public batch.
    """

    layers: tuple[LayerCheck, ...]
    memory_mib: float
    microbatch: int
    warnings: tuple[str, ...]
    measured: bool = False

    def __str__(self) -> str:
        signal = "signal" if self.measured else "signal, at most"
        head = ("layer", "parameters", "paths", "noise", signal, "trouble")
        rows = [head] + [
            (
                row.layer,
                f"{row.parameters:,}",
                row.paths,
                f"{row.noise:.3g}",
                f"{row.signal:.3g}",
                row.trouble,
            )
            for row in self.layers
        ]
        widths = [max(len(row[k]) for row in rows) for k in range(len(head) - 1)]
        lines = [
            "  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in rows
        ]
        lines += [
            "",
            "noise and signal: of one step's mean gradient, in units of the clip norm",
            f"memory: {self.memory_mib:.1f} MiB, {self.microbatch} examples at once",
        ]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])


def checked(
    grad_fn: ClippedGradFn,
    params: Params,
    batch: Example,
    plan: PrivacyPlan,
    layers: Any,
    gradients: Any,
    silent: Any = (),
) -> Check:
    """Makes the table.

    Args:
        grad_fn: of the run.
        params: the parameters.
        batch: a batch, of which shapes are read.
        plan: of the run.
        layers: how leaves are grouped.
        gradients: the clipped sum of a public batch, or None.
        silent: layers that get no gradient from the source's probe.

    Returns:
        The `Check`.
    """
    groups = group(params, layers)
    explained = grad_fn.explain(params, batch, layers)
    signals = [1.0] * len(groups.names)
    if gradients is not None:
        scale = plan.l2_clip_norm * batch_length(batch)
        norms = groups.norms(jax.tree.leaves(gradients.gradients))
        signals = (np.asarray(norms, np.float64) / scale).tolist()
    sigma = float(np.max(plan.gradient_noise_multipliers))
    rows = []
    for place, (name, size) in enumerate(zip(groups.names, groups.sizes, strict=True)):
        pairs = zip(explained, groups.leaves, strict=True)
        own = [row for row, leaf in pairs if place in leaf.groups]
        noise = sigma * float(np.sqrt(size)) / plan.batch_size
        paths = ", ".join(sorted({row.path for row in own}))
        trouble = _trouble(own, noise, signals[place], plan)
        if name in silent and not trouble:
            trouble = "no gradient in the probe: weight at the floor; another generator"
        rows.append(LayerCheck(name, size, paths, noise, signals[place], trouble))
    rows += [
        LayerCheck(row.leaf, 0, "none", 0.0, 0.0, "frozen")
        for row, leaf in zip(explained, groups.leaves, strict=True)
        if not leaf.groups
    ]
    memory = temporary_bytes(grad_fn, params, batch, layers) / 2**20
    warnings = tuple(plan_warnings(plan, sum(groups.sizes)))
    held = int(explained.microbatch or 0)
    return Check(tuple(rows), memory, held, warnings, gradients is not None)


def plan_warnings(plan: PrivacyPlan, parameters: int) -> list[str]:
    """What is wrong with a plan, each with its remedy.

    Args:
        plan: any plan.
        parameters: how many are trained.

    Returns:
        Sentences; none for a plan like those of the papers.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-3,
        ...     num_examples=900, batch_size=300, num_steps=2)
        >>> plan_warnings(plan, 10)
        []
    """
    epsilon, found = plan.epsilon(), []
    sigma = float(np.max(plan.gradient_noise_multipliers))
    if plan.delta > 1 / plan.num_examples:
        found.append(
            f"delta is {plan.delta:g}, above 1 / {plan.num_examples:,}, so publishing "
            "one example at random would satisfy the guarantee; plan with a smaller "
            "delta."
        )
    if not np.isfinite(epsilon):
        found.append("epsilon is infinite: a step has no noise; plan with an epsilon.")
    elif epsilon > 10:
        found.append(
            f"epsilon is {epsilon:.3g}, a weak promise by itself; plan with more noise "
            "or fewer steps."
        )
    noise = sigma * np.sqrt(parameters) / plan.batch_size
    if np.sqrt(plan.num_steps) < noise:
        wanted = math.ceil(plan.batch_size * noise / np.sqrt(plan.num_steps))
        least = f"batch_size={wanted:,} or more"
        if wanted > plan.num_examples:
            least = "more examples, or a larger epsilon"
        found.append(
            f"the batch of {plan.batch_size:,} is far too small for this epsilon and "
            f"{parameters:,} parameters: if the gradients of all steps agreed, their "
            f"sum would still be shorter than the noise; plan with {least}, or train "
            "fewer parameters."
        )
    return found


def _trouble(own: Any, noise: float, signal: float, plan: PrivacyPlan) -> str:
    unread = [row for row in own if row.path == "none"]
    if unread:
        names = ", ".join(row.leaf for row in unread)
        return f"no gradient for {names} ({unread[0].why}): freeze it, or read it"
    if math.sqrt(plan.num_steps) * signal < noise:
        return "drowns in noise: larger batch, fewer parameters, or frozen"
    return next((row.advice for row in own if row.advice), "")
