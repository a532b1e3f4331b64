"""Two engines on one loss: what each gives, and how far apart they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import dp_ilg
from dp_ilg.clipping.clip import as_clip_mode, clip_sum
from dp_ilg.clipping.engine_table import ENGINES
from dp_ilg.geometry.layers import group, paths
from tests.zoo.core import Case

ENGINE = "bookkeeping"


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """The options that this XLA knows."""
    known = {}
    for name, value in options.items():
        try:
            jax.jit(jnp.negative, compiler_options={name: value})(1.0)
        except jax.errors.JaxRuntimeError:
            continue
        known[name] = value
    return known


QUICK = _known(
    {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
    }
)
"""Compiler options that halve the time to compile; programs run slower, as exactly."""
NOISE_FLOOR = 1e-6
"""Parts this much smaller than the whole may be rounding noise of the whole."""


class Outcome(NamedTuple):
    """What an engine gives for a batch: raw norms, then the clipped sum."""

    norms: Any
    gradients: Any
    layer_shares: Any


def geometry_of(params: Any, layers: Any = "leaf", seed: int = 3) -> dp_ilg.Geometry:
    """Random weights, a factor of e apart from one another."""
    names = group(params, layers).names
    weights = np.random.default_rng(seed).lognormal(sigma=1.0, size=len(names))
    return dp_ilg.Geometry.of(params, weights.tolist(), layers)


def median_bound(norms: Any, geometry: dp_ilg.Geometry) -> Any:
    """The median norm of an example in the geometry; 1 where that is zero."""
    middle = jnp.nanmedian(geometry.norm(norms))
    return jnp.where(middle > 0, middle, 1.0)


def compared(
    loss: Callable, geometry: dp_ilg.Geometry, modes: tuple[str, ...] = ("joint",)
) -> Callable[[Any, Any], dict[str, tuple[Outcome, Outcome]]]:
    """A function of ``(params, batch)`` that gives both engines' outcomes by mode.

    The clip is at the median norm and every fourth example is padding.
    """

    def run(params: Any, batch: Any) -> dict[str, tuple[Outcome, Outcome]]:
        both = [
            ENGINES[name](loss, params, batch, geometry.groups)
            for name in ("vmap", ENGINE)
        ]
        bound = median_bound(both[0].norms, geometry)
        padding = jnp.arange(both[0].norms.shape[0]) % 4 == 3

        def outcome(per_example: Any, mode: str) -> Outcome:
            made = as_clip_mode(mode)
            clipped = clip_sum(per_example, geometry, bound, made, padding)
            shares = clipped.layer_shares
            return Outcome(per_example.norms, clipped.gradients, shares)

        return {m: (outcome(both[0], m), outcome(both[1], m)) for m in modes}

    return run


def compare_case(
    case: Case,
    layers: Any = "leaf",
    modes: tuple[str, ...] = ("joint",),
    tolerance: float = 5e-6,
    options: dict[str, Any] | None = None,
) -> None:
    """Runs both engines on a case in one compiled function; raises if they differ."""
    run = compared(case.loss, geometry_of(case.params, layers), modes)
    found = jax.jit(run, compiler_options=options)(case.params, case.batch)
    for mode, (want, got) in found.items():
        assert_agree(want, got, tolerance, f"clip mode {mode}", case.excess)


def compare_briefly(case: Case, tolerance: float = 5e-6) -> None:
    """Compares raw norms and the sum clipped at the median norm, by leaf.

    Cheaper to compile: the reference is ``jax.vmap(jax.grad(loss))`` and NumPy in
    float64, clipped by the definition.
    """
    geometry = geometry_of(case.params)
    gradient = jax.vmap(jax.grad(case.loss), (None, 0))
    found = jax.jit(gradient, compiler_options=QUICK)(case.params, case.batch)
    want, coefficients = clipped_by_hand(found, np.asarray(geometry.weights))

    def run(params: Any, batch: Any, coefficients: Any) -> tuple[Any, Any]:
        made = ENGINES[ENGINE](case.loss, params, batch, geometry.groups)
        return made.norms, made.weighted_sum(coefficients)

    compiled = jax.jit(run, compiler_options=QUICK)
    norms, sums = compiled(case.params, case.batch, jnp.float32(coefficients))
    got = Outcome(norms, sums, want.layer_shares)
    assert_agree(want, got, tolerance, excess=case.excess)


def clipped_by_hand(gradients: Any, weights: Any) -> tuple[Outcome, Any]:
    """Norms by leaf and the joint clip at the median norm, with its coefficients."""
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), gradients)
    flat = [x.reshape(x.shape[0], -1) for x in jax.tree.leaves(wide)]
    norms = np.stack([np.linalg.norm(x, axis=1) for x in flat], axis=1)
    lengths = np.linalg.norm(norms / weights, axis=1)
    bound = np.median(lengths) or 1.0
    coefficients = np.minimum(1, bound / np.maximum(lengths, 1e-300))
    coefficients = np.where(np.arange(len(lengths)) % 4 == 3, 0, coefficients)
    rounded = np.float64(np.float32(coefficients))
    sums = jax.tree.map(lambda x: np.tensordot(rounded, x, 1), wide)
    return Outcome(norms, sums, np.ones(1)), coefficients


def assert_agree(
    want: Any,
    got: Any,
    tolerance: float,
    where: str = "",
    excess: float | None = None,
) -> None:
    """Raises with one line a quantity unless all agree to the relative tolerance.

    Args:
        want: the reference `Outcome`.
        got: the engine's.
        tolerance: bound on every entry of `differences`; the float32 layer shares
            are held to no less than 2e-6.
        where: said at the head of the message.
        excess: how much larger norms may be; by default as much as smaller.
    """
    found = differences(want, got)
    limits = {name: tolerance for name in found}
    if excess is not None:
        limits["norms"] = excess
        found["shortfall of norms"] = norm_difference(
            want.norms, np.minimum(want.norms, got.norms)
        )
        limits["shortfall of norms"] = tolerance
    limits["layer_shares"] = max(tolerance, 2e-6)
    bad = {n: e for n, e in found.items() if not e <= limits[n]}
    if bad:
        rows = [f"  {n}: {e:.3g}" for n, e in found.items()]
        head = f"engines differ by more than {tolerance:g} {where}"
        raise AssertionError("\n".join([head, *rows]))


def differences(want: Any, got: Any) -> dict[str, float]:
    """Largest relative difference of the norms, each leaf of the sum, and the shares.

    Norms are compared to themselves, entries of a sum to the largest of their leaf,
    both no smaller than `NOISE_FLOOR` of the whole.
    """
    found = {"norms": norm_difference(want.norms, got.norms)}
    whole = max(largest(x) for x in jax.tree.leaves(want.gradients))
    pairs = zip(paths(want.gradients), paths(got.gradients), strict=True)
    for (path, a), (_, b) in pairs:
        scale = max(largest(a), NOISE_FLOOR * whole)
        found["/".join(path)] = relative(a, b, scale)
    scale = largest(want.layer_shares)
    found["layer_shares"] = relative(want.layer_shares, got.layer_shares, scale)
    return found


def norm_difference(want: Any, got: Any) -> float:
    """Largest relative difference of two ``[batch, groups]`` arrays of norms."""
    a, b = np.asarray(want, np.float64), np.asarray(got, np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    a, b = np.where(np.isfinite(a), a, 0), np.where(np.isfinite(b), b, 0)
    whole = np.sqrt(np.sum(a**2, axis=1, keepdims=True))
    return relative(a, b, np.maximum(a, NOISE_FLOOR * whole))


def largest(x: Any) -> float:
    """Largest magnitude in an array; 0 if it is empty."""
    return float(np.max(np.abs(np.asarray(x, np.float64)), initial=0))


def relative(want: Any, got: Any, scale: Any) -> float:
    """Largest difference as a multiple of `scale`; where that is 0, of 1e-300."""
    if want.shape != got.shape:
        return float("inf")
    gap = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))
    return float(np.max(gap / np.maximum(scale, 1e-300), initial=0))
