"""Small models, data and plans that several test files share."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dp_ilg

RULES = ["uniform", "paper", "min_noise_energy", "equal_snr", "sqrt_share"]
CLIP_MODES = ["joint", "normalize", "per_layer"]
LAYERINGS = {
    "module": "module",
    "leaf": "leaf",
    "blocks": dp_ilg.layers.blocks("kernel", axis=0, edges=[1, 3]),
    "blocks_axis1": dp_ilg.layers.by_leaf(
        dp_ilg.layers.blocks("d1/kernel", axis=1, num_blocks=3)
    ),
    "path": dp_ilg.layers.by_path(lambda path: path[-1]),
    "frozen": dp_ilg.layers.by_leaf(frozen=["d1/bias"]),
}


def mlp_params(key=0, dtype=jnp.float32, sizes=(5, 7, 3)):
    keys = jax.random.split(jax.random.key(key), len(sizes))
    return {
        f"d{i + 1}": {
            "kernel": jax.random.normal(k, (a, b), dtype) / 2,
            "bias": jnp.zeros(b, dtype),
        }
        for i, (k, a, b) in enumerate(zip(keys, sizes, sizes[1:], strict=False))
    }


def mlp_loss(params, example):
    x, y = example
    hidden = jnp.tanh(x @ params["d1"]["kernel"] + params["d1"]["bias"])
    logits = hidden @ params["d2"]["kernel"] + params["d2"]["bias"]
    return -jax.nn.log_softmax(logits.astype(jnp.float32))[y]


def mlp_batch(size=12, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 5)) * rng.lognormal(size=(size, 1))
    return jnp.asarray(x, dtype), jnp.asarray(rng.integers(0, 3, size))


def per_example(params, batch, loss=mlp_loss):
    return jax.vmap(jax.grad(loss), (None, 0))(params, batch)


def plan(**changes):
    facts: dict[str, Any] = dict(
        num_examples=1000,
        batch_size=12,
        num_steps=20,
        delta=1e-5,
        noise_multiplier=1.0,
        score_budget=0.01,
    )
    if "epsilon" in changes:
        del facts["noise_multiplier"]
    return dp_ilg.plan_privacy(**(facts | changes))


def noiseless(**changes):
    facts: dict[str, Any] = dict(
        num_examples=1000,
        batch_size=12,
        num_steps=20,
        delta=1e-5,
        l2_clip_norm=1e6,
        score_budget=0.0,
        stages=((20, 0.0),),
        accountant="pld",
        neighboring_relation="add_or_remove_one",
        target_epsilon=None,
    )
    return dp_ilg.PrivacyPlan(**(facts | changes))


def trees_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol, atol
        ),
        a,
        b,
    )


def naive_clipped_sum(gradients, geometry, bound, mode, padding=None):
    """The definition of docs/idea.md, example by example in float64."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(gradients)]
    weights = np.asarray(geometry.weights, np.float64)
    groups = geometry.groups
    total = [np.zeros(x.shape[1:]) for x in leaves]
    shares = np.zeros(len(weights))
    for i in range(leaves[0].shape[0]):
        if padding is not None and padding[i]:
            continue
        squares = np.zeros(len(weights))
        masks = []
        for facts, leaf in zip(groups.leaves, leaves, strict=True):
            owner = np.full(facts.shape, -1)
            if facts.groups and not facts.edges:
                owner[...] = facts.groups[0]
            for a, b, g in zip(
                facts.edges, facts.edges[1:], facts.groups, strict=False
            ):
                index = [slice(None)] * len(facts.shape)
                index[facts.axis] = slice(a, b)
                owner[tuple(index)] = g
            masks.append(owner)
            for g in range(len(weights)):
                squares[g] += np.sum(leaf[i][owner == g] ** 2)
        norms = np.sqrt(squares)
        if not np.all(np.isfinite(norms)):
            continue
        weighted = np.sqrt(np.sum(squares / weights**2))
        if mode == "per_layer":
            box = bound * weights / np.sqrt(len(weights))
            factor = np.minimum(1, box / np.maximum(norms, 1e-300))
        elif mode == "normalize":
            factor = np.full(len(weights), bound / (weighted + 1e-4))
        else:
            factor = np.full(len(weights), min(1, bound / max(weighted, 1e-300)))
        for part, leaf, owner in zip(total, leaves, masks, strict=True):
            scale = np.where(owner >= 0, factor[owner], 0)
            part += leaf[i] * scale
        if np.sum(squares) > 0:
            shares += norms / np.sqrt(np.sum(squares))
    return jax.tree.unflatten(jax.tree.structure(gradients), total), shares
