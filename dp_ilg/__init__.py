"""Differentially private Adam for JAX with importance-shaped noise.

Start with `plan_privacy` (how much noise for an epsilon) and `private_training` (loss,
optimizer and plan as one loop). Its parts: `dp_adam_ilg` (an Optax transformation),
`clipped_grad` (the clipped gradient of a batch), `PoissonSampler`, and `PrivacyLedger`,
which refuses a step past the plan.
"""

from dp_ilg import accounting, auditing, baselines
from dp_ilg.accounting import schedules
from dp_ilg.accounting.calibration import (
    batch_size_for_epsilon,
    plan_privacy,
    steps_for_epsilon,
)
from dp_ilg.accounting.filters import FilterExhausted, PrivacyFilter
from dp_ilg.accounting.ledger import BudgetExhausted, PrivacyLedger
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import ClippedGrad, PerExampleGrads
from dp_ilg.baselines import published as published  # no guarantee, so not in __all__
from dp_ilg.clipping.adding.metric_sums import Metric
from dp_ilg.clipping.clip import clip_per_example
from dp_ilg.clipping.clip_schedule import clip_by_schedule
from dp_ilg.clipping.clipped_grad import clipped_grad
from dp_ilg.clipping.lots import clipped_lot, sum_lot
from dp_ilg.geometry import layers, priors
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.geometry.maps import AxisMaps
from dp_ilg.noise.add_noise import add_importance_noise
from dp_ilg.noise.repeats import release_digest
from dp_ilg.optimizers.adam import scale_by_noise_corrected_adam
from dp_ilg.optimizers.aggregate import differentially_private_aggregate
from dp_ilg.optimizers.averaging import average_iterates, averaged_params
from dp_ilg.optimizers.balance import scale_by_balanced_adam
from dp_ilg.optimizers.chains import chain, dp_adam_ilg
from dp_ilg.optimizers.importance import (
    score_layer_importance,
    score_released_gradients,
    set_layer_importance,
)
from dp_ilg.optimizers.kept_rows.keep import keep_rows
from dp_ilg.optimizers.metrics import Released, release_metrics
from dp_ilg.optimizers.public.link import probe_importance
from dp_ilg.optimizers.public.prior import Prior, set_prior
from dp_ilg.optimizers.public.probe import Probe
from dp_ilg.optimizers.whitened import unwhiten_updates
from dp_ilg.projection.pca import private_pca
from dp_ilg.sampling.poisson import PoissonSampler
from dp_ilg.training.loop.front import private_training

__version__ = "0.1.0"

__all__ = [
    "AxisMaps",
    "BudgetExhausted",
    "ClippedGrad",
    "FilterExhausted",
    "Geometry",
    "Metric",
    "PerExampleGrads",
    "PoissonSampler",
    "Prior",
    "PrivacyFilter",
    "PrivacyLedger",
    "PrivacyPlan",
    "Probe",
    "Released",
    "accounting",
    "add_importance_noise",
    "auditing",
    "average_iterates",
    "averaged_params",
    "baselines",
    "batch_size_for_epsilon",
    "chain",
    "clip_by_schedule",
    "clip_per_example",
    "clipped_grad",
    "clipped_lot",
    "differentially_private_aggregate",
    "dp_adam_ilg",
    "keep_rows",
    "layers",
    "plan_privacy",
    "priors",
    "private_pca",
    "private_training",
    "probe_importance",
    "release_digest",
    "release_metrics",
    "scale_by_balanced_adam",
    "scale_by_noise_corrected_adam",
    "schedules",
    "score_layer_importance",
    "score_released_gradients",
    "set_layer_importance",
    "set_prior",
    "steps_for_epsilon",
    "sum_lot",
    "unwhiten_updates",
]
