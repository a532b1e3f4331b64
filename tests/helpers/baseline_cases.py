"""What the contract tests need to know of every row of `dp_ilg.baselines`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import dp_ilg
import dp_ilg.noise.add_noise
from dp_ilg.baselines.table import BASELINES
from tests.helpers.models import noiseless, plan


class Case(NamedTuple):
    """Options that make a row an ordinary optimizer, and that optimizer.

    `score` names what is released beside the gradient: "" (nothing), "shares",
    "count", "counts", or "slack", which costs nothing.
    """

    options: dict[str, Any]
    limit: Any
    score: str = ""
    falling: bool = False

    @property
    def charged(self) -> bool:
        """Whether what is released beside the gradient spends the score budget."""
        return self.score not in ("", "slack")


_ADAM = optax.adam(1e-2, eps=1e-3)
_SGD = optax.sgd(1e-2, momentum=0.5)
_SMALL = {"eps": 1e-3}
_MUON = contrib.muon(1e-2, beta=0.5, eps=1e-3, adam_learning_rate=1e-3)
CASES = {
    "adaclip": Case({"momentum": 0.5}, _SGD),
    "adadp": Case(_SMALL, optax.rmsprop(1e-2, eps=1e-3)),
    "automatic_clipping": Case(_SMALL | {"gamma": 1e6}, _ADAM),
    "dp_adam": Case(_SMALL, _ADAM),
    "dp_adam_bc": Case(_SMALL | {"floor": 1e-30}, _ADAM),
    "dp_adam_ilg": Case(_SMALL, _ADAM, "shares"),
    "dp_adam_ilg_equal_snr": Case(_SMALL, _ADAM, "shares"),
    "dp_adam_ilg_min_noise_energy": Case(_SMALL, _ADAM, "shares"),
    "dp_adam_ilg_paper": Case(_SMALL, _ADAM, "shares"),
    "dp_adam_ilg_sqrt_share": Case(_SMALL, _ADAM, "shares"),
    "dp_adam_ilg_uniform": Case(_SMALL, _ADAM),
    "dp_muon": Case(_SMALL | {"momentum": 0.5}, _MUON),
    "dp_sgd": Case({"momentum": 0.5}, _SGD),
    "dp_sgd_decay": Case({}, optax.sgd(1e-2), falling=True),
    "dp_sgd_ilg": Case({"momentum": 0.5}, _SGD, "shares"),
    "quantile_clipping": Case(_SMALL, _ADAM, "count"),
    "quantile_clipping_per_layer": Case(_SMALL, _ADAM, "counts"),
    "slack_clipping": Case(_SMALL, _ADAM, "slack"),
    "scale_then_privatize": Case(_SMALL, _ADAM),
}
NAMES = sorted(BASELINES)
FAST = ["adaclip", "automatic_clipping", "quantile_clipping_per_layer"]
ROWS = [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in NAMES]
PARAMS = {"a": {"k": (3, 4), "c": (4,)}, "b": (5,), "c": ()}


def is_shape(value: Any) -> bool:
    return isinstance(value, tuple)


def zeros(shapes: Any = None) -> Any:
    return jax.tree.map(jnp.zeros, shapes or PARAMS, is_leaf=is_shape)


def examples(seed: int, size: int = 12, shapes: Any = None) -> Any:
    """Examples shaped like the parameters, of unlike sizes by entry."""
    rng = np.random.default_rng(seed)

    def one(shape: Any) -> Any:
        spread = 10 ** np.random.default_rng(len(shape)).uniform(-2, 0, shape)
        length = rng.lognormal(size=(size,) + (1,) * len(shape))
        draw = (rng.normal(size=(size, *shape)) + 0.5) * spread * length
        return jnp.asarray(draw, jnp.float32)

    return jax.tree.map(one, shapes or PARAMS, is_leaf=is_shape)


def inner(params: Any, example: Any) -> Any:
    """A loss whose gradient is the example itself: any gradient can be made."""
    products = jax.tree.map(lambda p, e: jnp.sum(p * e), params, example)
    return sum(jax.tree.leaves(products))


def bowl(params: Any, example: Any) -> Any:
    """Half the squared distance: the gradient is ``params - example``."""
    gaps = jax.tree.map(lambda p, e: jnp.sum(jnp.square(p - e)), params, example)
    return sum(jax.tree.leaves(gaps)) / 2


def plan_for(name: str, **changes: Any) -> dp_ilg.PrivacyPlan:
    """A plan the row accepts, without calibration."""
    facts: dict[str, Any] = dict(score_budget=0.2 if CASES[name].charged else 0.0)
    if CASES[name].falling:
        facts["schedule"] = dp_ilg.schedules.linear(0.9)
    return plan(**(facts | changes))


def quiet_plan(name: str) -> dp_ilg.PrivacyPlan:
    """The same without noise, and with a clip norm nothing reaches.

    Where noise must fall its first step has a standard deviation of 1e-6 of the sum:
    with less, sums beyond 260 million deviations would be cut.
    """
    stages = ((1, 1e-12), (19, 0.0)) if CASES[name].falling else ((20, 0.0),)
    return noiseless(score_budget=0.2 if CASES[name].charged else 0.0, stages=stages)


def make(name: str, the_plan: Any = None, seed: int = 0, **options: Any) -> Any:
    """The optimizer of a row."""
    key = jax.random.key(seed)
    return BASELINES[name](1e-2, the_plan or plan_for(name), key=key, **options)


def clipped_by_engine(name: str, bound: Any, loss: Any = inner) -> Any:
    """``clipped_grad`` the way a row asks for it."""
    mode = BASELINES[name].clip_mode()
    return dp_ilg.clipped_grad(loss, l2_clip_norm=bound, clip_mode=mode)


def clipped_by_chain(name: str, bound: Any) -> Any:
    """The same signature for per-example gradients that are there already."""
    clip = dp_ilg.clip_per_example(bound, clip_mode=BASELINES[name].clip_mode())

    def run(params: Any, batch: Any, *, geometry: Any, is_padding_example: Any = None):
        extra = dict(geometry=geometry, is_padding_example=is_padding_example)
        return clip.update(batch, optax.EmptyState(), params, **extra)[0]

    return run


PATHS = {"clipped_grad": clipped_by_engine, "vmap": clipped_by_chain}


def releasing(tx: Any) -> Any:
    """A chain's step, compiled, that hands back what its noise released."""
    seen = []
    own = dp_ilg.noise.add_noise.released_mean

    def record(*args: Any) -> Any:
        seen.append(own(*args))
        return seen[-1]

    def step(grads: Any, state: Any, params: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dp_ilg.noise.add_noise, "released_mean", record)
            _, state = tx.update(grads, state, params)
        return seen.pop(), state

    return jax.jit(step)


def nobody(batch: Any) -> Any:
    """A batch of the same shape in which every example is absent."""
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), batch)


@functools.cache
def evolved(name: str) -> Any:
    """A row's optimizer, its state after two unlike batches, and its step."""
    tx, params = make(name), zeros()
    state, step = tx.init(params), releasing(tx)
    for seed in range(2):
        _, state = step(examples(seed), state, params)
    return tx, state, step


def distance(geometry: Any, one: Any, other: Any) -> float:
    """How far two clipped sums are apart in the geometry's norm, in float64."""
    weights = np.asarray(geometry.weights, np.float64)
    squares = np.zeros(len(weights))
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    for facts, (a, b) in zip(geometry.groups.leaves, leaves, strict=True):
        gap = np.asarray(a, np.float64) - np.asarray(b, np.float64)
        squares[facts.groups[0]] += np.sum(gap**2)
    return float(np.sqrt(np.sum(squares / weights**2)))


def loudness(name: str, the_plan: Any, one: Any, other: Any) -> float:
    """Distance of two neighbouring releases in units of their noise, both parts."""
    sigma = the_plan.gradient_noise_multipliers[0]
    bound = float(one.l2_clip_norm)
    gradient = distance(one.geometry, one.gradients, other.gradients) / bound / sigma
    count = one.fits.shape[0] - 1
    parts = {
        "": lambda: np.zeros(1),
        "shares": lambda: one.layer_shares - other.layer_shares,
        "count": lambda: (one.fits[:1] - other.fits[:1]) * 2,
        "counts": lambda: (one.fits[1:] - other.fits[1:]) * 2 / np.sqrt(count),
        "slack": lambda: one.layer_shares - other.layer_shares,
    }
    score = np.linalg.norm(np.asarray(parts[CASES[name].score](), np.float64))
    tau = the_plan.score_noise_multipliers[0]
    tau = sigma if CASES[name].score == "slack" else tau
    return float(np.hypot(gradient, score / tau))
