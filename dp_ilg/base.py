"""Types that two or more modules speak.

An engine turns a loss and a batch into `PerExampleGrads`: numbers and a closure.
Clipping turns those into a `ClippedGrad`, which carries the geometry and the clip
norm it was made with, so that noise can only be drawn to match (law: one geometry).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float

if TYPE_CHECKING:
    PyTree = Any  # what jaxtyping means, but hides, so that strict mode refuses it
else:
    from jaxtyping import PyTree

Params = PyTree
Example = PyTree
LossFn = Callable[[Params, Example], Any]

MOST_METRICS = 32
"""How many metrics a step may release; noise given from outside has so many draws."""

_LENIENT = ("allow", "standard")


def own_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets the library's own arithmetic broadcast and promote, whatever a user set.

    ``jax_numpy_rank_promotion="raise"`` and ``jax_numpy_dtype_promotion="strict"`` are
    meant for the user's code, which `users_promotion` gives its settings back. Optax
    does not run under them either.

    Args:
        function: of the library.

    Returns:
        The same function.

    Example:
        >>> add = own_promotion(lambda a, b: a + b)
        >>> with jax.numpy_rank_promotion("raise"):
        ...     add(jnp.ones((2, 3)), jnp.ones(3)).shape
        (2, 3)
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _promotion(_LENIENT):
            return function(*args, **kwargs)

    return call


def users_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
    """A user's function under the settings there are now, wherever it is called.

    Args:
        function: what the library will call within `own_promotion`.

    Returns:
        The same function.

    Example:
        >>> with jax.numpy_rank_promotion("raise"):
        ...     loss = users_promotion(lambda a, b: a + b)
        >>> own_promotion(loss)(jnp.ones((2, 3)), jnp.ones(3))
        Traceback (most recent call last):
        ValueError: Operands could not be broadcast together for add on shapes ...
    """
    settings = _settings()
    if settings == _LENIENT:
        return function

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with _promotion(settings):
            return function(*args, **kwargs)

    return call


def _settings() -> tuple[str, str]:
    config: Any = jax.config
    return config.jax_numpy_rank_promotion, config.jax_numpy_dtype_promotion


@contextlib.contextmanager
def _promotion(settings: tuple[str, str]) -> Iterator[None]:
    """Rank and dtype promotion for a while; nothing is touched where they hold."""
    if settings == _settings():
        yield
        return
    rank, dtype = settings
    with jax.numpy_rank_promotion(rank), jax.numpy_dtype_promotion(dtype):
        yield


class PerExampleGrads(NamedTuple):
    """What an engine knows of a batch of gradients.

    Attributes:
        norms: L2 norm of every example's gradient in every group, float32
            ``[batch, groups]``; NaN or infinite where the gradient is.
        weighted_sum: maps coefficients, ``[batch]`` or ``[batch, groups]``, and the
            steps of the public grid, ``[groups]`` or None, to the float64 sum over
            examples, shaped like the parameters. A coefficient of 0 removes its
            example whatever that holds (law: zero is absent).
        sizes: what the rounding of `weighted_sum` is in proportion to, float32
            ``[batch, groups]``: for gradients kept in factors an upper bound of the
            sum of ``|first_t| |second_t|`` over the terms of the group, for formed
            gradients and looked-up rows the norm itself. Never below `norms` but by
            rounding; NaN or infinite where the gradient is.
        metrics: what the loss gives beside its value, ``[batch, metrics]``, or None.
        params: where the gradients were taken, for scores that read it, or None.

    Privacy: all are raw; none may leave before clipping and noise.
    """

    norms: Float[Array, "batch groups"]
    weighted_sum: Callable[..., Params]
    sizes: Float[Array, "batch groups"]
    metrics: Any = None
    params: Any = None


SEAL = (
    np.bool_(True),
    np.int32(0x5EA1ED),
    np.float32(1 + 2**-20),
    np.array([[1 + 2**-20, -2], [3, 5]], np.float32),
)
"""What a sum carries untouched: a reduction over devices makes a number of the first,
arithmetic on whole numbers changes the second, and any on floats, a cast to fewer bits
among it, the third; what treats matrices alone (``optax.centralize``, Muon) the last;
see `dp_ilg.geometry.seal`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClippedGrad:
    """A clipped sum over examples, with the geometry and norm it was clipped in.

    Attributes:
        gradients: float32 sum of clipped gradients, shaped like the parameters.
        layer_shares: sum over examples of their scores, float32 ``[groups]``.
        geometry: the `Geometry` of the clip.
        l2_clip_norm: the bound C on one example in that geometry, float32 scalar.
        fits: sum over examples of 1/2 for what the bound leaves alone and -1/2 for
            what exceeds it, float32 ``[1 + groups]``: the whole example against C,
            then each group against ``C w_j / sqrt(groups)``. None if not counted.
        remainder: what float32 rounded `gradients` by, float32, of the same tree:
            ``gradients + remainder`` is the sum on the public grid, a whole multiple of
            `dp_ilg.geometry.grid.grid_steps`. None where the sum was made by hand.
        fine: what the exact sum holds below that grid, at most half a step, or None;
            only adding another sum reads it.
        shares_remainder: what `layer_shares` were rounded by, float32 ``[groups]``.
        seal: constants, by which arithmetic on the whole tree is found out.
        metrics: the `dp_ilg.clipping.adding.metric_sums.MetricSums` of the step, or
            None where `dp_ilg.clipped_grad` was given no metrics.

    Privacy: adding or removing one example moves `gradients` by at most
    `l2_clip_norm` in the geometry's norm, `layer_shares` and `metrics` by at most 1
    in L2, and every entry of `fits` by 1/2.
    The values are not private themselves: noise has still to be added. ``jax.lax.psum``
    or any other arithmetic on the whole tree would change bound and weights with the
    sum: noise refuses what has been through it.

    Example:
        >>> import jax.numpy as jnp, dp_ilg
        >>> params = {"w": jnp.ones(2)}
        >>> geometry = dp_ilg.Geometry.uniform(params)
        >>> loss = lambda p, x: jnp.sum(p["w"] * x)
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
        >>> clipped = grad_fn(params, jnp.array([[3.0, 4.0]]), geometry=geometry)
        >>> [round(float(x), 4) for x in clipped.gradients["w"]]
        [0.6, 0.8]
        >>> clipped.sensitivity()
        1.0
    """

    gradients: Any
    layer_shares: Any
    geometry: Any
    l2_clip_norm: Any
    fits: Any = None
    remainder: Any = None
    fine: Any = None
    shares_remainder: Any = None
    seal: Any = SEAL
    metrics: Any = None

    def __contains__(self, name: object) -> bool:
        """Whether the parameter tree has a top-level entry `name` (Flax asks)."""
        try:
            return name in self.gradients
        except TypeError:
            return False

    @own_promotion
    def __add__(self, other: ClippedGrad) -> ClippedGrad:
        """Joins two chunks of the same step, clipped in the same geometry.

        What `clipped_grad` returned is added exactly: no order of chunks changes a bit.
        Where weights or clip norms differ, the sum's bound is unknown: that raises,
        or under ``jit``, where values are not known yet, makes the clip norm NaN, so
        that nothing but NaN can be released.
        """
        if not isinstance(other, ClippedGrad):
            return NotImplemented
        if self.geometry.groups != other.geometry.groups:
            raise ValueError(
                "Two chunks were clipped in different groups; pass both the same "
                "geometry."
            )
        _check_modes(self.geometry.facts, other.geometry.facts)
        bound = jnp.where(_same_bound(self, other), self.l2_clip_norm, jnp.nan)
        fits = None
        if self.fits is not None and other.fits is not None:
            fits = self.fits + other.fits
        kinds, *marks = zip(self.seal, other.seal, strict=True)
        others = [jnp.where(one == two, one, 0) for one, two in marks]
        seal = (jnp.minimum(*kinds), *others)
        metrics = _joined_metrics(self.metrics, other.metrics)
        rest: dict[str, Any] = dict(
            l2_clip_norm=bound, fits=fits, seal=seal, metrics=metrics
        )
        rest["geometry"] = self.geometry.saying(other.geometry.facts)
        if self.remainder is None and other.remainder is None:
            add = jax.tree.map(lambda a, b: a + b, self.gradients, other.gradients)
            return ClippedGrad(add, self.layer_shares + other.layer_shares, **rest)
        return ClippedGrad(**self.geometry.joined(self, other), **rest)

    def sensitivity(self, neighboring_relation: str = "add_or_remove_one") -> float:
        """How far one example moves the sum, in the geometry's norm.

        Args:
            neighboring_relation: "add_or_remove_one" (C) or "replace_one" (2 C).

        Returns:
            The bound as a Python float.

        Raises:
            ValueError: for another relation.
        """
        factors = {"add_or_remove_one": 1.0, "replace_one": 2.0}
        if neighboring_relation not in factors:
            raise ValueError(
                f"neighboring_relation is {neighboring_relation!r}, but must be one "
                f"of {sorted(factors)}."
            )
        return factors[neighboring_relation] * float(self.l2_clip_norm)


def _check_modes(one: Any, other: Any) -> None:
    """Raises for two sums that say different clip modes or scores."""
    for name in ("clip_mode", "score"):
        first, second = (getattr(x, name, None) for x in (one, other))
        agree = getattr(first, "agrees", first.__eq__)
        if None not in (first, second) and not agree(second):
            words = f"Two chunks were clipped with {name} {first} and {second}"
            raise ValueError(f"{words}; clip all chunks of a step with one function.")


def _joined_metrics(one: Any, other: Any) -> Any:
    """The metrics of two chunks, of which either both have some or none."""
    if (one is None) != (other is None):
        raise ValueError(
            "One of two chunks has metrics and the other has none; make both with the "
            "same dp_ilg.clipped_grad."
        )
    return None if one is None else one + other


def _same_bound(one: ClippedGrad, other: ClippedGrad) -> Any:
    """Whether two sums were clipped alike; raises where that is known to be false."""
    bare = [dataclasses.replace(c.geometry, facts=None) for c in (one, other)]
    norms = one.l2_clip_norm, other.l2_clip_norm
    facts = [jax.tree.flatten(pair) for pair in zip(bare, norms, strict=True)]
    (mine, structure), (theirs, other_structure) = facts
    alike: Any = structure == other_structure
    if alike:
        pairs = zip(mine, theirs, strict=True)
        alike = jnp.all(jnp.stack([jnp.all(jnp.asarray(a) == b) for a, b in pairs]))
    if not isinstance(alike, Tracer) and not bool(alike):
        raise ValueError(
            "Two chunks were clipped with different weights, coordinates or clip "
            "norms; clip all chunks of a step with the same geometry and l2_clip_norm."
        )
    return alike


class PrivateTransformation(optax.GradientTransformationExtraArgs):
    """An Optax transformation that also says what `dp_ilg.chain` must know.

    Attributes:
        role: "clip", "score", "map", "metric", "noise", "private" (whole chain) or "".
        key: the PRNG key given to the factory, or None.
        plan: the `PrivacyPlan` given to the factory, or None.
        geometry: maps the transformation's state to its `Geometry`, or None.
        importance: maps the state to importance shares ``[groups]``, or None.
        metrics: maps the state to released metrics by name, or None.
        links: of a chain, the transformations it was made of; else empty.
        facts: what it says of the clip (`dp_ilg.geometry.facts.ClipFacts`), or None.
        release: maps the state to the last released gradient it keeps, or None.
        clip_norm: of a clip, maps its state to the clip norm of the step; or None.
        maps: maps the state to the `AxisMaps` of leaves that it holds, or None.
    """

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Any, Any]]
    role: str
    key: Any
    plan: Any
    geometry: Any
    importance: Any
    metrics: Any
    links: tuple[Any, ...]
    facts: Any
    clip_norm: Any
    release: Any
    maps: Any

    def __new__(
        cls,
        init: Callable[..., Any],
        update: Callable[..., tuple[Any, Any]],
        *,
        role: str = "",
        key: Any = None,
        plan: Any = None,
        geometry: Callable[..., Any] | None = None,
        importance: Callable[..., Any] | None = None,
        metrics: Callable[..., Any] | None = None,
        links: tuple[Any, ...] = (),
        facts: Any = None,
        clip_norm: Callable[..., Any] | None = None,
        release: Callable[..., Any] | None = None,
        maps: Callable[..., Any] | None = None,
    ) -> PrivateTransformation:
        """Makes the (init, update) pair and hangs the facts on it."""
        self = super().__new__(cls, own_promotion(init), own_promotion(update))
        self.role, self.key, self.plan = role, key, plan
        self.geometry, self.importance = geometry, importance
        self.metrics, self.links = metrics, links
        self.facts, self.clip_norm, self.release = facts, clip_norm, release
        self.maps = maps
        return self
