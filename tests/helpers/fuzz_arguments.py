"""Public functions called with values at random: an answer, or one sentence.

Each row has a good call; some of its arguments are replaced by odd values. Allowed
are a result, and a `ValueError` or `TypeError` of one line.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dp_ilg
from dp_ilg.accounting import composition, schedules
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.auditing.bounds import epsilon_lower_bound, gaussian_lower_bound
from dp_ilg.sampling.gather import take
from dp_ilg.sampling.poisson import PoissonSampler
from tests.helpers.models import mlp_batch, mlp_loss, mlp_params

ODD: list[Any] = [
    *(0, 1, -1, 2, 7, 10**400, -(10**400), True, False, None, 0.0, -0.0, 0.5, 1.0),
    *(2.5, -3.0, 1e-300, 5e-324, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "1", "abc", "<script>", "joint", b"bytes", 1j, object, len, ...),
    *([], [1], [1.0, 0.5], [float("nan")], ["a"], (), (1, 2), {}, {"a": 1}, {1}),
    *(np.float32(2), np.int64(3), np.uint8(0), np.array(1), np.zeros(0), np.ones(3)),
    *(np.array([1.0, np.nan]), np.array(["a"]), np.array([None]), np.ones((2, 2))),
    *(np.float16(np.inf), np.bool_(True), np.datetime64("2020-01-01"), range(3)),
]
_TRACED = [jnp.float32(1), jnp.zeros(3), jnp.int32(2), jnp.array(True)]
PLAN_FACTS: dict[str, Any] = dict(
    num_examples=100,
    batch_size=10,
    num_steps=9,
    delta=1e-5,
    l2_clip_norm=1.0,
    score_budget=0.01,
    stages=((9, 1.0),),
)
STEP = dict(noise_multiplier=2.0, sampling_prob=0.1, num_steps=5, delta=1e-5)


def _sampled(num_examples: Any, sampling_prob: Any, key: Any, **more: Any) -> Any:
    if isinstance(num_examples, int) and num_examples > 10**6:
        return None  # a whole number like any other; drawing from it takes long
    return PoissonSampler(num_examples, sampling_prob, key=key, **more).chunks(0)


def _drawn(schedule: Any) -> Any:
    return schedules.to_stages(schedule.multipliers(20, 83.0), 4)


def _planned(**facts: Any) -> Any:
    return dp_ilg.plan_privacy(accountant="zcdp", **facts)


def _grouped(*args: Any, **options: Any) -> Any:
    return dp_ilg.layers.group(mlp_params(), dp_ilg.layers.blocks(*args, **options))


def _links() -> dict[str, Any]:
    plan = PrivacyPlan(**PLAN_FACTS)
    one, other = jax.random.split(jax.random.key(1))
    return {
        "a": dp_ilg.clip_per_example(1.0),
        "b": dp_ilg.score_layer_importance("paper", plan, key=one),
        "c": dp_ilg.add_importance_noise(plan, key=other),
    }


def _clipped() -> Any:
    params = mlp_params()
    grad_fn = dp_ilg.clipped_grad(mlp_loss, l2_clip_norm=1.0)
    return grad_fn(params, mlp_batch(), geometry=dp_ilg.Geometry.uniform(params))


def rows() -> dict[str, tuple[Callable, dict[str, Any]]]:
    """Names to functions and good arguments."""
    scores, key = np.arange(20.0), jax.random.key(0)
    bounds = {"in_scores": scores, "out_scores": -scores, "delta": 1e-5}
    adam = {"learning_rate": 0.1, "plan": PrivacyPlan(**PLAN_FACTS), "key": key}
    adam |= {"importance": "paper", "layers": "module", "floor": 0.01, "b1": 0.9}
    return {
        "PrivacyPlan": (PrivacyPlan, PLAN_FACTS),
        "from_json": (
            lambda text: PrivacyPlan.from_json(text),
            {"text": PrivacyPlan(**PLAN_FACTS).to_json()},
        ),
        "plan_privacy": (
            _planned,
            {k: v for k, v in PLAN_FACTS.items() if k != "stages"}
            | {"noise_multiplier": 1.0},
        ),
        "linear": (lambda end: _drawn(schedules.linear(end)), {"end": 0.5}),
        "exponential": (lambda r: _drawn(schedules.exponential(r)), {"r": 0.5}),
        "cosine": (lambda end: _drawn(schedules.cosine(end)), {"end": 0.5}),
        "inverse_time": (
            lambda decay, floor: _drawn(schedules.inverse_time(decay, floor)),
            {"decay": 0.5, "floor": 0.1},
        ),
        "stages": (lambda v: _drawn(schedules.stages(v)), {"v": [1.0, 0.5]}),
        "array": (lambda v: _drawn(schedules.array(v)), {"v": [1.0] * 20}),
        "PoissonSampler": (
            _sampled,
            {"num_examples": 50, "sampling_prob": 0.1, "key": 3, "chunk_size": 9},
        ),
        "take": (take, {"source": np.ones((4, 2)), "indices": np.array([1, -1])}),
        "blocks": (_grouped, {"path": "kernel", "axis": 0, "num_blocks": 2}),
        "group": (
            lambda spec: dp_ilg.layers.group(mlp_params(), spec),
            {"spec": "leaf"},
        ),
        "Geometry.of": (
            lambda w: dp_ilg.Geometry.of(mlp_params(), w),
            {"w": [1.0, 2.0]},
        ),
        "clip_per_example": (
            dp_ilg.clip_per_example,
            {"l2_clip_norm": 1.0, "clip_mode": "joint"},
        ),
        "clipped_grad": (
            dp_ilg.clipped_grad,
            {"loss_fn": mlp_loss, "l2_clip_norm": 1.0, "microbatch_size": 4}
            | {"engine": "auto", "clip_mode": "joint"},
        ),
        "dp_adam_ilg": (dp_ilg.dp_adam_ilg, adam),
        "chain": (lambda a, b, c: dp_ilg.chain(a, b, c), _links()),
        "sum_lot": (dp_ilg.sum_lot, {"batches": [_clipped()]}),
        "private_pca": (
            dp_ilg.private_pca,
            {"x": np.eye(3, dtype=np.float32), "num_components": 2}
            | {"noise_multiplier": 1.0, "key": key},
        ),
        "strong_composition": (composition.strong_composition, STEP),
        "moments_epsilon": (composition.moments_epsilon, STEP),
        "epsilon_lower_bound": (epsilon_lower_bound, bounds),
        "gaussian_lower_bound": (gaussian_lower_bound, bounds),
    }


_ROWS: dict[str, tuple[Callable, dict[str, Any]]] = {}


def call(dice: random.Random) -> str:
    """Calls one function with one to three odd arguments."""
    _ROWS.update(_ROWS or rows())
    name = dice.choice(sorted(_ROWS))
    fn, good = _ROWS[name]
    changed = dice.sample(sorted(good), min(len(good), dice.choice((1, 1, 2, 3))))
    odd = {key: dice.choice(ODD + _TRACED) for key in changed}
    return attempt(name, fn, good | odd)


def attempt(name: str, fn: Callable, arguments: dict[str, Any]) -> str:
    """Whether a call was accepted or refused; anything else raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fn(**arguments)
    except Exception as error:
        if type(error).__module__.startswith(("jaxtyping", "beartype")):
            return "refused"  # by the tests' own check of annotations
        if not isinstance(error, (ValueError, TypeError)):
            raise AssertionError(f"{name}({arguments}): {error!r}") from error
        text = str(error)
        if not text or len(text.splitlines()) > 1:
            raise AssertionError(f"{name}({arguments}): {text!r}") from error
        return "refused"
    return "accepted"
