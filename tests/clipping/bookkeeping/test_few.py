"""Sums of few products: norms right to the rounding of a sum, however terms cancel."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dp_ilg
from dp_ilg.clipping.bookkeeping import few, parts
from dp_ilg.clipping.bookkeeping.few import squares_of_few
from dp_ilg.clipping.bookkeeping.parts import Side
from dp_ilg.clipping.bookkeeping.rules import Rows
from dp_ilg.geometry.rounding import additions

EPS = np.finfo(np.float32).eps
SIZE = 32


def cancelling(terms, first, second, left, batch=1):
    """Factors whose sum is about `left` times the size of its terms."""
    rng = np.random.default_rng(terms * 1000 + first)
    shape = (SIZE, batch)
    base = rng.normal(size=(*shape, 1, first))
    x = base * rng.choice([1.0, 0.1, -1.0], size=(*shape, terms, 1))
    x = x + left * rng.normal(size=(*shape, terms, first))
    share = np.sum(x * base, axis=3) / np.sum(base * base, axis=3)
    y = rng.normal(size=(*shape, 1, second)) * rng.normal(size=(*shape, terms, 1))
    y[:, :, -1] = -(share[..., :-1, None] * y[:, :, :-1]).sum(2) / share[..., -1:]
    y[:, :, -1] += left * rng.normal(size=(*shape, second))
    return x.astype(np.float32), y.astype(np.float32)


def a_side(name="", groups=(0,), labels=None) -> Side:
    return Side(name, np.zeros(0, int) if labels is None else labels, groups)


def norms_of(side, first, second):
    """The norms as the engine makes them of squares and reaches, ``[pieces, SIZE]``."""
    found = jax.jit(lambda x, y: squares_of_few(side, x, y))(first, second)
    assert found is not None
    return np.array([np.sqrt(np.float64(s) + np.float64(e)) for s, e, _ in found])


def check(side, first, second, dense=None):
    """Never below the truth, and above by the roundings of the terms' sizes."""
    axes = {"": None, "batch": 1, "first": 2, "second": 3}
    dense = first if dense is None else dense
    x: Any = np.asarray(dense, np.float64)
    y: Any = np.asarray(second, np.float64)
    whole = np.einsum("bgta,bgtc->bgac", x, y)
    sizes = np.linalg.norm(x, axis=3) * np.linalg.norm(y, axis=3)
    size = sizes.sum(axis=(1, 2))
    for group, norm in zip(side.groups, norms_of(side, first, second), strict=True):
        own = whole
        if side.name:
            chosen = np.flatnonzero(side.labels == group)
            own = np.take(whole, chosen, axis=axes[side.name])
        excess = norm - np.sqrt(np.sum(own**2, axis=(1, 2, 3)))
        assert (excess >= 0).all()
        assert (excess <= allowed(x.shape[3], y.shape[3], x.shape[2]) * size).all()


def allowed(first, second, terms):
    """What the derivation allows: steps of Gram-Schmidt, mixing, and the square."""
    width = max(first, second)
    steps = 2 * (terms - 1) * few.gram_schmidt_roundings(width)
    return (steps + terms**1.5 + 2 * additions(width) + 10) * EPS / 2


@pytest.mark.parametrize("terms", [2, 3, 8])
@pytest.mark.parametrize("left", [1.0, 1e-2, 1e-5])
def test_cancelling_terms_lose_a_rounding_and_no_more(terms, left):
    check(a_side(), *cancelling(terms, 24, 9, left))


def test_without_its_bound_a_norm_can_be_too_small(monkeypatch):
    monkeypatch.setattr(few, "gamma", lambda *_: 0.0)
    monkeypatch.setattr(parts, "gamma", lambda *_: 0.0)
    with pytest.raises(AssertionError):
        check(a_side(), *cancelling(2, 24, 9, 1e-3))


@pytest.mark.parametrize("side, axis", [("first", 24), ("second", 9), ("batch", 3)])
def test_pieces(side, axis):
    labels = np.arange(axis) % 2
    x, y = cancelling(3, 24, 9, 1e-3, batch=3)
    check(a_side(side, (0, 1), labels), x, y)


@pytest.mark.parametrize("side", ["", "first", "second"])
def test_rows_drawn_twice(side):
    rng = np.random.default_rng(0)
    ids = np.array(rng.integers(0, 3, (SIZE, 1, 4)), np.int32)
    y = rng.normal(size=(SIZE, 1, 4, 6)).astype(np.float32)
    y[:, :, 1] = -1.0001 * y[:, :, 0]
    labels = np.array([0, 1, 1]) if side == "first" else np.arange(6) % 2
    own = a_side(side, (0, 1) if side else (0,), labels)
    check(own, Rows(jnp.asarray(ids), 3), y, np.eye(3)[ids])


def test_terms_of_nothing_and_terms_that_repeat():
    x, y = cancelling(4, 24, 9, 1.0)
    x[:, :, 1] = 0
    y[:, :, 2] = 0
    x[:, :, 3] = x[:, :, 0]
    check(a_side(), x, y)
    assert norms_of(a_side(), 0 * x, y).max() < 1e-14  # what denormals might hold


def test_many_terms_are_left_to_others():
    x, y = cancelling(few.MOST + 1, 5, 4, 1.0)
    assert squares_of_few(a_side(), x, y) is None
    rows = Rows(jnp.zeros((SIZE, 1, 2), jnp.int32), 3)
    assert squares_of_few(a_side(), rows, rows) is None


# ------------------------------------------------------------- through the front door


def both(loss, params, batch):
    """Sums of clipped gradients by both engines, clipped well below every norm."""
    geometry = dp_ilg.Geometry.uniform(params)
    sums = []
    for engine in ("auto", "vmap"):
        grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1e-6, engine=engine)
        found = jax.jit(lambda p, b, f=grad_fn: f(p, b, geometry=geometry))(
            params, batch
        )
        sums.append(found.gradients)
    return sums


def net(params, x):
    return jnp.tanh(x @ params["first"]) @ params["second"]


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, e: jnp.sum((net(p, e[0]) - net(p, e[1])) ** 2),  # siamese
        lambda p, e: (net(p, e[0])[0] - 0.99 * net(p, e[1])[0] - 0.1) ** 2,  # TD error
        lambda p, e: jnp.sum(net(p, e[0]) - net(p, e[1])),  # a critic
    ],
)
def test_differences_within_an_example(loss):
    rng = np.random.default_rng(1)
    draw = lambda *s: rng.normal(size=s).astype(np.float32)  # noqa: E731
    params = {"first": draw(16, 12) / 4, "second": draw(12, 4)}
    x = draw(1, 16)
    ours, slow = both(loss, params, np.stack([x, x + 0.03 * draw(1, 16)], axis=1))
    norm = lambda tree: np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in tree.values()))  # noqa: E731
    assert norm(ours) <= 1e-6 * (1 + 1e-6)
    assert norm(ours) >= 1e-6 * (1 - 1.5e-4)  # Gram products: 1e-3
    for name in params:
        np.testing.assert_allclose(ours[name], slow[name], rtol=1e-3, atol=2e-10)


def test_a_row_looked_up_twice_with_opposite_signs():
    params = {"table": np.ones((5, 3), np.float32)}
    loss = lambda p, e: jnp.sum(p["table"][e] * jnp.array([[1.0], [-1.01]]))  # noqa: E731
    ours, _ = both(loss, params, np.full((1, 2), 2))
    norm = np.linalg.norm(np.float64(ours["table"]))
    assert 0.98e-6 <= norm <= 1.000001e-6  # 0.13e-6 by Gram products


@jax.custom_vjp
def _looked_up(x, table):
    return jnp.sum(x) * table[0]


_looked_up.defvjp(
    lambda x, table: (_looked_up(x, table), (x, table)),
    lambda kept, c: (
        c * jnp.ones_like(kept[0]) * kept[1].at[0].get(),
        jnp.zeros_like(kept[1]),
    ),
)


def test_a_derivative_in_python_gets_constants_as_arrays():
    params = {"w": np.eye(4, dtype=np.float32)}
    loss = lambda p, e: _looked_up(jnp.tanh(e @ p["w"]), jnp.array([2.0, 3.0]))  # noqa: E731
    ours, slow = both(loss, params, np.ones((2, 4), np.float32))
    np.testing.assert_allclose(ours["w"], slow["w"], rtol=2e-6)


def test_arrays_written_in_place_are_refused_by_name():
    def loss(params, example):
        kept = jax.new_ref(jnp.zeros(3))
        kept[...] = jnp.tanh(example @ params["w"])
        return jnp.sum(kept[...] ** 2)

    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
    params = {"w": np.ones((3, 3), np.float32)}
    with pytest.raises(ValueError, match=r"in place \(jax.new_ref\).* x.at"):
        grad_fn(
            params,
            np.ones((2, 3), np.float32),
            geometry=dp_ilg.Geometry.uniform(params),
        )


def test_an_explanation_says_the_micro_batch_of_a_call():
    params = {"w": np.ones((3, 2), np.float32)}
    batch = np.ones((6, 3), np.float32)
    for size in (4, None):
        grad_fn = dp_ilg.clipped_grad(
            lambda p, e: jnp.sum(jnp.tanh(e @ p["w"])),
            l2_clip_norm=1.0,
            microbatch_size=size,
        )
        found = grad_fn.explain(params, batch)
        assert found.microbatch == (size or grad_fn.microbatch(params, batch))
        held = f"micro-batch of {found.microbatch} holds"
        assert held in str(found).splitlines()[-1]
        assert "1 term of 2 x 3" in str(found)
