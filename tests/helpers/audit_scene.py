"""A tiny trainer for audits, made of the library's own parts."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

import dp_ilg
from dp_ilg.baselines.table import BASELINES
from dp_ilg.experiments.audits.subject import AuditedTrainer, through_checkpoint
from dp_ilg.experiments.runs.keys import derived_keys
from dp_ilg.sampling.poisson import PoissonSampler
from tests.helpers.models import mlp_batch, mlp_loss, mlp_params


def scene_plan(**changes: Any) -> dp_ilg.PrivacyPlan:
    facts: dict[str, Any] = dict(
        num_examples=40,
        batch_size=10,
        num_steps=6,
        delta=1e-5,
        l2_clip_norm=0.7,
        score_budget=0.1,
        stages=((6, 1.0),),
    )
    return dp_ilg.PrivacyPlan(**(facts | changes))


def trainer(
    plan: dp_ilg.PrivacyPlan | None = None,
    method: str = "dp_adam_ilg",
    engine: str = "auto",
    layers: Any = "leaf",
    hidden: int = 4,
    metrics: Any = None,
    **options: Any,
) -> AuditedTrainer:
    """A sound trainer of one method; `options` are the method's."""
    the_plan = plan or scene_plan()
    row = BASELINES[method]
    x, y = mlp_batch(the_plan.num_examples)

    def clip(loss: Any, engine: str = engine) -> Any:
        mode = row.clip_mode(**options)
        bound = the_plan.l2_clip_norm
        return dp_ilg.clipped_grad(
            loss, l2_clip_norm=bound, clip_mode=mode, engine=engine, metrics=metrics
        )

    return AuditedTrainer(
        plan=the_plan,
        params=mlp_params(sizes=(5, hidden, 3)),
        examples=(np.asarray(x), np.asarray(y)),
        num_classes=3,
        loss_fn=mlp_loss,
        clip=clip,
        oracle=functools.partial(clip, engine="vmap"),
        optimizer=lambda key: row(
            0.05, the_plan, key=key, layers=layers, metrics=metrics, **options
        ),
        sampler=lambda key: PoissonSampler.for_plan(the_plan, key=key),
        ledger=lambda path: dp_ilg.PrivacyLedger(path, the_plan),
        resume=through_checkpoint,
        keys=lambda plan: derived_keys(3, {"plan": plan.digest()}),
    )


def with_links(sound: AuditedTrainer, change: Any) -> AuditedTrainer:
    """The trainer with another chain: `change` maps its links to others."""

    def optimizer(key: jax.Array) -> Any:
        return dp_ilg.chain(*change(sound.optimizer(key).links, key))

    return dataclasses.replace(sound, optimizer=optimizer)
