"""On a mesh with explicit axes, JAX's default, a clipped sum is the same sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dp_ilg
from dp_ilg.clipping.engine_table import ENGINES
from tests.helpers.models import plan, trees_close

SPECS = {"replicated": (P(), P()), "cut": (P(None, "model"), P("model", None))}


def loss(params, example):
    return jnp.sum((jnp.tanh(example @ params["w"]) @ params["v"]) ** 2)


def mesh():
    """One device is enough: axes of length 1 are named in types, too."""
    kinds = dict(axis_types=(AxisType.Explicit,) * 2)
    return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"), **kinds)


def inputs():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"w": draw(4, 6), "v": draw(6, 2)}, draw(6, 4)


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("engine", sorted(ENGINES))
@pytest.mark.parametrize("name", SPECS)
def test_a_step_on_explicit_axes_is_the_ordinary_one(name, engine, size):
    tx = dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0))
    grad_fn = dp_ilg.clipped_grad(
        loss, l2_clip_norm=1.0, engine=engine, microbatch_size=size
    )

    def step(params, batch):
        state = tx.init(params)
        clipped = grad_fn(params, batch, geometry=tx.geometry(state))
        return clipped.gradients, tx.update(clipped, state, params)[0]

    params, batch = inputs()
    wanted = jax.jit(step)(params, batch)
    there = mesh()
    with jax.set_mesh(there):
        put = lambda x, spec: jax.device_put(x, NamedSharding(there, spec))  # noqa: E731
        params = dict(zip(params, map(put, params.values(), SPECS[name]), strict=True))
        got = jax.jit(step)(params, put(batch, P("data")))
        for key, value in got[0].items():
            assert value.sharding.spec == params[key].sharding.spec
    trees_close(got, wanted)


def test_the_engine_by_itself_is_refused_there():
    """So the step above does need what `placed_by_xla` does."""
    params, batch = inputs()
    groups = dp_ilg.Geometry.uniform(params).groups

    def sums(params, batch):
        found = ENGINES["vmap"](loss, params, batch, groups)
        return found.weighted_sum(jnp.ones(6))

    there = mesh()
    with jax.set_mesh(there):
        cut = jax.device_put(batch, NamedSharding(there, P("data")))
        with pytest.raises(Exception, match="sharded"):
            jax.jit(sums)(params, cut)
