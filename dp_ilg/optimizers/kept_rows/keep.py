"""Training tables of many rows: in a step, only rows that enough examples read.

Every row of an embedding needs noise in every step, since a row without noise would
show that nobody read it; in a large table nearly all work, and nearly all noise, is for
rows that nobody read. Here a part of the step's budget buys noisy counts of who reads
which row, and only rows with a large count take part: gradient, noise and update are
for these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import (
    ClippedGrad,
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
from dp_ilg.clipping.lookups.tables import Tables, check_asked, count_of, find_tables
from dp_ilg.clipping.lookups.traced import compact_loss, looked_up
from dp_ilg.clipping.purity import check_loss
from dp_ilg.clipping.sparse import plain
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.noise.add_noise import fresh_key
from dp_ilg.optimizers.kept_rows import compact
from dp_ilg.optimizers.kept_rows.release import ROW_TAG, KeptRows, released_rows
from dp_ilg.sampling.batch import opened


class KeepRowsState(NamedTuple):
    """What a run with kept rows carries from step to step.

    Attributes:
        key: of the counts' noise.
        step: which step comes next.
        inner: the optimizer's state, with all rows of what it keeps a row.
    """

    key: Any
    step: Any
    inner: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowGradient:
    """The clipped sum of a step on kept rows, and which rows these are.

    Attributes:
        clipped: the `ClippedGrad`, each table with `Table.most` rows.
        kept: the rows.

    Privacy: as `ClippedGrad`: sensitivity C given the kept rows, not private before
    noise.
    """

    clipped: ClippedGrad
    kept: KeptRows

    def __add__(self, other: Any) -> RowGradient:
        """Joins two chunks of the same step; NaN is released if their rows differ."""
        if not isinstance(other, RowGradient):
            return NotImplemented
        pairs = zip(jax.tree.leaves(self.kept), jax.tree.leaves(other.kept), strict=True)
        alike = jnp.stack([jnp.all(one == two) for one, two in pairs]).all()
        return RowGradient(_where_sound(self.clipped + other.clipped, alike), self.kept)


def _where_sound(clipped: ClippedGrad, sound: Any) -> ClippedGrad:
    """The sum, of which NaN is released unless `sound`."""
    bound = jnp.where(sound, clipped.l2_clip_norm, jnp.nan)
    return dataclasses.replace(clipped, l2_clip_norm=bound)


@dataclasses.dataclass(frozen=True)
class RowOptimizer:
    """What `keep_rows` returns; see there.

    Attributes:
        tx: the private optimizer.
        asked: pairs of a table's path and its most rows.
        threshold: in standard deviations of a count's noise.
        rows_of: which rows an example reads, or None for what its loss looks up.
        key: of the counts' noise, secret.
        plan: that of `tx`.
    """

    tx: PrivateTransformation
    asked: tuple[tuple[str, int], ...]
    threshold: float
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
        _check_geometry(self.tx.geometry(inner), tables)
        return KeepRowsState(fresh_key(self.key), jnp.zeros((), jnp.int32), inner)

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
        return self.tx.metrics(state.inner)

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
            numbers = jax.vmap(lambda x: _numbers(own(x), tables))(batch)
        padding = jnp.zeros(size, bool) if mask is None else jnp.asarray(mask)
        return count_rows(numbers, ~padding, tables)

    @own_promotion
    def kept(
        self, counts: RowCounts, state: KeepRowsState, noise: Any = None
    ) -> KeptRows:
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
        return released_rows(counts, *args)

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

        Privacy: sensitivity C given the kept rows, for adding or removing one example.
        """
        owners, _ = compact.owners_of(self.tx.init, params, kept.tables)
        geometry = self.tx.geometry(compact.narrowed(state.inner, owners, kept.ids))
        loss_fn = compact_loss(grad_fn.loss_fn, params, kept.tables, kept.slots())
        few = dataclasses.replace(grad_fn, loss_fn=loss_fn)
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
        _check_size(self.plan, gradient.clipped, tables)
        sound = kept.valid & (kept.step == state.step)
        clipped = _where_sound(gradient.clipped, sound)
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
        return params, KeepRowsState(state.key, state.step + 1, inner)

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


def keep_rows(
    tx: PrivateTransformation,
    tables: Mapping[str, int],
    *,
    key: Any,
    threshold: float = 3.0,
    rows_of: Callable[[Example], Mapping[str, Any]] | None = None,
) -> RowOptimizer:
    """Trains tables of many rows on those that enough examples of a step read.

    A step releases noisy counts of who reads which row, each example's vector of length
    1. Rows whose count exceeds the threshold take part, the largest counts first where
    there are too many; the gradient of those rows and of all other leaves is clipped
    and noised. All arrays of a step are of the kept rows, none of the table's size but
    the counts. A row that is not kept is not touched: no noise, no update, and its
    moments stay as its last step left them.

    Args:
        tx: a whole private optimizer, such as `dp_ilg.dp_adam_ilg`, whose plan has a
            `row_budget`.
        tables: the path of each table, and its most rows of a step.
        key: PRNG key, secret; it may be that of `tx`.
        threshold: how many standard deviations of its noise a count must exceed. At 3 a
            row that nobody reads is kept once in 740 steps.
        rows_of: ``example -> {path: ids}``, instead of what the loss looks up.

    Returns:
        A `RowOptimizer`: ``init``, and ``step`` or its parts ``counts``, ``kept``,
        ``gradient``, ``update`` for a step in several chunks.

    Raises:
        ValueError: for a plan without `row_budget`, and a table without rows.
        TypeError: for no private optimizer, mapping, key or function.

    Privacy: counts and gradient see one Poisson sample; the gradient is clipped given
    the rows that were released. Together they are one Gaussian with the plan's
    multiplier z for adding or removing one example: ``z^-2 = sigma_1^-2 + sigma_2^-2``.
    It holds whatever `rows_of` says. An id outside of its table counts nowhere.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=0.1, delta=1e-5, row_budget=0.2,
        ...     num_examples=100, batch_size=10, num_steps=3)
        >>> key = jax.random.key(0)
        >>> rows = keep_rows(dp_ilg.dp_adam_ilg(0.1, plan, key=key), {"table": 2},
        ...                  key=key)
        >>> loss = lambda p, x: jnp.sum(p["table"][x] - 1.0)
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=plan.l2_clip_norm)
        >>> params = {"table": jnp.zeros((1000, 4))}
        >>> step = jax.jit(rows.step(grad_fn), donate_argnums=(0, 1))
        >>> state = rows.init(params)
        >>> params, state = step(params, state, jnp.full((10, 3), 7))
        >>> int((params["table"] != 0).any(axis=1).sum()), bool(params["table"][7].any())
        (1, True)

    Reference: Ghazi et al. 2023 (DP-AdaFEST), Algorithm 1; docs/rows.md (the proof).
    """
    if not isinstance(tx, PrivateTransformation) or not tx.links:
        raise TypeError(
            f"tx is {type(tx).__name__}, but must be a whole private optimizer; make "
            "it with dp_ilg.dp_adam_ilg or dp_ilg.chain."
        )
    plan = _plan_of(tx)
    if plan.row_budget == 0:
        raise ValueError(
            "The plan's row_budget is 0, so that there is nothing to choose rows with; "
            "make the plan with row_budget=0.1."
        )
    asked = check_asked(tables)
    validation.rate("threshold", threshold)
    if rows_of is not None and not callable(rows_of):
        raise TypeError(
            f"rows_of is {type(rows_of).__name__}, but must be a function of one "
            "example that returns {path: ids}."
        )
    own = jax.random.fold_in(fresh_key(validation.key("key", key)), ROW_TAG)
    return RowOptimizer(tx, asked, float(threshold), rows_of, own, plan)


def _plan_of(tx: Any) -> PrivacyPlan:
    """The plan of a private optimizer: the one that its links were given."""
    own = getattr(tx, "plan", None)
    plans = [own] + [_plan_of(link) for link in getattr(tx, "links", ())]
    return next((plan for plan in plans if plan is not None), None)  # type: ignore


def _numbers(ids: Any, tables: Tables) -> jax.Array:
    """What a user's function says of one example, as numbers of all tables' rows."""
    names = [table.path for table in tables]
    if not isinstance(ids, Mapping) or set(ids) - set(names):
        raise ValueError(
            f"rows_of returned {validation.shown(ids)}, but must return a mapping from "
            f"{', '.join(names)} to row numbers."
        )
    found = []
    for table in tables:
        own = jnp.asarray(ids.get(table.path, jnp.zeros(0, jnp.int32))).reshape(-1)
        inside = (own >= 0) & (own < table.rows)
        own = jnp.where(inside, own, 0).astype(jnp.int32)
        found.append(jnp.where(inside, own + table.start, count_of(tables)))
    return jnp.concatenate(found)


def _check_geometry(geometry: Geometry, tables: Tables) -> None:
    for table in tables:
        if not geometry.groups.leaves[table.leaf].groups:
            raise ValueError(
                f"{table.path} is frozen, so that no row of it takes part; leave it "
                "out of tables."
            )


def _check_size(plan: PrivacyPlan, clipped: ClippedGrad, tables: Tables) -> None:
    """Raises for more numbers a step than delta has paid for, counts included."""
    groups = clipped.geometry.groups
    count = sum(groups.sizes) + len(groups.names) + count_of(tables)
    count += 0 if clipped.metrics is None else clipped.metrics.total.size
    if count > plan.most_parameters and plan.noise_multipliers.any():
        raise ValueError(
            f"A step draws {count:,} numbers (kept rows, other parameters, scores, "
            f"metrics and counts), but the plan pays for {plan.most_parameters:,}; "
            f"plan with num_parameters={count} or exact_noise=True."
        )
