"""The stages of a step on kept rows: count, choose, clip, update; and all in one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import (
    Example,
    Params,
    PrivateTransformation,
    own_promotion,
    users_promotion,
)
from dp_ilg.clipping.adding.metric_sums import measured
from dp_ilg.clipping.batches import batch_length
from dp_ilg.clipping.clipped_grad import ClippedGradFn
from dp_ilg.clipping.lookups.counts import RowCounts, count_rows
from dp_ilg.clipping.lookups.tables import Tables, count_of, find_tables
from dp_ilg.clipping.lookups.traced import compact_loss, looked_up
from dp_ilg.clipping.purity import check_loss
from dp_ilg.clipping.sparse import plain
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.seal import sealed
from dp_ilg.noise.add_noise import fresh_key
from dp_ilg.optimizers.kept_rows import compact
from dp_ilg.optimizers.kept_rows.gradient import (
    RowGradient,
    check_geometry,
    check_kept,
    check_size,
    said_rows,
    where_sound,
)
from dp_ilg.optimizers.kept_rows.release import KeptRows, PastCounts, released_rows
from dp_ilg.sampling.batch import opened


class KeepRowsState(NamedTuple):
    """What a run with kept rows carries from step to step.

    Attributes:
        key: of the counts' noise.
        step: which step comes next.
        past: the running average of the noisy counts.
        inner: the optimizer's state, with all rows of what it keeps a row.
    """

    key: Any
    step: Any
    past: PastCounts
    inner: Any


@dataclasses.dataclass(frozen=True)
class RowOptimizer:
    """What `keep_rows` returns; see there.

    Attributes:
        tx: the private optimizer.
        asked: pairs of a table's path and its most rows.
        threshold: in standard deviations of the averaged counts' noise.
        decay: how much of the average of the counts a step keeps.
        rows_of: which rows an example reads, or None for what its loss looks up.
        key: of the counts' noise, secret.
        plan: that of `tx`.
    """

    tx: PrivateTransformation
    asked: tuple[tuple[str, int], ...]
    threshold: float
    decay: float
    rows_of: Callable[[Example], Mapping[str, Any]] | None
    key: Any = dataclasses.field(repr=False)
    plan: PrivacyPlan

    def init(self, params: Params) -> KeepRowsState:
        """The state before the first step.

        Args:
            params: all parameters.

        Returns:
            The state; what the optimizer keeps a row is there for all rows.

        Raises:
            ValueError: for a table that is not there or frozen, an optimizer that keeps
                something else than rows, or more numbers a step than the plan pays for.
        """
        tables = self.tables(params)
        inner = compact.first_state(self.tx.init, params, tables)
        check_geometry(self.tx.geometry(inner), tables)
        past = PastCounts.none(count_of(tables))
        step = jnp.zeros((), jnp.int32)
        return KeepRowsState(fresh_key(self.key), step, past, inner)

    def tables(self, params: Params) -> Tables:
        """The tables of some parameters, checked."""
        return find_tables(params, self.asked)

    def geometry(self, state: KeepRowsState) -> Geometry:
        """The geometry of the next step, for kept rows."""
        return self.tx.geometry(state.inner)

    def importance(self, state: KeepRowsState) -> Any:
        """Importance shares of the groups."""
        return self.tx.importance(state.inner)

    def metrics(self, state: KeepRowsState) -> Any:
        """The released metrics, if the optimizer has any."""
        return self.tx.metrics(state.inner) if self.tx.metrics else {}

    @own_promotion
    def counts(
        self,
        grad_fn: ClippedGradFn,
        params: Params,
        batch: Example,
        is_padding_example: Any = None,
    ) -> RowCounts:
        """Counts which rows the examples of a chunk read; add those of all chunks.

        Args:
            grad_fn: from `dp_ilg.clipped_grad`; its loss says what is looked up.
            params: all parameters.
            batch: the examples, or a sealed batch.
            is_padding_example: bool ``[batch]``; True rows do not exist.

        Returns:
            The `RowCounts`; ``counts + counts`` joins chunks, exactly.

        Raises:
            ValueError: for a loss that reads a table otherwise than row by row.

        Privacy: sensitivity 1 for adding or removing one example; not private yet.
        """
        batch, mask = opened(batch, is_padding_example)
        tables, size = self.tables(params), batch_length(batch)
        loss_fn = measured(grad_fn.loss_fn, grad_fn.has_aux, ())
        loss_fn, rows = plain(users_promotion(loss_fn), batch)
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), rows)
        if self.rows_of is None:
            check_loss(loss_fn, params, one)
            numbers = looked_up(loss_fn, params, rows, tables)
        else:
            own = users_promotion(self.rows_of)
            numbers = jax.vmap(lambda x: said_rows(own(x), tables))(batch)
        padding = jnp.zeros(size, bool) if mask is None else jnp.asarray(mask)
        if padding.shape != (size,) or padding.dtype != bool:
            raise ValueError(
                f"is_padding_example has shape {padding.shape} and dtype "
                f"{padding.dtype}, but must be bool of shape ({size},)."
            )
        return count_rows(numbers, ~padding, tables)

    @own_promotion
    def kept(self, counts: Any, state: KeepRowsState, noise: Any = None) -> KeptRows:
        """Releases which rows take part in this step.

        Args:
            counts: of the whole step.
            state: the step's.
            noise: draws from outside, as in ``tx.update``.

        Returns:
            The `KeptRows`.

        Privacy: one Gaussian with multiplier ``plan.row_noise_multipliers[t]``.
        """
        if not isinstance(counts, RowCounts):
            raise TypeError(
                f"counts is {type(counts).__name__}, but must be what counts returned "
                "for the step's examples."
            )
        args = self.plan, state.key, state.step, self.threshold, noise
        return released_rows(counts, *args, past=state.past, decay=self.decay)

    @own_promotion
    def gradient(
        self,
        grad_fn: ClippedGradFn,
        params: Params,
        state: KeepRowsState,
        kept: KeptRows,
        batch: Example,
        is_padding_example: Any = None,
    ) -> RowGradient:
        """The clipped sum of a chunk on kept rows; add those of all chunks.

        Args:
            grad_fn: from `dp_ilg.clipped_grad`.
            params: all parameters.
            state: the step's.
            kept: the rows.
            batch: the examples, or a sealed batch.
            is_padding_example: bool ``[batch]``; True rows do not exist.

        Returns:
            The `RowGradient`.

        Raises:
            ValueError: as `grad_fn`, and for a loss that reads a table otherwise than
                row by row.

        Micro-batches are as large as for all rows: what they hold is small beside the
        whole table, and each adds up all kept rows once more.

        Privacy: sensitivity C given the kept rows, for adding or removing one example.
        """
        check_kept(kept, self.plan)
        owners, _ = compact.owners_of(self.tx.init, params, kept.tables)
        geometry = self.tx.geometry(compact.narrowed(state.inner, owners, kept.ids))
        loss_fn = compact_loss(grad_fn.loss_fn, params, kept.tables, kept.slots())
        at_once = grad_fn.microbatch(params, batch)
        few = dataclasses.replace(grad_fn, loss_fn=loss_fn, microbatch_size=at_once)
        small = compact.compact_params(params, kept.tables, kept.ids)
        mask = dict(is_padding_example=is_padding_example)
        return RowGradient(few(small, batch, geometry=geometry, **mask), kept)

    @own_promotion
    def update(
        self,
        params: Params,
        state: KeepRowsState,
        gradient: RowGradient,
        noise: Any = None,
    ) -> tuple[Params, KeepRowsState]:
        """Adds the noise to the kept rows and to all other leaves, and takes the step.

        Args:
            params: all parameters.
            state: the step's.
            gradient: of the whole step.
            noise: draws from outside: those the rows were kept with.

        Returns:
            Parameters and state; rows that were not kept are as they were.

        Raises:
            ValueError: for more numbers a step than the plan pays for.

        Privacy: with the choice of rows one Poisson-sampled Gaussian with multiplier
        ``plan.noise_multipliers[t]``. Rows kept for another step release NaN.
        """
        kept, tables = gradient.kept, gradient.kept.tables
        check_kept(kept, self.plan)
        check_size(self.plan, gradient.clipped, tables)
        whole = sealed(gradient.clipped)  # raises before the rows are read
        sound = whole & (kept.valid == 1) & (kept.step == state.step)
        clipped = where_sound(gradient.clipped, sound)
        owners, _ = compact.owners_of(self.tx.init, params, tables)
        inner = compact.narrowed(state.inner, owners, kept.ids)
        small = compact.compact_params(params, tables, kept.ids)
        given = {} if noise is None else {"noise": noise}
        updates, after = self.tx.update(clipped, inner, small, **given)
        new = jax.tree.map(lambda p, u: jnp.asarray(p + u, p.dtype), small, updates)
        places = {table.leaf: k for k, table in enumerate(tables)}
        leaves, treedef = jax.tree.flatten(params)
        own = [places.get(place) for place in range(len(leaves))]
        params = compact.widened(params, new, tuple(own), kept.ids)
        params = jax.tree.unflatten(treedef, jax.tree.leaves(params))
        inner = compact.widened(state.inner, after, owners, kept.ids)
        return params, KeepRowsState(state.key, state.step + 1, kept.past, inner)

    def step(self, grad_fn: ClippedGradFn) -> Callable[..., Any]:
        """The whole step of a batch that fits: counts, rows, gradient, update.

        Args:
            grad_fn: from `dp_ilg.clipped_grad`.

        Returns:
            ``step(params, state, batch, is_padding_example=None, noise=None) ->
            (params, state)``, to be jitted with ``donate_argnums=(0, 1)``.

        Privacy: one step of the plan.
        """

        def whole(
            params: Params,
            state: KeepRowsState,
            batch: Example,
            is_padding_example: Any = None,
            noise: Any = None,
        ) -> tuple[Params, KeepRowsState]:
            mask = is_padding_example
            counts = self.counts(grad_fn, params, batch, mask)
            kept = self.kept(counts, state, noise)
            found = self.gradient(grad_fn, params, state, kept, batch, mask)
            return self.update(params, state, found, noise)

        return whole

    def draws(self, source: Any, params: Params, state: KeepRowsState) -> Any:
        """The noise of the next step from outside, on the host.

        Args:
            source: a `dp_ilg.noise.secure.SecureNoise` or `ExactNoise`.
            params: all parameters; only shapes are read.
            state: the step's.

        Returns:
            Draws for `kept` and `update`, or for `step`.
        """
        tables = self.tables(params)
        sizes = [table.most for table in tables]
        shapes = compact.resized(params, tables, sizes)
        geometry, rows = self.geometry(state), count_of(tables)
        return source.draws(int(state.step), shapes, geometry, rows)
