"""The step of a private run as a plain function of a state, to be audited."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dp_ilg.training.frameworks.adapt import adapt
from dp_ilg.training.loop.losses import over_views
from dp_ilg.training.loop.program import counted, gradient_of
from dp_ilg.training.loop.recipe import Recipe
from dp_ilg.training.loop.state import Counted
from dp_ilg.training.step import make_train_step

_WORDS = 5


def audited_step(recipe: Recipe, model: Any) -> tuple[Callable[..., Any], Any]:
    """The compiled step of a run, and a state whose keys are public.

    Args:
        recipe: of the run.
        model: as `PrivateTraining.init` takes it.

    Returns:
        ``step(state, batch, is_padding_example) -> state`` and the state it starts
        from, for `dp_ilg.auditing.audit_step`. It is the step of one chunk on one
        device.

    Raises:
        ValueError: for a run whose noise the host draws, or that keeps rows.

    Privacy: the keys are fixed and known: nothing private may go in.

    Example:
        >>> import dp_ilg, optax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5,
        ...     num_examples=100, batch_size=10, num_steps=4)
        >>> loss_fn = lambda params, x: jnp.sum(params * x)
        >>> train = dp_ilg.private_training(loss_fn, optax.sgd(0.1), plan)
        >>> step, state = train.auditable(jnp.zeros(2))
        >>> state = step(state, jnp.ones((3, 2)), jnp.zeros(3, bool))
        >>> state[0].shape
        (2,)
    """
    if recipe.exact:
        raise ValueError(
            "The noise of this run is drawn on the host, which audit_step cannot "
            "repeat; audit the same run made without exact noise."
        )
    if recipe.rows is not None:
        raise ValueError(
            "Kept rows change from step to step, and audit_step reads the sums of "
            "fixed numbers alone; audit the same run made without rows."
        )
    adapted = adapt(model, recipe.loss_fn)
    random = adapted.random or recipe.augment is not None
    loss = over_views(adapted.loss, recipe.views, recipe.augment)
    tx = counted(recipe.transformation(jax.random.key(0), model, adapted.loss))
    one = make_train_step(gradient_of(recipe, loss, random), tx).whole

    def step(state: Any, batch: Any, is_padding_example: Any) -> Any:
        params, after, key = state
        mask = jnp.asarray(is_padding_example)
        if random:
            batch = batch, _words(key, after.step, len(mask))
        return *one(params, after, batch, mask), key

    params = jax.tree.map(jnp.copy, adapted.params)
    start: Counted = tx.init(params)
    return step, (params, start, jax.random.key(1))


def _words(key: Any, step: Any, rows: int) -> Any:
    """What the key of each row is made of, as in `rows.row_words`."""
    data = jax.random.key_data(key).astype(jnp.uint32)
    found = jnp.zeros((rows, _WORDS), jnp.uint32).at[:, :2].set(data)
    return (
        found.at[:, 2]
        .set(step.astype(jnp.uint32))
        .at[:, 4]
        .set(jnp.arange(rows, dtype=jnp.uint32))
    )
