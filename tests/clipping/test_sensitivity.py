"""A search for neighbouring batches whose clipped sums differ by more than C."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.clipping.clip import as_clip_mode, clip_sum
from dp_ilg.clipping.per_example import from_gradients
from dp_ilg.geometry.geometry import scaled_to_profile
from dp_ilg.geometry.rules import RULES
from tests.helpers.agreement import QUICK
from tests.helpers.models import CLIP_MODES

PAIRS = 100
SHAPES = {
    "scalar_and_row": {"a": (), "b": (7,)},
    "matrices": {"m": {"kernel": (6, 4), "bias": (4,)}, "n": {"kernel": (4, 2)}},
    "one": {"w": (33,)},
    "tensor": {"c": (3, 3, 2, 2), "d": (5, 1)},
}
CUTS = {
    "scalar_and_row": dp_ilg.layers.blocks("b", edges=[2, 3]),
    "matrices": dp_ilg.layers.blocks("kernel", axis=1, edges=[1]),
    "one": dp_ilg.layers.blocks("w", num_blocks=4),
    "tensor": dp_ilg.layers.blocks("c", axis=2, edges=[1]),
}
WORST = {"ratio": 0.0, "share": 0.0, "cases": 0}


@functools.cache
def clipper(shape, dtype, mode, cut, drops=False):
    """Compiled: clipped sums with and without the last example, for PAIRS batches."""
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map(
        lambda s: jnp.zeros(s, dtype), SHAPES[shape], is_leaf=is_shape
    )
    groups = dp_ilg.layers.group(params, CUTS[shape] if cut else "leaf")

    def both(gradients, weights, bound, padding):
        geometry = dp_ilg.Geometry(weights, groups, drops=drops)
        engine = from_gradients(gradients, groups)
        run = lambda mask: clip_sum(  # noqa: E731
            engine, geometry, bound, as_clip_mode(mode), mask
        )
        return run(padding), run(padding.at[-1].set(True))

    options = None if dtype == "float32" else QUICK  # users' own programs, and others
    return params, groups, jax.jit(jax.vmap(both), compiler_options=options)


def extreme(rng, shape, dtype, spread):
    """Entries of random sign whose magnitudes span `spread` decades each way."""
    common = rng.uniform(-spread, spread, (PAIRS, 4) + (1,) * (len(shape) - 2))
    own = rng.uniform(-3, 3, shape) * rng.integers(0, 2)
    value = 10.0 ** np.clip(common + own, -44, 38) * rng.choice([-1, 1], shape)
    value = np.where(rng.random(shape) < 0.1, 0, value)
    limit = float(jnp.finfo(dtype).max)
    return jnp.asarray(np.clip(value, -limit, limit), dtype)


@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(sorted(SHAPES)),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    mode=st.sampled_from(CLIP_MODES),
    cut=st.booleans(),
    rule=st.sampled_from(sorted(RULES)),
    spread=st.sampled_from([0.5, 4.0, 15.0, 37.0]),
    drops=st.booleans(),
)
def search(seed, shape, dtype, mode, cut, rule, spread, drops):
    rng = np.random.default_rng(seed)
    params, groups, both = clipper(shape, dtype, mode, cut, drops)
    gradients = jax.tree.map(
        lambda p: extreme(rng, (PAIRS, 4, *p.shape), dtype, spread), params
    )
    shares = rng.dirichlet(np.full(len(groups.names), 0.3), PAIRS).clip(1e-6)
    sizes = jnp.array(groups.sizes, jnp.float32)
    weights = jax.vmap(lambda s: scaled_to_profile(RULES[rule](jnp.sqrt(s), sizes), s))(
        jnp.asarray(shares, jnp.float32)
    )
    if drops:
        gone = rng.random(weights.shape) < 0.4
        gone[gone.all(axis=1)] = False  # weights that are all 0 are a mistake, and NaN
        weights = jnp.where(jnp.asarray(gone), 0, weights)
    bound = jnp.asarray(10.0 ** rng.uniform(-8, 8, PAIRS), jnp.float32)
    padding = jnp.asarray(rng.random((PAIRS, 4)) < 0.3).at[:, -1].set(False)
    with_it, without = both(gradients, weights, bound, padding)
    measure(groups, with_it, without, np.asarray(weights, np.float64), bound)


def measure(groups, with_it, without, weights, bound):
    squares = np.zeros(weights.shape)
    pairs = zip(
        groups.leaves,
        jax.tree.leaves(with_it.gradients),
        jax.tree.leaves(without.gradients),
        strict=True,
    )
    for facts, a, b in pairs:
        gap = np.asarray(a, np.float64) - np.asarray(b, np.float64)
        edges = facts.edges or (None,)
        for place, owner in enumerate(facts.groups):
            part = gap
            if facts.edges:
                index = [slice(None)] * gap.ndim
                index[facts.axis + 1] = slice(edges[place], edges[place + 1])
                part = gap[tuple(index)]
            squares[:, owner] += np.sum(part.reshape(PAIRS, -1) ** 2, 1)
    assert not np.any(squares[weights == 0]), "a dropped group has a sum"
    divisors = np.where(weights == 0, 1, weights)
    ratio = np.sqrt(np.sum(squares / divisors**2, 1)) / np.asarray(bound, np.float64)
    share = np.linalg.norm(
        np.asarray(with_it.layer_shares, np.float64)
        - np.asarray(without.layer_shares, np.float64),
        axis=1,
    )
    assert np.all(np.isfinite(ratio)) and np.all(np.isfinite(share))
    WORST["ratio"] = max(WORST["ratio"], float(ratio.max()))
    WORST["share"] = max(WORST["share"], float(share.max()))
    WORST["cases"] += PAIRS
    assert ratio.max() <= 1 + 1e-6
    assert share.max() <= 1 + 1e-6


@pytest.mark.parametrize(
    "draws", [9, pytest.param(110, marks=pytest.mark.slow)], ids=["brief", "long"]
)
def test_no_neighbouring_batches_exceed_the_clip_norm(draws, capsys):
    WORST.update(cases=0, ratio=0.0, share=0.0)
    hypothesis.settings(
        max_examples=draws, deadline=None, derandomize=True, database=None
    )(search)()
    with capsys.disabled():
        print(
            f"\nsensitivity search: {WORST['cases']} cases, largest ratio to C "
            f"{WORST['ratio']:.9f}, largest share {WORST['share']:.9f}"
        )
    assert WORST["cases"] >= 90 * draws
    assert WORST["ratio"] > 0.99, "the search never came near the bound"


def test_the_search_finds_a_clip_in_the_wrong_norm():
    """Negative control: clipping in the plain norm breaks the bound in a geometry."""
    params, groups, both = clipper("matrices", "float32", "joint", False)
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(
        lambda p: extreme(rng, (PAIRS, 4, *p.shape), "float32", 4.0), params
    )
    ones = jnp.ones((PAIRS, len(groups.names)))
    bound, padding = jnp.ones(PAIRS), jnp.zeros((PAIRS, 4), bool)
    with_it, without = both(gradients, ones, bound, padding)
    skewed = np.tile([0.2, 1.0, 3.0], (PAIRS, 1))
    with pytest.raises(AssertionError):
        measure(groups, with_it, without, skewed, bound)
