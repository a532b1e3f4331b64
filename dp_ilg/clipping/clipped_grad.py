"""Clipped gradients of a batch, by any engine, in micro-batches.

The seam for faster engines: an engine is a row of `engine_table.ENGINES`, and
everything here works on what it returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dp_ilg import validation
from dp_ilg.base import (
    SEAL,
    ClippedGrad,
    Example,
    LossFn,
    Params,
    own_promotion,
    users_promotion,
)
from dp_ilg.clipping import eager
from dp_ilg.clipping.adding.metric_sums import (
    Metric,
    Metrics,
    as_metrics,
    facts_of,
    measured,
    no_metrics,
)
from dp_ilg.clipping.adding.sum_error import SumError, check_lot, sum_error
from dp_ilg.clipping.adding.sums import MOST_ROWS
from dp_ilg.clipping.batches import batch_length, split_rows, zero_sum
from dp_ilg.clipping.clip import clip_sum
from dp_ilg.clipping.engine_table import ENGINES
from dp_ilg.clipping.explicit import placed_by_xla
from dp_ilg.clipping.leaf_paths import Explanation
from dp_ilg.clipping.losses.advice import check_arguments
from dp_ilg.clipping.modes import ClipMode, agreed_mode, as_clip_mode
from dp_ilg.clipping.purity import check_loss
from dp_ilg.clipping.scores.table import Score, agreed_score, as_score
from dp_ilg.clipping.sparse import plain
from dp_ilg.geometry.facts import ClipFacts
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.layers import group
from dp_ilg.sampling.batch import examples_of, opened


@dataclasses.dataclass(frozen=True)
class ClippedGradFn:
    """The function `clipped_grad` returns; see there."""

    loss_fn: LossFn
    l2_clip_norm: Any
    clip_mode: ClipMode | None
    engine: str
    microbatch_size: int | None
    has_aux: bool = False
    metrics: Metrics = ()
    score: Score | None = None

    def __call__(
        self,
        params: Params,
        batch: Example,
        *,
        geometry: Geometry | None = None,
        is_padding_example: Any = None,
    ) -> ClippedGrad:
        """Sums the clipped gradients of a batch.

        Args:
            params: any tree of floating-point arrays.
            batch: the same tree as an example, each leaf with a leading batch axis; or
                a `dp_ilg.sampling.batch.SealedBatch`, which brings its mask.
            geometry: ``tx.geometry(state)``, or a `Geometry` of public weights;
                required, since nothing is clipped in a norm that was not asked for.
            is_padding_example: bool ``[batch]``; True rows do not exist. Leave it out
                where every row is an example; ``False`` says so aloud.

        Returns:
            The `ClippedGrad`.

        Raises:
            ValueError: for a batch without common batch axis, without the mask of the
                chunk it seems to come from, or with more examples
                than the public grid holds, a loss that `purity.check_loss` refuses, a
                geometry of another model, or of a chain with another mode or norm.
            TypeError: for parameters, a batch or a geometry of the wrong type, and
                for a missing geometry.
        """
        mode = agreed_mode(geometry, self.clip_mode, self.l2_clip_norm)
        score = agreed_score(geometry, self.score)
        batch, mask = opened(batch, is_padding_example)
        found = dataclasses.replace(self, clip_mode=mode, score=score)
        own, rows = found._settled(batch)

        def total(*arrays: Any) -> ClippedGrad:
            return own._checked_sum(*arrays, self.loss_fn)

        total = placed_by_xla(total, params)
        return total(params, rows, geometry, mask)

    def _settled(self, batch: Example) -> tuple[ClippedGradFn, Example]:
        """The same for plain arrays, its loss under the user's promotion of types.

        And a new function at every call: JAX keeps what it traced by the function, and
        would not see what has changed in a loss that closes over it.
        """
        loss_fn = measured(self.loss_fn, self.has_aux, self.metrics)
        loss_fn, rows = plain(users_promotion(loss_fn), batch)
        fresh = lambda params, example: loss_fn(params, example)  # noqa: E731
        return dataclasses.replace(self, loss_fn=fresh), rows

    @own_promotion
    def _checked_sum(
        self, params: Params, batch: Example, geometry: Any, mask: Any, owner: LossFn
    ) -> ClippedGrad:
        """The sum, compiled if a call outside of ``jax.jit`` would compile anyway."""
        size = batch_length(batch)
        geometry = self._check(params, batch, geometry)
        geometry = geometry.saying(ClipFacts(self.clip_mode, score=self.score))
        check_lot(size, sum(geometry.groups.sizes))
        padding = jnp.zeros(size, bool) if mask is None else jnp.asarray(mask)
        if padding.shape != (size,) or padding.dtype != bool:
            raise ValueError(
                f"is_padding_example has shape {padding.shape} and dtype "
                f"{padding.dtype}, but must be bool of shape ({size},)."
            )
        inputs = params, batch, geometry, padding, self.l2_clip_norm
        if not eager.is_eager(inputs):
            return self._sum(*inputs)
        closed = eager.traced(self.loss_fn, params, batch)
        chunk, _ = self._prepared(self.loss_fn, params, batch, geometry)
        fits = size <= chunk and geometry.coordinates is None
        if not eager.is_eager(closed.consts) or (fits and not eager.has_loops(closed)):
            return self._sum(*inputs)
        facts = self.clip_mode, ENGINES[self.engine], self.microbatch_size
        facts += facts_of(self.metrics), self.score
        bare = dataclasses.replace(self, loss_fn=_no_loss, l2_clip_norm=None)

        def total(loss_fn: LossFn, *inputs: Any) -> ClippedGrad:
            return dataclasses.replace(bare, loss_fn=loss_fn)._sum(*inputs)

        found = eager.compiled(closed, owner, facts, total)(*inputs)
        return dataclasses.replace(found, seal=SEAL)

    def _sum(
        self,
        params: Params,
        batch: Example,
        geometry: Geometry,
        padding: Array,
        l2_clip_norm: Any,
    ) -> ClippedGrad:
        """The sum itself, micro-batch by micro-batch."""
        chunk, run = self._prepared(self.loss_fn, params, batch, geometry)
        mode: Any = self.clip_mode
        facts, how = facts_of(self.metrics), (geometry, l2_clip_norm, mode)

        def one(rows: Example, mask: Array) -> ClippedGrad:
            return clip_sum(
                run(params, rows)._replace(params=params), *how, mask, facts
            )

        if len(padding) <= chunk:
            return one(batch, padding)
        pieces = (split_rows(batch, chunk), ~split_rows(~padding, chunk))
        start = zero_sum(params, geometry.forgetting(), l2_clip_norm)
        start = dataclasses.replace(start, metrics=no_metrics(facts))
        return self._many(one, pieces, start)

    def explain(self, params: Params, batch: Example, layers: Any = "module") -> Any:
        """Says for each leaf which path is taken, why, and what it costs.

        Args:
            params: as in a call.
            batch: as in a call; only shapes are read.
            layers: how the geometry groups the leaves, see `dp_ilg.layers`, or the
                `Geometry` itself, whose maps may decide about paths.

        Returns:
            An `Explanation`: one `LeafPlan` a leaf; ``print`` shows a table.
        """
        own, batch = self._settled(examples_of(batch))
        geometry = Geometry.given(params, layers)
        batch_length(batch)
        own._check(params, batch, geometry)
        held, _ = own._prepared(own.loss_fn, params, batch, geometry)
        explain = own_promotion(ENGINES[self.engine].explain)
        how = geometry.groups, geometry.coordinates, held
        found: Explanation = explain(own.loss_fn, params, batch, *how)
        found.microbatch = held
        return found

    def sum_error(
        self, params: Params, batch: Example, layers: Any = "module"
    ) -> SumError:
        """Says how far sums with and without one example can be apart, beyond C.

        Args:
            params: as in a call; only shapes are read.
            batch: as in a call; only shapes are read.
            layers: as in `explain`.

        Returns:
            The `SumError`: b, of what it consists, and the argument for every leaf. The
            clip leaves room for b, so that the sensitivity is C.
        """
        rows = self.explain(params, batch, layers)
        arguments = [(row.leaf, row.added) for row in rows]
        return sum_error(arguments, Geometry.given(params, layers).groups)

    def microbatch(self, params: Params, batch: Example) -> int:
        """Says how many examples of a batch a call differentiates at once.

        Args:
            params: as in a call; only shapes are read.
            batch: as in a call; only shapes are read.

        Returns:
            `microbatch_size` where given, else what the engine picks; at most a batch,
            and at most 2,048.
        """
        own, rows = self._settled(examples_of(batch))
        return own._prepared(own.loss_fn, params, rows, Geometry.uniform(params))[0]

    @own_promotion
    def _prepared(
        self, loss_fn: LossFn, params: Params, batch: Example, geometry: Geometry
    ) -> tuple[int, Callable[..., Any]]:
        """The micro-batch, asked for or picked by the engine, and the engine."""
        size = batch_length(batch)
        how = geometry.groups, geometry.coordinates
        picked, run = ENGINES[self.engine].prepare(loss_fn, params, batch, *how)
        return min(size, self.microbatch_size or picked or size, MOST_ROWS), run

    def _many(
        self, one: Callable[..., ClippedGrad], pieces: Any, start: ClippedGrad
    ) -> ClippedGrad:
        """Accumulates micro-batches; the last is filled up with padding."""

        def body(total: ClippedGrad, piece: Any) -> tuple[ClippedGrad, None]:
            return total + one(*piece), None

        count = jax.tree.leaves(pieces)[0].shape[0]
        asked = self.microbatch_size is not None
        unroll = ENGINES[self.engine].unroll(count, asked)
        return jax.lax.scan(body, start, pieces, unroll=unroll)[0]

    @own_promotion
    def _check(self, params: Params, batch: Example, geometry: Any) -> Geometry:
        group(params)
        if not isinstance(geometry, Geometry):
            found = "missing" if geometry is None else type(geometry).__name__
            raise TypeError(
                f"geometry is {found}, but must be a Geometry; pass "
                "geometry=tx.geometry(state), or geometry=dp_ilg.Geometry.uniform("
                "params) where nothing releases one."
            )
        geometry.groups.check(jax.tree.leaves(params))
        if geometry.coordinates is not None:
            geometry.coordinates.check(geometry.groups)
        example = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch
        )
        check_loss(self.loss_fn, params, example, bool(self.metrics))
        return geometry


def clipped_grad(
    loss_fn: LossFn,
    *,
    l2_clip_norm: Any,
    clip_mode: str | ClipMode | None = None,
    engine: str = "auto",
    microbatch_size: int | None = None,
    has_aux: bool = False,
    metrics: Mapping[str, Metric] | None = None,
    score: Any = None,
) -> ClippedGradFn:
    """Turns a loss of one example into the clipped gradient sum of a batch.

    Args:
        loss_fn: ``(params, example) -> scalar``, pure, for ONE example.
        l2_clip_norm: bound C on one example in the geometry's norm.
        clip_mode: "joint", "normalize", "per_layer" or a `ClipMode`; None takes what
            the chain says whose ``geometry(state)`` is given, else "joint".
        engine: "bookkeeping" (exact for any pure loss, mostly without per-example
            gradients), "vmap" (the plain way), "exact" (the plain way, each clipped
            example rounded towards zero onto the public grid, so that sums do not
            round at all) or "auto", which is "bookkeeping".
        microbatch_size: how many examples are differentiated at once, at most 2,048
            (None: the engine picks, from shapes). Changes memory and speed, and the
            result by rounding only.
        has_aux: whether `loss_fn` returns a pair ``(loss, aux)``; `aux` feeds the
            metrics and goes nowhere else.
        metrics: name -> `dp_ilg.Metric`, a bounded function ``(loss, aux) -> number``
            of one example. `dp_ilg.release_metrics` releases their noisy means.
        score: how important an example finds each group: a name of
            `dp_ilg.clipping.scores.table.SCORES` or a function of its statistics; None
            takes what the chain says, else "l2".

    Returns:
        ``grad_fn(params, batch, *, geometry, is_padding_example=None)``, which gives a
        `ClippedGrad`, and ``grad_fn.explain(params, batch)``.

    Raises:
        ValueError: for a bad norm, mode, engine, size or score.
        TypeError: for a loss or metric that is no function.

    Privacy: sensitivity `l2_clip_norm` in the geometry's norm for adding or removing
    one example, and 1 for the scores and for the metrics, whatever their
    functions return; not private before noise. Values of single examples do not leave.

    Example:
        >>> import jax.numpy as jnp, dp_ilg
        >>> params = {"w": jnp.zeros(2)}
        >>> loss = lambda p, example: jnp.sum(p["w"] * example["x"]) * example["y"]
        >>> grad_fn = clipped_grad(loss, l2_clip_norm=5.0, microbatch_size=1)
        >>> batch = {"x": jnp.array([[3.0, 4.0], [6.0, 8.0]]), "y": jnp.ones(2)}
        >>> geometry = dp_ilg.Geometry.uniform(params)
        >>> clipped = grad_fn(params, batch, geometry=geometry)
        >>> [round(float(x), 3) for x in clipped.gradients["w"]]
        [6.0, 8.0]

    Reference: Abadi et al. 2016, Algorithm 1; docs/idea.md.
    """
    check_arguments(loss_fn)
    validation.positive("l2_clip_norm", l2_clip_norm)
    if microbatch_size is not None:
        validation.whole("microbatch_size", microbatch_size)
    chosen = "bookkeeping" if engine == "auto" else engine
    if not isinstance(chosen, str) or chosen not in ENGINES:
        raise ValueError(
            f"engine is {engine!r}, but must be 'auto' or one of {sorted(ENGINES)}."
        )
    mode = None if clip_mode is None else as_clip_mode(clip_mode)
    how = mode, chosen, microbatch_size
    rest = has_aux, as_metrics(metrics), None if score is None else as_score(score)
    return ClippedGradFn(loss_fn, l2_clip_norm, *how, *rest)


def _no_loss(params: Params, example: Example) -> Any:
    """Stands where a loss will."""
    raise NotImplementedError("No loss was given yet; dp_ilg.clipped_grad sets one.")
