"""Training tables of many rows: in a step, only rows that enough examples read.

Every row of an embedding needs noise in every step, since a row without noise would
show that nobody read it; in a large table nearly all work, and nearly all noise, is for
rows that nobody read. Here a part of the step's budget buys noisy counts of who reads
which row, and only rows with a large count take part: gradient, noise and update are
for these.
"""

from __future__ import annotations

from typing import Any

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import PrivateTransformation
from dp_ilg.clipping.lookups.tables import check_asked
from dp_ilg.noise.add_noise import fresh_key
from dp_ilg.optimizers.kept_rows.release import row_key
from dp_ilg.optimizers.kept_rows.stages import RowOptimizer


def keep_rows(
    tx: Any,
    tables: Any,
    *,
    key: Any,
    threshold: float = 3.0,
    ema_decay: float = 0.9,
    rows_of: Any = None,
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
        key: PRNG key, secret; it may be that of `tx`. The noise of the counts follows
            key and plan.
        threshold: how many standard deviations of its noise a count must exceed. At 3 a
            row that nobody reads is kept at one step in 740.
        ema_decay: counts are averaged over the steps, each keeping so much of what was,
            which costs nothing and takes most of the noise off; 0 looks at this step's
            alone, as the paper does.
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
        >>> import dp_ilg, jax, jax.numpy as jnp
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=0.1, delta=1e-5, row_budget=0.2,
        ...     num_examples=100, batch_size=10, num_steps=3)
        >>> key = jax.random.key(0)
        >>> tx = dp_ilg.dp_adam_ilg(0.1, plan, key=key)
        >>> rows = keep_rows(tx, {"table": 2}, key=key, threshold=5.0)
        >>> loss = lambda p, x: jnp.sum(p["table"][x] - 1.0)
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=plan.l2_clip_norm)
        >>> params = {"table": jnp.zeros((1000, 4))}
        >>> step = jax.jit(rows.step(grad_fn), donate_argnums=(0, 1))
        >>> state = rows.init(params)
        >>> params, state = step(params, state, jnp.full((10, 3), 7))
        >>> jnp.flatnonzero(params["table"].any(axis=1)).tolist()
        [7]

    Reference: Ghazi et al. 2023 (DP-AdaFEST), Algorithm 1; docs/guides/rows.md.
    """
    plan = _plan_of(tx)
    if not isinstance(tx, PrivateTransformation) or not tx.links or plan is None:
        raise TypeError(
            f"tx is {type(tx).__name__}, but must be a whole private optimizer; make "
            "it with dp_ilg.dp_adam_ilg or dp_ilg.chain."
        )
    if plan.row_budget == 0:
        raise ValueError(
            "The plan's row_budget is 0, so that there is nothing to choose rows with; "
            "make the plan with row_budget=0.1."
        )
    asked = check_asked(tables)
    said: Any = rows_of
    validation.rate("threshold", threshold)
    validation.fraction("ema_decay", ema_decay, include_zero=True)
    if rows_of is not None and not callable(rows_of):
        raise TypeError(
            f"rows_of is {type(rows_of).__name__}, but must be a function of one "
            "example that returns {path: ids}."
        )
    own = row_key(fresh_key(validation.key("key", key)), plan)
    return RowOptimizer(tx, asked, float(threshold), float(ema_decay), said, own, plan)


def _plan_of(tx: Any) -> PrivacyPlan | None:
    """The plan of a private optimizer: the one that its links were given."""
    own = getattr(tx, "plan", None)
    plans = [own] + [_plan_of(link) for link in getattr(tx, "links", ())]
    return next((plan for plan in plans if plan is not None), None)
