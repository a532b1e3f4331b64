"""Strided convolutions of few channels: the engine's rearranged form against JAX's."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dp_ilg
from dp_ilg.clipping.bookkeeping import phases
from dp_ilg.clipping.bookkeeping.convolution import Convolution

# spatial size, channels, kernel, strides, padding
CASES: dict[str, Any] = {
    "literature's first layer": ((28, 28), 1, (8, 8), (2, 2), "SAME"),
    "odd window": ((11, 12), 2, (5, 3), (2, 2), "SAME"),
    "odd image": ((9, 13), 1, (3, 3), (2, 2), "VALID"),
    "uneven strides": ((10, 9), 1, (4, 3), (3, 2), ((1, 2), (0, 3))),
    "one axis moves": ((10, 9), 2, (3, 3), (1, 2), ((2, 0), (1, 1))),
    "cut padding": ((12, 12), 1, (4, 4), (2, 2), ((-1, 0), (0, -2))),
    "signal": ((17,), 2, (5,), (3,), ((2, 2),)),
    "volume": ((5, 6, 7), 1, (3, 3, 3), (2, 1, 2), "SAME"),
}
LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NCHW", "OIHW", "NHWC")}
LAYOUTS[3] = ("NDHWC", "DHWIO", "NDHWC")
LAYOUTS[0] = ("NHWC", "HWIO", "NHWC")


def scene(name, dtype=jnp.float32, outputs=4) -> Any:
    """The loss of one example, its parameters, and rows of examples."""
    spatial, channels, kernel, strides, padding = CASES[name]
    layout = LAYOUTS[len(spatial)]
    numbers = lax.conv_dimension_numbers(
        (1, channels, *spatial), (outputs, channels, *kernel), layout
    )
    shape = [0] * (len(kernel) + 2)
    sizes = (outputs, channels, *kernel)
    for axis, size in zip(numbers.rhs_spec, sizes, strict=True):
        shape[axis] = size
    row = [0] * (len(kernel) + 2)
    for axis, size in zip(numbers.lhs_spec, (1, channels, *spatial), strict=True):
        row[axis] = size

    def convolve(params, x):
        return lax.conv_general_dilated(
            x, params["k"], strides, padding, dimension_numbers=layout
        )

    def loss(params, x):
        y = jnp.tanh(convolve(params, x) + params["b"]).astype(jnp.float32)
        return jnp.sum(jnp.sin(jnp.arange(y.size) * 1.0) * y.reshape(-1))

    params = {"k": jax.random.normal(jax.random.key(0), tuple(shape), dtype) / 4}
    params["b"] = jnp.zeros((), dtype)
    rows = jax.random.normal(jax.random.key(1), (6, *row), dtype)
    return loss, params, rows, convolve


def convolution(convolve, params, x) -> Convolution:
    (equation,) = jax.make_jaxpr(convolve)(params, x).jaxpr.eqns
    return Convolution.of(equation)


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_rearranged_and_equals_jax(name):
    _, params, rows, convolve = scene(name)
    conv = convolution(convolve, params, rows[0])
    assert phases.pays(conv, CASES[name][1])
    got = jax.vmap(lambda x: conv.apply(x, params["k"]))(rows)
    want = jax.vmap(lambda x: convolve(params, x))(rows)
    assert got.shape == want.shape
    assert np.allclose(got, want, atol=2e-5)
    text = str(jax.make_jaxpr(lambda x: conv.apply(x, params["k"]))(rows[0]))
    assert f"window_strides={conv.strides}" not in text


@pytest.mark.parametrize("name", ["odd window", "one axis moves", "signal"])
def test_derivative_of_the_input(name):
    _, params, rows, convolve = scene(name)
    conv = convolution(convolve, params, rows[0])
    given = jax.random.normal(jax.random.key(2), convolve(params, rows[0]).shape)
    ours = jax.vjp(lambda x: conv.apply(x, params["k"]), rows[0])[1](given)[0]
    theirs = jax.vjp(lambda x: convolve(params, x), rows[0])[1](given)[0]
    assert np.allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_clipped_sums_equal_those_of_vmap(name):
    loss, params, rows, _ = scene(name)
    wanted = clipped(loss, params, rows, True, "vmap")
    found = clipped(loss, params, rows, True)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert np.allclose(ours, theirs, rtol=1e-5, atol=2e-6)


def test_without_jit():
    loss, params, rows, _ = scene("odd image")
    eager, jitted = (clipped(loss, params, rows, jit) for jit in (False, True))
    for ours, theirs in zip(*map(jax.tree.leaves, (eager, jitted)), strict=True):
        assert np.allclose(ours, theirs, rtol=1e-5, atol=2e-6)


def test_in_bfloat16():
    loss, params, rows, _ = scene("odd window", jnp.bfloat16)
    found = clipped(loss, params, rows, True)
    wanted = clipped(loss, params, rows, True, "vmap")
    for ours, theirs in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert np.allclose(ours, theirs, rtol=0.02, atol=0.02)


def clipped(loss, params, rows, jitted, engine="bookkeeping") -> Any:
    geometry = dp_ilg.Geometry.uniform(params)
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0, engine=engine)
    run = lambda: grad_fn(params, rows, geometry=geometry)  # noqa: E731
    return (jax.jit(run)() if jitted else run()).gradients


def test_a_gradient_of_other_phases_is_noticed():
    """Exchanging the phases of the two axes gives another gradient."""
    _, params, rows, convolve = scene("literature's first layer")
    conv = convolution(convolve, params, rows[0])
    x = conv.channels_last(rows[0], conv.lhs_spec)
    given = jax.random.normal(jax.random.key(2), (1, 14, 14, 4))
    right = jax.vjp(lambda k: convolve({"k": k}, rows[0]), params["k"])[1](given)[0]
    right = jnp.transpose(right, (2, 3, 1, 0))
    found = phases.kernel_gradient(conv, x, given)
    assert np.allclose(found, right, atol=2e-5)
    assert not np.allclose(jnp.swapaxes(found, 0, 1), right, atol=1e-2)


def test_what_no_window_reads_does_not_matter():
    """The last row and column lie beyond the last window, whose cell reaches them."""
    x = jax.random.normal(jax.random.key(0), (1, 10, 12, 1))
    kernel = jax.random.normal(jax.random.key(1), (5, 5, 1, 3))
    convolve = lambda params, x: lax.conv_general_dilated(  # noqa: E731
        x, params["k"], (2, 3), "VALID", dimension_numbers=LAYOUTS[0]
    )
    conv = convolution(convolve, {"k": kernel}, x)
    assert phases.pays(conv, 1)
    spoiled = x.at[:, 9].set(jnp.nan).at[:, :, 11].set(jnp.inf)
    got, want = conv.apply(spoiled, kernel), convolve({"k": kernel}, x)
    assert got.shape == want.shape and np.allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(
    "change, channels",
    [
        ({"strides": (1, 1)}, 1),
        ({"kernel": (2, 8)}, 1),
        ({"groups": 2}, 2),
        ({"lhs_dilation": (2, 1)}, 1),
        ({"rhs_dilation": (1, 2)}, 1),
        ({}, 3),
    ],
    ids=["no stride", "apart", "groups", "dilated input", "dilated kernel", "wide"],
)
def test_what_stays_as_it_is(change, channels):
    _, params, rows, convolve = scene("literature's first layer")
    conv = convolution(convolve, params, rows[0])
    assert phases.pays(conv, 1)
    assert not phases.pays(dataclasses.replace(conv, **change), channels)
