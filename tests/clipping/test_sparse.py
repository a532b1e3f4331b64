"""A batch that holds sparse arrays is clipped as its dense form is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.sparse import BCOO, BCSR

import dp_ilg
from tests.helpers.models import trees_close

KINDS = {"bcoo": BCOO, "bcsr": BCSR}


def dense_rows(size=5):
    rng = np.random.default_rng(0)
    kept = rng.random((size, 3, 6)) < 0.4
    return jnp.asarray(np.where(kept, rng.normal(size=(size, 3, 6)), 0), jnp.float32)


def loss(params, example):
    hidden = jnp.tanh(example["x"] @ params["w"] + params["b"])
    return jnp.sum(jnp.square(hidden - example["y"]))


def parameters():
    rng = np.random.default_rng(1)
    return {"w": jnp.asarray(rng.normal(size=(6, 2)), jnp.float32), "b": jnp.zeros(2)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ["auto", "vmap"])
def test_sparse_rows_are_clipped_as_dense_ones(engine, kind):
    x, y = dense_rows(), jnp.arange(5.0)
    params = parameters()
    geometry = dp_ilg.Geometry.uniform(params)
    padding = jnp.arange(5) == 1
    sparse = KINDS[kind].fromdense(x, n_batch=1)
    for size in (None, 2):
        grad_fn = dp_ilg.clipped_grad(
            loss, l2_clip_norm=0.5, engine=engine, microbatch_size=size
        )
        run = jax.jit(
            lambda p, b, f=grad_fn: f(
                p, b, geometry=geometry, is_padding_example=padding
            )
        )
        got = run(params, {"x": sparse, "y": y})
        wanted = run(params, {"x": x, "y": y})
        trees_close(got.gradients, wanted.gradients)
        trees_close(got.fits, wanted.fits)
        far = run(params, {"x": KINDS[kind].fromdense(2 * x, n_batch=1), "y": y})
        assert float(jnp.max(jnp.abs(far.gradients["w"] - got.gradients["w"]))) > 1e-3


def test_a_sparse_array_is_explained_and_needs_a_batch_axis():
    params, x = parameters(), dense_rows()
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
    batch = {"x": BCOO.fromdense(x, n_batch=1), "y": jnp.zeros(5)}
    assert grad_fn.microbatch(params, batch) == 5
    assert "w" in str(grad_fn.explain(params, batch))
    batch["x"] = BCOO.fromdense(x)
    with pytest.raises(ValueError, match=r"without a batch axis; make it with BCOO"):
        grad_fn(params, batch, geometry=dp_ilg.Geometry.uniform(params))
