"""Where importance can matter: sizes, norms and noise of every layer of a task.

What is measured here is computed from the data without noise. It explains methods on
public data and has NO privacy guarantee; nothing in a training run uses it.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg.accounting.ledger import PrivacyLedger
from dp_ilg.base import LossFn
from dp_ilg.clipping.adding.sums import narrowed
from dp_ilg.clipping.engine_table import ENGINES
from dp_ilg.experiments.runs.job import Job, ready
from dp_ilg.experiments.runs.keys import RunKeys
from dp_ilg.experiments.runs.trainer import Position, Watch, start, train
from dp_ilg.experiments.runs.views import publicly_seen
from dp_ilg.geometry.geometry import Geometry, scaled_to_profile
from dp_ilg.geometry.groups import Groups
from dp_ilg.geometry.rules import RULES
from dp_ilg.sampling.gather import take

_CHUNK = 256
_COLUMNS = ("name", "size", "importance", "share", "mean_gradient_norm")


class Profile(NamedTuple):
    """What single examples look like, by layer; all of it unprotected.

    Attributes:
        names: of the layers.
        sizes: number of parameters, int.
        importance: mean norm of an example's gradient of the layer.
        shares: mean over examples of the layer's share of the squared norm; sum 1.
        mean_gradient_norm: norm of the mean gradient over the data, without clipping.

    Example:
        >>> Profile(("a",), (3,), [0.5], [1.0], [0.1]).sizes
        (3,)
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    importance: Any
    shares: Any
    mean_gradient_norm: Any


def noise_energy_ratio(sizes: Any, shares: Any) -> float:
    """How much less noise `min_noise_energy` adds than `uniform`, as energy.

    With a layer's share p_j of the parameters and s_j of the squared norm, the energy
    ``sum_j n_j std_j^2`` falls by ``(sum_j sqrt(p_j s_j))^2``: the overlap of the two
    distributions. Where signal lies where the parameters are, nothing can be gained.

    Args:
        sizes: number of parameters of each layer.
        shares: of each layer in the squared norm, summing to 1.

    Returns:
        At most 1: energy under `min_noise_energy` over that under `uniform`, for equal
        clipping of an example of average profile.

    Example:
        >>> noise_energy_ratio([10, 30], [0.25, 0.75])
        1.0
        >>> round(noise_energy_ratio([1, 99], [0.99, 0.01]), 4)
        0.0396

    Reference: docs/idea.md (the rule), Bhattacharyya 1943 (the overlap).
    """
    parts = np.asarray(sizes, float) / np.sum(sizes)
    return float(np.square(np.sqrt(parts * np.asarray(shares, float)).sum()))


def measure(job: Job, position: Position, rows: int = 2048) -> dict[str, Any]:
    """Measures every layer at one point of a run, under every rule.

    Args:
        job: the run.
        position: its parameters and optimizer state.
        rows: how many training examples to look at, from the first on; even.

    Returns:
        "step", "noise_energy_ratio" and "layers", a list with name, size, importance,
        share, mean_gradient_norm (see `Profile`) and for each rule of `RULES` "weight",
        "signal" (norm of the clipped mean), "noise" (expected norm of its noise) and
        "snr", their ratio in one step.

    Privacy:
        None: raw norms of the data. For public data only.

    Example:
        >>> from dp_ilg.experiments.config.schema import Config
        >>> from dp_ilg.experiments.runs.job import build_job
        >>> from dp_ilg.experiments.runs.keys import run_keys
        >>> job = build_job(Config())
        >>> found = measure(job, start(job, run_keys(job, 0)), rows=64)
        >>> [layer["name"] for layer in found["layers"]]
        ['hidden_0', 'output']
    """
    tx = job.make_optimizer(jax.random.key(0))
    groups = tx.geometry(position.state).groups
    halves = _halves(job, min(rows, len(job.data.y_train)))
    clip = dataclasses.replace(
        job.grad_fn, loss_fn=_loss(job), has_aux=False, metrics=()
    )
    profile = _profile(job, position.params, groups, halves)
    clipped = jax.jit(
        lambda params, batch, weights: (
            clip(params, batch, geometry=Geometry(weights, groups)).gradients
        )
    )
    by_rule = {}
    for rule in RULES:
        weights = _weights(rule, profile, job.config.optimizer.floor)
        found = [[clipped(position.params, b, weights) for b in h] for h in halves]
        signal = _coherent_norms(groups, *map(_mean, found, halves))
        by_rule[rule] = _rule(job, position.step, profile.sizes, weights, signal)
    columns = dict(zip(_COLUMNS, profile, strict=True)) | by_rule
    layers = [
        {key: _entry(column, j) for key, column in columns.items()}
        for j in range(len(groups.names))
    ]
    ratio = noise_energy_ratio(profile.sizes, profile.shares)
    return {"step": position.step, "noise_energy_ratio": ratio, "layers": layers}


def study(job: Job, keys: RunKeys, stop: int, rows: int = 2048) -> list[dict[str, Any]]:
    """Trains privately for a while and measures at the start and at the end.

    Args:
        job: the run; its noise is that of the whole plan.
        keys: its keys.
        stop: after how many steps to stop; at least 1, at most the plan's steps.
        rows: as in `measure`.

    Returns:
        Two records of `measure`, at step 0 and at `stop`.

    Privacy:
        None, as for `measure`.

    Example:
        >>> from dp_ilg.experiments.config.schema import Config
        >>> from dp_ilg.experiments.runs.job import build_job
        >>> from dp_ilg.experiments.runs.keys import run_keys
        >>> job = build_job(Config())
        >>> found = study(job, run_keys(job, 0), stop=2, rows=64)
        >>> [record["step"] for record in found]
        [0, 2]
    """
    run = dataclasses.replace(job.config.run, eval_every=10**9, checkpoint_every=10**9)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, run=run))
    job = ready(job, keys.sampler)
    position = start(job, keys)
    found = [measure(job, position, rows)]
    taken: list[int] = [0]
    watch = Watch(stepped=lambda t: taken.append(t), stop=lambda: taken[-1] >= stop)
    with tempfile.TemporaryDirectory() as folder:
        with PrivacyLedger(Path(folder) / "ledger.jsonl", job.plan) as ledger:
            position = train(job, position, ledger, watch)
    return [*found, measure(job, position, rows)]


def _halves(job: Job, rows: int) -> list[list[Any]]:
    """The first examples, as chunks of two independent halves."""
    size = min(_CHUNK, rows // 2)
    source = (job.data.x_train, job.data.y_train)
    begins = range(0, rows - size + 1, size)
    chunks = [take(source, np.arange(b, b + size)) for b in begins]
    even = len(chunks) - len(chunks) % 2
    return [chunks[0:even:2], chunks[1:even:2]]


def _loss(job: Job) -> LossFn:
    return publicly_seen(job.config.data.augment, job.model.loss_fn)


def _profile(job: Job, params: Any, groups: Groups, halves: list) -> Profile:
    engine = ENGINES["bookkeeping"]

    @jax.jit
    def one(params, batch):
        found = engine(_loss(job), params, batch, groups)
        ones = jnp.ones(found.norms.shape[0], jnp.float32)
        return found.norms, narrowed(found.weighted_sum(ones), params)

    norms, sums = [], []
    for half in halves:
        results = [one(params, batch) for batch in half]
        norms += [np.asarray(r[0], float) for r in results]
        sums.append(_mean([r[1] for r in results], half))
    every = np.concatenate(norms)
    squares = np.square(every)
    shares = squares / np.maximum(squares.sum(1, keepdims=True), 1e-30)
    mean = _coherent_norms(groups, *sums)
    return Profile(groups.names, groups.sizes, every.mean(0), shares.mean(0), mean)


def _weights(rule: str, profile: Profile, floor: float) -> Any:
    """The geometry's weights as a scorer would set them, had it seen these shares."""
    shares = jnp.maximum(jnp.asarray(profile.shares, jnp.float32), floor**2)
    shares = shares / shares.sum()
    sizes = jnp.array(profile.sizes, jnp.float32)
    return scaled_to_profile(RULES[rule](jnp.sqrt(shares), sizes), shares)


def _rule(
    job: Job, step: int, sizes: tuple[int, ...], weights: Any, signal: np.ndarray
) -> dict[str, Any]:
    """Signal and noise of one step, by layer."""
    plan = job.plan
    sigma = float(plan.gradient_noise_multipliers[min(step, plan.num_steps - 1)])
    stddev = sigma * plan.l2_clip_norm * np.asarray(weights) / plan.batch_size
    noise = stddev * np.sqrt(np.array(sizes, float))
    return {"weight": weights, "signal": signal, "noise": noise, "snr": signal / noise}


def _mean(sums: list[Any], half: list[Any]) -> Any:
    count = sum(len(y) for _, y in half)
    return jax.tree.map(lambda *parts: sum(parts) / count, *sums)


def _coherent_norms(groups: Groups, one: Any, other: Any) -> np.ndarray:
    """Root of the inner product of two independent means; 0 where it is negative."""
    a, b = jax.tree.leaves(one), jax.tree.leaves(other)
    total = groups.norms([x + y for x, y in zip(a, b, strict=True)])
    apart = groups.norms([x - y for x, y in zip(a, b, strict=True)])
    product = np.square(np.asarray(total, float)) - np.square(np.asarray(apart, float))
    return np.sqrt(np.maximum(product / 4, 0.0))


def _entry(column: Any, layer: int) -> Any:
    """One layer's value of a column, or of each column of a rule."""
    if isinstance(column, dict):
        return {name: _entry(part, layer) for name, part in column.items()}
    value = column[layer]
    return value if isinstance(value, str | int) else float(value)
