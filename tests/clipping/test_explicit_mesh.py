"""On a mesh with explicit axes, JAX's default, a clipped sum is the same sum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import dp_ilg
from dp_ilg.clipping.engine_table import ENGINES
from tests.helpers.models import plan, trees_close

SPECS = {"replicated": (P(), P()), "cut": (P(None, "model"), P("model", None))}


def loss(params, example):
    return jnp.sum((jnp.tanh(example @ params["w"]) @ params["v"]) ** 2)


KINDS = dict(axis_types=(AxisType.Explicit,) * 2)
NAMES = ("data", "model")


def inputs():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {"w": draw(4, 8), "v": draw(8, 2)}, draw(8, 4)


def stepper(engine, size):
    tx = dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0))
    grad_fn = dp_ilg.clipped_grad(
        loss, l2_clip_norm=1.0, engine=engine, microbatch_size=size
    )

    def step(params, batch, state):
        clipped = grad_fn(params, batch, geometry=tx.geometry(state))
        return clipped.gradients, tx.update(clipped, state, params)[0]

    return step, tx.init(inputs()[0])


@pytest.mark.parametrize("size", [None, 4])
def test_a_step_on_one_device_is_the_ordinary_one(size):
    step, state = stepper("bookkeeping", size)
    params, batch = inputs()
    wanted = jax.jit(step)(params, batch, state)
    there = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), NAMES, **KINDS)
    with jax.set_mesh(there):
        cut = jax.device_put(batch, NamedSharding(there, P("data")))
        got = jax.jit(step)(params, cut, state)
    trees_close(got, wanted)


def many_devices(spec):
    """Shapes on a mesh of eight devices, which tracing needs no devices for."""
    mesh = AbstractMesh((2, 4), NAMES, **KINDS)
    params, batch = inputs()

    def shape(x, spec):
        there = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)

    cut = {k: shape(x, s) for (k, x), s in zip(params.items(), spec, strict=True)}
    return jax.sharding.use_abstract_mesh(mesh), cut, shape(batch, P("data"))


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("engine", sorted(ENGINES))
@pytest.mark.parametrize("name", SPECS)
def test_a_step_on_many_devices_is_sharded_as_its_parameters(name, engine, size):
    step, state = stepper(engine, size)
    mesh, params, batch = many_devices(SPECS[name])
    with mesh:
        gradients, updates = jax.eval_shape(step, params, batch, state)
    for tree in (gradients, updates):
        for key, spec in zip(params, SPECS[name], strict=True):
            assert tree[key].shape == params[key].shape
            if name == "cut":
                assert tree[key].sharding.spec == spec


def test_an_engine_by_itself_is_refused_there():
    """So the steps above do need what `placed_by_xla` does."""
    mesh, params, batch = many_devices(SPECS["replicated"])
    groups = dp_ilg.Geometry.uniform(inputs()[0]).groups

    def sums(params, batch):
        found = ENGINES["bookkeeping"](loss, params, batch, groups)
        return found.weighted_sum(jnp.ones(8))

    with mesh, pytest.raises(Exception, match="ambiguous how the output should be"):
        jax.eval_shape(sums, params, batch)
