"""The front door: a loss, an optimizer and a plan as one private training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dp_ilg.clipping.adding.metric_sums import Metric
from dp_ilg.training.loop.recipe import Recipe
from dp_ilg.training.loop.run import PrivateTraining


def private_training(
    loss_fn: Any,
    optimizer: Any,
    plan: Any,
    *,
    seed: Any = None,
    importance: Any = "min_noise_energy",
    source: Any = "scores",
    layers: Any = "module",
    clip_mode: Any = "joint",
    ema_decay: Any = 0.9,
    floor: Any = 0.01,
    score: Any = "l2",
    public_importance: Any = None,
    views: Any = 1,
    augment: Any = None,
    has_aux: bool = False,
    metrics: Mapping[str, Metric] | None = None,
    rows: Mapping[str, int] | None = None,
    engine: str = "auto",
    microbatch_size: Any = None,
    chunk_size: Any = None,
    memory_mib: Any = None,
    mesh: Any = None,
    noise: str | None = None,
    ahead: Any = 2,
) -> PrivateTraining:
    """Makes a training loop private: loss, optimizer and plan as one object.

    Args:
        loss_fn: ``(model, example) -> scalar`` of ONE example, or ``(model, example,
            key)``, whose key is a function of (run, step, example). It takes what the
            framework's own losses take: parameters, or the module.
        optimizer: any Optax transformation; it sees the release alone. None takes that
            of the model's ``TrainState`` or ``nnx.Optimizer``. Or a function of a key
            that makes a whole private optimizer: ``lambda key:
            dp_ilg.dp_adam_ilg(1e-3, plan, key=key)``.
        plan: from `dp_ilg.plan_privacy`.
        seed: None for 256 bits from the operating system. They are in this process's
            memory, and in what ``save`` writes. A whole number is for tests.
        importance: a rule, as in `dp_ilg.dp_adam_ilg`.
        source: as in `dp_ilg.dp_adam_ilg`. A `dp_ilg.Probe` is given this loss; tell it
            the ``example``, one made of zeros.
        layers: as in `dp_ilg.dp_adam_ilg`.
        clip_mode: "joint", "normalize" or "per_layer".
        ema_decay: as in `dp_ilg.dp_adam_ilg`.
        floor: as in `dp_ilg.dp_adam_ilg`.
        score: as in `dp_ilg.dp_adam_ilg`.
        public_importance: as in `dp_ilg.dp_adam_ilg`.
        views: the loss is the mean over so many views of an example, one clip for all.
        augment: ``(example, key) -> view``; None where an example holds its views along
            a first axis. Leaves without such an axis are shared by all views.
        has_aux: whether the loss returns ``(loss, aux)``; aux feeds the metrics.
        metrics: name -> `dp_ilg.Metric`, released with noise at every step and charged
            to the plan's `metric_budget`; read them by ``metrics(state)``.
        rows: path of a table -> the most rows of it that a step trains, chosen by noisy
            counts that the plan's `row_budget` pays for, as in `dp_ilg.keep_rows`.
        engine: as in `dp_ilg.clipped_grad`.
        microbatch_size: examples differentiated at once; None: the engine picks.
        chunk_size: rows of a compiled batch; a larger draw comes in several chunks,
            which are one step. None: so that nearly every draw fits one.
        memory_mib: a budget for what a gradient holds, from which the micro-batch is
            picked.
        mesh: from `dp_ilg.training.mesh.make_mesh`, for several devices.
        noise: "default", "exact" or None, as in `dp_ilg.dp_adam_ilg`.
        ahead: chunks gathered while a step runs.

    Returns:
        A `PrivateTraining`.

    Raises:
        TypeError: for a loss, optimizer, plan or augmentation of the wrong kind.
        ValueError: for a number out of range, an unknown rule, source, mode or engine,
            and a private optimizer with a key of its own.

    Privacy: (epsilon, delta) of the plan for the parameters after every step, for
    adding or removing one example (or as the plan says). Batches are the plan's
    Poisson samples, each charged on disk before it is handed out. One seed is for one
    run: its keys follow the plan, the program and the data besides. Who knows the
    secret can subtract the noise.

    Example:
        >>> import dp_ilg, jax.numpy as jnp, numpy as np, optax, tempfile
        >>> x = np.random.default_rng(0).normal(size=(500, 3)).astype("float32")
        >>> plan = dp_ilg.plan_privacy(epsilon=2.0, delta=1e-5, num_examples=500,
        ...     batch_size=50, num_steps=4)
        >>> loss_fn = lambda params, x: jnp.square(params["w"] @ x - x.sum())
        >>> train = private_training(loss_fn, optax.adam(0.1), plan)
        >>> state = train.init({"w": jnp.zeros(3)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for lot in train.batches(x, ledger=f"{folder}/ledger.jsonl"):
        ...         state = train.step(state, lot)
        >>> state
        PrivateState(step=4, 3 parameters, opt_state=<hidden>)
        >>> 1.9 < train.epsilon(state) <= 2.0
        True

    Reference: the step in docs/idea.md; Abadi et al. 2016, Algorithm 1.
    """
    return PrivateTraining(Recipe(**locals()))
