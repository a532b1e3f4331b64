"""Everything a run needs, built and checked before anything is written.

A mistake in the configuration, the data or the model must cost nothing: no folder,
no step of the budget.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

import dp_ilg
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import PrivateTransformation
from dp_ilg.baselines.table import baseline
from dp_ilg.experiments.config.schema import Config
from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.data.features import with_features
from dp_ilg.experiments.data.holdout import hold_out
from dp_ilg.experiments.data.own.named import load_named
from dp_ilg.experiments.data.shard_rows import Pixels
from dp_ilg.experiments.data.shards import ShardedArray
from dp_ilg.experiments.models.networks import Model, build_model
from dp_ilg.experiments.models.sizes import Facts
from dp_ilg.experiments.runs import projection, views
from dp_ilg.experiments.runs.measures import known_of, run_metrics
from dp_ilg.experiments.runs.outside.parts import check_parts, sources
from dp_ilg.experiments.runs.recipe import (
    build_schedule,
    layering,
    make_optimizer,
    make_plan,
    method_options,
)
from dp_ilg.noise.exact import nothing
from dp_ilg.projection.factor_pca import FactorPca
from dp_ilg.training.certificate import Certificate, sensitivity_certificate
from dp_ilg.training.memory_limits import budgeted


@dataclass(frozen=True)
class Job:
    """One run, ready to start.

    Attributes:
        config: what was asked for.
        data: the data set.
        raw: the data before their projection, while it is not made: see `ready`.
        plan: every number that decides the guarantee.
        model: the network.
        grad_fn: the clipped gradient of a batch.
        make_optimizer: key -> the private optimizer; ``peak=`` is its learning rate.
        outside: which code the parts from outside are, see `outside.parts`.

    Example:
        >>> job = build_job(Config())
        >>> job.plan.num_examples, job.plan.num_steps
        (1437, ...)
    """

    config: Config
    data: Dataset
    plan: PrivacyPlan
    model: Model
    grad_fn: Any
    make_optimizer: Callable[..., PrivateTransformation]
    raw: Dataset | None = None
    outside: Mapping[str, str] = field(default_factory=dict)

    def batch_shapes(self) -> Any:
        """Shapes of a batch of the expected size.

        Example:
            >>> [x.shape for x in build_job(Config()).batch_shapes()]
            [(256, 8, 8, 1), (256,)]
        """
        return _shapes(self.config, self.data, self.plan.batch_size)

    def certificate(self, params: Any) -> Certificate:
        """Which bounds hold for this run, and why; see `sensitivity_certificate`.

        Args:
            params: the parameters; only shapes are read.

        Example:
            >>> job = build_job(Config())
            >>> params = jax.eval_shape(job.model.init, jax.random.key(0))
            >>> job.certificate(params).margin < 1e-5
            True
        """
        by = layering(self.config.optimizer)
        shapes = self.batch_shapes()
        return sensitivity_certificate(self.grad_fn, params, shapes, self.plan, by)

    def rows(self) -> tuple[Any, Any]:
        """Returns inputs and labels to train on.

        Raises:
            ValueError: if the inputs are not projected yet.

        Example:
            >>> [len(a) for a in build_job(Config()).rows()]
            [1437, 1437]
        """
        if self.raw is not None:
            raise ValueError(
                "The inputs are not projected yet; pass what job.ready(job, key) gives."
            )
        return self.data.x_train, self.data.y_train

    def source(self, sampler_key: Any) -> Any:
        """What a feed reads the rows of: with words for their views, if there are any.

        Args:
            sampler_key: of the run.

        Raises:
            ValueError: as `rows`.

        Example:
            >>> len(build_job(Config()).source(jax.random.key(0)))  # inputs, labels
            2
        """
        return views.rows_of(self.config.data.augment, self.rows(), sampler_key)

    @functools.cached_property
    def data_digest(self) -> str:
        """SHA-256 of the training data before their projection; as secret as they are.

        Example:
            >>> len(build_job(Config()).data_digest)
            64
        """
        digest = hashlib.sha256()
        data = self.raw or self.data
        for array in jax.tree.leaves((data.x_train, data.y_train)):
            digest.update(f"{array.dtype} {array.shape} ".encode())
            if isinstance(array, ShardedArray | Pixels):  # never whole in memory
                digest.update(array.content_digest().encode())
            else:
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load_data(config: Config, data_dir: Path | None = None) -> Dataset:
    """Loads the data of a configuration.

    Args:
        config: the run.
        data_dir: where data files are.

    Returns:
        The data set, its test part replaced if examples are held out.

    Raises:
        ValueError: for an unknown name, or data that is absent or damaged.

    Example:
        >>> len(load_data(Config()).y_train)
        1437
    """
    check_parts(config)
    views.check_augmentation(config.data)
    data = with_features(load_named(config.data, data_dir), config.data.features)
    data = views.with_views(data, config.data.augment)
    share = config.data.validation
    return data if share is None else hold_out(data, share)


def build_job(
    config: Config,
    data_dir: Path | None = None,
    plan: PrivacyPlan | None = None,
    data: Dataset | None = None,
) -> Job:
    """Loads the data, plans the privacy and builds model and optimizer, all checked.

    Args:
        config: the run.
        data_dir: where data files are.
        plan: the plan of a run that is resumed; by default calibration makes one.
        data: what `load_data` gives, if it has been loaded already.

    Returns:
        The job.

    Raises:
        ValueError: in one sentence, for whatever does not fit.

    Privacy:
        With `importance = "uniform"`, public constants, past releases or a method
        without scores nothing is scored: the whole budget goes to the gradient.

    Example:
        >>> build_job(Config()).plan.epsilon() <= 8.0
        True
    """
    _check_names(config)  # a wrong name is told before a missing file
    data = data or load_data(config, data_dir)
    projection.check_probe(config, data)
    plan = plan or make_plan(config, len(data.y_train))
    raw = data if config.data.projection.wanted else None
    if raw is not None:
        data = projection.stand_in(raw, config.data.projection)
    model = _model(config, data)
    grad_fn = _grad_fn(config, plan, model, data)
    metrics = run_metrics(config.metrics, data)
    known = known_of(model, data)
    make = functools.partial(_optimizer, config, plan, metrics=metrics, known=known)
    job = Job(config, data, plan, model, grad_fn, make, raw, sources(config))
    _rehearse(job)
    return job


def _check_names(config: Config) -> None:
    """Raises for a part, an option or a schedule that is unknown."""
    check_parts(config)
    method_options(config)
    build_schedule(config.privacy.schedule)
    views.check_augmentation(config.data)


def _model(config: Config, data: Dataset) -> Model:
    example = jax.tree.map(lambda a: np.zeros(a.shape[1:], a.dtype), data.x_train)
    sizes = data.num_classes, data.num_tokens, data.num_categories
    facts = Facts(example, *sizes, data.target_range)
    chosen = config.model
    return build_model(
        chosen.name, facts, framework=chosen.framework, **chosen.options()
    )


def _grad_fn(config: Config, plan: PrivacyPlan, model: Model, data: Dataset) -> Any:
    """The clipped gradient of a batch, as large at once as memory is allowed for."""
    row, run = baseline(config.optimizer.method), config.run
    metrics = run_metrics(config.metrics, data)
    loss: Any = _measured(config, model) if metrics else model.loss_fn
    grad_fn = dp_ilg.clipped_grad(
        views.seen_loss(config.data.augment, loss),
        l2_clip_norm=plan.l2_clip_norm,
        clip_mode=row.clip_mode(**method_options(config)),
        engine=run.engine,
        microbatch_size=run.microbatch_size,
        has_aux=bool(metrics),
        metrics=metrics,
    )
    if (run.chunk_size or 0) > plan.num_examples:
        raise ValueError(
            f"run.chunk_size is {run.chunk_size}, but there are {plan.num_examples} "
            "examples to train on; choose at most as many."
        )
    if run.memory_mib is None or run.microbatch_size is not None:
        return grad_fn
    params = jax.eval_shape(model.init, jax.random.key(0))
    shapes = _shapes(config, data, len(data.y_train))
    return budgeted(grad_fn, params, shapes, plan, run)


def _shapes(config: Config, data: Dataset, size: int) -> Any:
    """Shapes of so many rows, as the gradient takes them."""
    rows = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype),
        (data.x_train, data.y_train),
    )
    return views.with_words(config.data.augment, rows)


def _optimizer(config: Config, plan: PrivacyPlan, key: Any, **facts: Any) -> Any:
    return make_optimizer(config, plan, key, **facts)


def _measured(config: Config, model: Model) -> Any:
    """The loss that also says how right a guess is; some models say nothing."""
    if model.loss_and_right is None:
        raise ValueError(
            f"metrics.release is on, but model.name is {config.model.name!r}, whose "
            "Model has no loss_and_right; return a Flax module or (init, apply)."
        )
    return model.loss_and_right


def ready(job: Job, sampler_key: Any, basis: FactorPca | None = None) -> Job:
    """Makes the private projection of a job that has one.

    Args:
        job: the run.
        sampler_key: of its keys; the noise of the projection is drawn under it.
        basis: a projection that was released already.

    Returns:
        The job with projected data; the same job if nothing is projected.

    Privacy:
        The release is in the plan of the job. Whoever asks twice with one key gets the
        same release.

    Example:
        >>> job = build_job(Config())
        >>> ready(job, jax.random.key(0)) is job
        True
    """
    if job.raw is None:
        return job
    basis = basis or projection.fit(job.raw, job.config.data.projection, sampler_key)
    return dataclasses.replace(job, data=projection.apply(job.raw, basis), raw=None)


def _rehearse(job: Job) -> None:
    """Traces one step on shapes alone: what cannot train is refused before it starts.

    The optimizer's state is made from shapes with a key that nothing else uses.
    """

    def step(batch: Any) -> Any:
        params = job.model.init(jax.random.key(0))
        tx = job.make_optimizer(jax.random.key(0))
        state = tx.init(params)
        geometry = tx.geometry(state)
        clipped = job.grad_fn(params, batch, geometry=geometry)
        given = {"noise": nothing(params, geometry)} if job.plan.exact_noise else {}
        return tx.update(clipped, state, params, **given)

    jax.eval_shape(step, _shapes(job.config, job.data, 2))
