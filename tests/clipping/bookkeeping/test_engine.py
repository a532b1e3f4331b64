"""The book-keeping engine against the vmap engine, on every loss of the zoo."""

import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import dp_ilg
from dp_ilg.base import PerExampleGrads
from dp_ilg.clipping.adding.sums import wide
from dp_ilg.clipping.engine_table import ENGINES
from dp_ilg.clipping.per_example import vmap_engine
from dp_ilg.geometry.layers import group, paths
from tests.helpers.agreement import (
    ENGINE,
    QUICK,
    Outcome,
    assert_agree,
    compare_briefly,
    compare_case,
    geometry_of,
    largest,
    norm_difference,
    relative,
)
from tests.helpers.models import CLIP_MODES, trees_close
from tests.whole.test_bad_input import sentence
from tests.zoo.cases import TWINS, ZOO
from tests.zoo.control import apply_clipped
from tests.zoo.core import BATCH, Case, readout

REPRESENTATIVE = [
    "dense_sequence",
    "wide_dense_sequence",
    "conv_bias",
    "wide_conv_few_outputs",
    "conv_grouped",
    "embedding_take",
    "tied_with_loss",
    "attention_causal",
    "scan_lstm",
    "linen_scan_stack",
]
LOW_PRECISION = sorted(name for name in ZOO if "bf16" in name or "float16" in name)
PRECISE = sorted(set(ZOO) - set(LOW_PRECISION))
WITHOUT_TWINS = [
    pytest.param(name, marks=pytest.mark.slow) if name in TWINS else name
    for name in PRECISE
]


# Every case of the zoo.
@pytest.mark.parametrize("name", WITHOUT_TWINS)
def test_equals_vmap_in_float32(name):
    case = ZOO[name]()
    compare_briefly(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRECISE)
def test_equals_vmap_in_float64(name):
    with jax.enable_x64(True):
        compare_case(ZOO[name]()._replace(excess=1e-10), tolerance=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRECISE)
def test_equals_vmap_in_float32_compiled_in_full(name):
    case = ZOO[name]()
    compare_case(case, "module", ("per_layer",))


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_low_precision_is_no_further_off_than_vmap(name):
    """Norms and a plain sum against the same loss without rounding, in float64."""
    case = ZOO[name]()
    found = {
        engine: raw(engine, case.loss, case.params, case.batch)
        for engine in ("vmap", ENGINE)
    }
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: v.astype(jnp.float64), (case.params, case.batch))
        truth = raw("vmap", case.exact or case.loss, *wide)
    errors = {engine: distances(truth, got) for engine, got in found.items()}
    for want, got in zip(errors["vmap"], errors[ENGINE], strict=True):
        assert got <= 1.5 * want + 5e-4, errors


def raw(engine: str, loss: Any, params: Any, batch: Any) -> tuple[Any, Any]:
    """Norms and the sum with fixed coefficients, unclipped."""
    groups = group(params, "leaf")

    def run(params: Any, batch: Any) -> tuple[Any, Any]:
        per_example = ENGINES[engine](loss, params, batch, groups)
        return per_example.norms, per_example.weighted_sum(jnp.linspace(0.5, 1, BATCH))

    return jax.jit(run)(params, batch)


def distances(want: tuple[Any, Any], got: tuple[Any, Any]) -> list[float]:
    """Relative distance of the norms and of every leaf of the sum."""
    pairs = zip(jax.tree.leaves(want[1]), jax.tree.leaves(got[1]), strict=True)
    sums = [relative(a, b, largest(a)) for a, b in pairs]
    return [norm_difference(want[0], got[0]), *sums]


# The comparison itself.
def tampered(change):
    """An engine that is wrong in the stated way."""

    def engine(loss_fn, params, batch, groups):
        true = vmap_engine(loss_fn, params, batch, groups)
        return change(true)

    return engine


def one_leaf_off(sums):
    with wide():
        return sums | {"b": sums["b"] * np.float64(1.001)}


TAMPERINGS = {
    "one norm too small": lambda e: e._replace(norms=e.norms.at[1, 0].mul(1 - 2e-5)),
    "examples turned round": lambda e: e._replace(
        weighted_sum=lambda c, s=None: e.weighted_sum(c[::-1], s)
    ),
    "one leaf off": lambda e: e._replace(
        weighted_sum=lambda c, s=None: one_leaf_off(e.weighted_sum(c, s))
    ),
    "padding counted": lambda e: e._replace(
        weighted_sum=lambda c, s=None: e.weighted_sum(c.at[3].set(1e-3), s)
    ),
}


@pytest.mark.parametrize("change", TAMPERINGS)
def test_the_comparison_rejects_a_wrong_engine(change, monkeypatch):
    monkeypatch.setitem(ENGINES, ENGINE, tampered(TAMPERINGS[change]))
    for compare in (compare_case, compare_briefly):
        with pytest.raises(AssertionError, match="engines differ"):
            compare(ZOO["dense_vector"]())


def test_the_comparison_accepts_the_right_engine(monkeypatch):
    monkeypatch.setitem(ENGINES, ENGINE, tampered(lambda e: PerExampleGrads(*e)))
    compare_case(ZOO["dense_vector"]()._replace(excess=0.0), tolerance=0.0)
    compare_briefly(ZOO["dense_vector"]())


# Groupings, modes, transformations.
def layerings(params: Any) -> dict[str, Any]:
    """Module, leaf, and every leaf cut into blocks along each of its axes."""
    by_axis: dict[str, list[Any]] = {}
    for path, leaf in paths(params):
        for axis, size in enumerate(leaf.shape):
            if size > 1:
                cut = dp_ilg.layers.blocks(
                    "/".join(path), axis=axis, edges=sorted({1, size - 1})
                )
                by_axis.setdefault(f"axis{axis}", []).append(cut)
    cuts = {name: dp_ilg.layers.by_leaf(*cut) for name, cut in by_axis.items()}
    frozen = "/".join(paths(params)[0][0])
    cuts["frozen"] = dp_ilg.layers.by_leaf(frozen=[frozen])
    if len(paths(params)) == 1:
        del cuts["frozen"]
    return {"module": "module", "leaf": "leaf"} | cuts


GROUPINGS = [
    (name, layers)
    for name in REPRESENTATIVE
    for layers in layerings(ZOO[name]().params)
]


@pytest.mark.slow
@pytest.mark.parametrize("name, layers", GROUPINGS)
def test_every_grouping_and_mode(name, layers):
    case = ZOO[name]()
    with jax.enable_x64(True):
        wide = ZOO[name]()._replace(excess=1e-10)
        compare_case(wide, layerings(wide.params)[layers], tuple(CLIP_MODES), 1e-10)
    case = case._replace(excess=2e-5)  # single rows of attention nearly cancel
    compare_case(case, layerings(case.params)[layers], tuple(CLIP_MODES), options=QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_random_layerings_of_a_fused_kernel(seed):
    """Cuts at random places along a random axis, several leaves in one group."""
    rng = np.random.default_rng(seed)
    case = ZOO["attention_fused"]()
    axis = int(rng.integers(2))
    edges = sorted({int(e) for e in rng.integers(1, 6, 3)})
    cuts = [dp_ilg.layers.blocks(path, axis=axis, edges=edges) for path in ("qkv", "o")]
    name_of = [lambda path: "all", "/".join][seed % 2]
    for some in (cuts, cuts[:1], cuts[1:]):
        compare_case(case, dp_ilg.layers.by_path(name_of, *some), options=QUICK)


def grad_fn_of(case: Case, bound: float = 3.0, **options: Any) -> Any:
    return dp_ilg.clipped_grad(case.loss, l2_clip_norm=bound, engine=ENGINE, **options)


def test_the_seam_runs_the_engine_and_explains_it():
    case = ZOO["dense_sequence"]()
    geometry = geometry_of(case.params)
    padding = jnp.arange(BATCH) % 4 == 3
    found = [
        jax.jit(dp_ilg.clipped_grad(case.loss, l2_clip_norm=3.0, engine=engine))(
            case.params, case.batch, geometry=geometry, is_padding_example=padding
        )
        for engine in ("vmap", ENGINE)
    ]
    trees_close(found[0].gradients, found[1].gradients, rtol=2e-6)
    trees_close(found[0].layer_shares, found[1].layer_shares, rtol=2e-6)
    rows = grad_fn_of(case).explain(case.params, case.batch)
    assert [row.leaf for row in rows] == [leaf.path for leaf in geometry.groups.leaves]
    assert all(row.path and row.why and row.bytes >= 0 for row in rows)


def unjitted(case: Case, geometry: Any) -> Any:
    return grad_fn_of(case)(case.params, case.batch, geometry=geometry)


def inside_scan(case: Case, geometry: Any) -> Any:
    """The first of two identical steps of a scan."""
    twice = jax.tree.map(lambda v: jnp.stack([v, v]), case.batch)

    def step(_: Any, batch: Any) -> Any:
        return None, grad_fn_of(case)(case.params, batch, geometry=geometry)

    out = jax.jit(lambda b: jax.lax.scan(step, None, b)[1])(twice)
    return jax.tree.map(lambda v: v[1], out)


def under_checkpoint(case: Case, geometry: Any) -> Any:
    run = lambda p, b: grad_fn_of(case)(p, b, geometry=geometry)  # noqa: E731
    return jax.jit(jax.checkpoint(run))(case.params, case.batch)


def under_vmap(case: Case, geometry: Any) -> Any:
    """The second of two models in an ensemble."""
    two = jax.tree.map(lambda v: jnp.stack([v * 0.5, v]), case.params)
    run = lambda p: grad_fn_of(case)(p, case.batch, geometry=geometry)  # noqa: E731
    return jax.tree.map(lambda v: v[1], jax.jit(jax.vmap(run))(two))


def in_microbatches(size: int) -> Any:
    def run(case: Case, geometry: Any) -> Any:
        grad_fn = jax.jit(grad_fn_of(case, microbatch_size=size))
        return grad_fn(case.params, case.batch, geometry=geometry)

    return run


WAYS = {
    "unjitted": unjitted,
    "scan": inside_scan,
    "checkpoint": under_checkpoint,
    "vmap": under_vmap,
    "microbatch 1": in_microbatches(1),
    "microbatch 2": in_microbatches(2),
    "microbatch 3": in_microbatches(3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_every_way_to_call_it(name):
    case = ZOO[name]()
    geometry = geometry_of(case.params)
    reference = dp_ilg.clipped_grad(case.loss, l2_clip_norm=3.0, engine="vmap")
    want = jax.jit(reference)(case.params, case.batch, geometry=geometry)
    for way, run in WAYS.items():
        got = run(case, geometry)
        assert_agree(outcome(want), outcome(got), 5e-6, way)


def outcome(clipped: Any) -> Outcome:
    """A `ClippedGrad` as an `Outcome` without norms."""
    return Outcome(np.ones((1, 1)), clipped.gradients, clipped.layer_shares)


def loss_around(frozen: Any) -> Any:
    """A loss that closes over an array in every kind of inner program."""

    def loss(p: Any, x: Any) -> Any:
        x = jnp.tanh(x @ (frozen + p["a"] @ p["b"]))
        x = jax.lax.scan(lambda h, v: (jnp.tanh(h @ frozen + v @ p["w"]), h), x[0], x)[
            1
        ]
        x = jax.checkpoint(lambda v: jnp.tanh(v @ frozen) @ (frozen[0, 0] * p["w"]))(x)
        x = jax.lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x @ frozen)
        return readout(apply_clipped(lambda w, v: v @ w @ frozen, p["w"], x))

    return loss


def closed_over(engine: str) -> Any:
    """Two such losses at once by vmap, and one after the other by scan."""
    values = {n: np.sin(np.arange(1.0, 17.0) * k) for k, n in enumerate("abw", 1)}
    params = {n: np.float32(v).reshape(4, 4) for n, v in values.items()}
    geometry = geometry_of(params)
    batch = np.cos(np.arange(60, dtype=np.float32)).reshape(BATCH, 3, 4)

    def run(frozen: Any) -> Any:
        loss = loss_around(frozen)
        grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=3.0, engine=engine)
        return grad_fn(params, batch, geometry=geometry)

    def both(frozen: Any) -> Any:
        in_scan = jax.lax.scan(lambda c, f: (c, run(f)), 0, frozen)[1]
        return outcome(jax.vmap(run)(frozen)), outcome(in_scan)

    return jax.jit(both)(np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 4, 4))


@pytest.mark.slow
def test_a_loss_may_close_over_traced_values():
    for want, got in zip(closed_over("vmap"), closed_over(ENGINE), strict=True):
        assert_agree(want, got, 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_float32_where_64_bits_are_allowed(name):
    case = ZOO[name]()
    with jax.enable_x64(True):
        compare_case(case)


SHARDED = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import dp_ilg
from tests.helpers.agreement import ENGINE, differences, geometry_of
from tests.clipping.bookkeeping.test_engine import outcome
from tests.zoo.cases import ZOO

mesh = Mesh(np.array(jax.devices()), ("data",))
found = {"devices": jax.device_count()}
for name in json.loads(sys.argv[1]):
    case = ZOO[name]()
    geometry = geometry_of(case.params)
    batch = jax.tree.map(lambda v: jnp.concatenate([v, v, v, v])[:16], case.batch)
    rows = jax.device_put(batch, NamedSharding(mesh, P("data")))
    params = jax.device_put(case.params, NamedSharding(mesh, P()))
    run = lambda engine: jax.jit(
        dp_ilg.clipped_grad(case.loss, l2_clip_norm=3.0, engine=engine))
    want = run("vmap")(case.params, batch, geometry=geometry)
    got = run(ENGINE)(params, rows, geometry=geometry)
    found[name] = max(differences(outcome(want), outcome(got)).values())
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_batch_sharded_over_eight_devices():
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, json.dumps(REPRESENTATIVE)],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
            "JAX_PLATFORMS": "cpu",
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found.pop("devices") == 8
    assert all(error <= 5e-6 for error in found.values()), found


# An example that is not finite (law: zero is absent).
def scaled_by_data(case: Case) -> Case:
    """The same loss, times a number of the example: where poison can go in."""
    factor = jnp.ones(BATCH)
    return case._replace(
        loss=lambda p, x: case.loss(p, x[0]) * x[1], batch=(case.batch, factor)
    )


def poisoned(batch: Any, row: int, value: float, every: bool) -> Any:
    """A batch whose row `row` holds `value` in each (or the first) float entry."""

    def poison(x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        place = row if every else (row,) + (0,) * (x.ndim - 1)
        return x.at[place].set(value)

    return jax.tree.map(poison, batch)


@pytest.mark.slow
@pytest.mark.parametrize("every", [True, False], ids=["all entries", "one entry"])
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_a_bad_example_removes_itself_only(name, every):
    case = scaled_by_data(ZOO[name]())
    geometry = geometry_of(case.params)
    grad_fn = jax.jit(grad_fn_of(case))
    engine = jax.jit(
        lambda p, b: ENGINES[ENGINE](case.loss, p, b, geometry.groups).norms
    )
    others = np.arange(BATCH) != 2
    clean = np.asarray(engine(case.params, case.batch))
    absent = jnp.asarray(~others)
    want = grad_fn(
        case.params, case.batch, geometry=geometry, is_padding_example=absent
    )
    for value in (np.nan, np.inf, -np.inf):
        batch = poisoned(case.batch, 2, value, every)
        norms = np.asarray(engine(case.params, batch))
        assert not np.all(np.isfinite(norms[2])), value
        np.testing.assert_allclose(norms[others], clean[others], rtol=2e-6)
        got = grad_fn(case.params, batch, geometry=geometry)
        assert_agree(outcome(want), outcome(got), 2e-6, str(value))
        padded = grad_fn(
            case.params, batch, geometry=geometry, is_padding_example=absent
        )
        assert_agree(outcome(want), outcome(padded), 2e-6, f"{value} as padding")


def test_a_bad_example_of_a_dense_layer_removes_itself_only():
    case = ZOO["dense_vector"]()
    batch = case.batch.at[2, 3].set(jnp.nan)
    geometry, mask = geometry_of(case.params), jnp.arange(BATCH) == 2
    grad_fn = jax.jit(grad_fn_of(case), compiler_options=QUICK)
    none = jnp.zeros(BATCH, bool)
    got = grad_fn(case.params, batch, geometry=geometry, is_padding_example=none)
    want = grad_fn(case.params, case.batch, geometry=geometry, is_padding_example=mask)
    assert_agree(outcome(want), outcome(got), 2e-6)


# Bad input.
def printing(p, x):
    jax.debug.print("{}", x[0])
    return readout(x @ p["w"])


def printing_in_a_scan(p, x):
    def step(h, v):
        jax.debug.print("{}", h[0])
        return jnp.tanh(v @ p["w"]), None

    return readout(jax.lax.scan(step, jnp.zeros(4), x)[0])


def printing_backwards(p, x):
    @jax.custom_vjp
    def double(v):
        return 2 * v

    def pull(_, cotangent):
        jax.debug.print("{}", cotangent)
        return (2 * cotangent,)

    double.defvjp(lambda v: (2 * v, None), pull)
    return readout(double(x @ p["w"]))


def calling_back(ordered):
    def loss(p, x):
        io_callback(lambda v: None, None, x[0], ordered=ordered)
        return readout(x @ p["w"])

    return loss


def printing_in_a_branch(p, x):
    def branch():
        jax.debug.callback(lambda v: None, x[0])
        return x @ p["w"]

    return readout(jax.lax.cond(x[0, 0] > 0, branch, lambda: 0.5 * (x @ p["w"])))


def printing_in_a_tangent(p, x):
    @jax.custom_jvp
    def double(v):
        return 2 * v

    @double.defjvp
    def _(values, tangents):
        jax.debug.print("{}", values[0])
        return double(*values), 2 * tangents[0]

    return readout(double(x @ p["w"]))


def centred(v):
    return v - np.mean(v, axis=0)


def batched_on_the_host(p, x):
    kind = jax.ShapeDtypeStruct(x.shape, x.dtype)
    seen = jax.pure_callback(centred, kind, x, vmap_method="broadcast_all")
    return readout(seen @ p["w"])


def batched_by_a_rule(p, x):
    """Under vmap the backward pass takes the other examples' mean off."""

    @jax.custom_batching.custom_vmap
    def same(v):
        return v

    same.def_vmap(lambda size, batched, v: (v - jnp.mean(v, axis=0), True))

    @jax.custom_vjp
    def mixed(v):
        return v

    mixed.defvjp(lambda v: (v, None), lambda _, cotangent: (same(cotangent),))
    return readout(mixed(x @ p["w"]))


BATCHED = {
    "pure_callback": batched_on_the_host,
    "custom_vmap": batched_by_a_rule,
}
IMPURE = {
    "print in a tangent": printing_in_a_tangent,
    "print": printing,
    "print in a scan": printing_in_a_scan,
    "print in a branch": printing_in_a_branch,
    "print under jit": jax.jit(printing),
    "print in a backward pass": printing_backwards,
    "io_callback": calling_back(False),
    "ordered io_callback": calling_back(True),
}


@pytest.mark.parametrize("name", IMPURE)
def test_a_loss_with_side_effects_is_refused(name):
    case = Case(IMPURE[name], {"w": jnp.ones((5, 4))}, jnp.ones((BATCH, 3, 5)))
    with pytest.raises(ValueError) as caught:
        grad_fn_of(case)(case.params, case.batch, geometry=geometry_of(case.params))
    sentence(caught)
    with pytest.raises(ValueError, match="effects"):
        grad_fn_of(case).explain(case.params, case.batch)


@pytest.mark.parametrize("name", BATCHED)
def test_a_loss_that_can_see_the_batch_is_refused(name):
    case = Case(BATCHED[name], {"w": jnp.ones((5, 4))}, jnp.ones((BATCH, 3, 5)))
    with pytest.raises(ValueError, match=name) as caught:
        grad_fn_of(case)(case.params, case.batch, geometry=geometry_of(case.params))
    sentence(caught)


@pytest.mark.parametrize(
    "labels, word",
    [
        (np.array(["cat"] * BATCH), "<U3"),
        (np.array(["2026-01-01"] * BATCH, "datetime64[D]"), "datetime64"),
        (np.array([None] * BATCH), "object"),
    ],
    ids=["strings", "dates", "objects"],
)
def test_a_batch_of_no_numbers_is_refused(labels, word):
    params = {"w": jnp.ones((5, 4))}
    grad_fn = dp_ilg.clipped_grad(
        lambda p, example: readout(example[0] @ p["w"]), l2_clip_norm=1.0
    )
    batch = (jnp.ones((BATCH, 3, 5)), labels)
    with pytest.raises(TypeError, match=word) as caught:
        grad_fn(params, batch, geometry=geometry_of(params))
    sentence(caught)


def test_a_missing_geometry_says_where_to_get_one():
    params = {"w": jnp.ones((5, 4))}
    grad_fn = dp_ilg.clipped_grad(lambda p, x: readout(x @ p["w"]), l2_clip_norm=1.0)
    with pytest.raises(TypeError, match="geometry is missing") as caught:
        grad_fn(params, jnp.ones((BATCH, 3, 5)))
    sentence(caught)


@pytest.mark.parametrize(
    "loss, words",
    [
        (lambda p, x: x @ p["w"], "one scalar"),
        (lambda p, x: (readout(x @ p["w"]), x), "one scalar"),
        (lambda p, x: readout(p["w"]), "ignores the example"),
        (lambda p, x: 0.0, "ignores the example"),
        (lambda p, x: jnp.argmax(x @ p["w"]), "int"),
        (lambda p, x: jnp.sum(x @ p["w"]) * (1 + 1j), "complex"),
    ],
    ids=["vector", "aux", "ignores", "constant", "integer", "complex"],
)
def test_bad_losses(loss, words):
    case = Case(loss, {"w": jnp.ones((5, 4))}, jnp.ones((BATCH, 3, 5)))
    geometry = geometry_of(case.params)
    with pytest.raises(ValueError, match=words) as caught:
        grad_fn_of(case)(case.params, case.batch, geometry=geometry)
    sentence(caught)


@pytest.mark.parametrize("bad", [-1.0, 0.0, jnp.inf, jnp.nan])
def test_a_traced_clip_norm_that_bounds_nothing_releases_nothing(bad):
    params, batch = {"w": jnp.ones((5, 4))}, jnp.ones((BATCH, 3, 5))

    @jax.jit
    def clipped(bound):
        grad_fn = dp_ilg.clipped_grad(
            lambda p, x: readout(x @ p["w"]), l2_clip_norm=bound
        )
        return grad_fn(params, batch, geometry=dp_ilg.Geometry.uniform(params))

    found = clipped(bad)
    assert jnp.isnan(found.l2_clip_norm) and jnp.isnan(found.gradients["w"]).all()
    assert jnp.isfinite(clipped(1.0).gradients["w"]).all()


def test_a_mapped_axis_outside_is_no_way_to_mix_examples():
    params, batch = {"w": jnp.ones(5)}, jnp.ones((2, BATCH, 5))
    loss = lambda p, x: jax.lax.pmean(jnp.sum(p["w"] * x), "batch")  # noqa: E731
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
    geometry = dp_ilg.Geometry.uniform(params)
    run = lambda rows: grad_fn(params, rows, geometry=geometry)  # noqa: E731
    with pytest.raises(ValueError, match="GroupNorm") as caught:
        jax.vmap(run, axis_name="batch")(batch)
    sentence(caught)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.bool_])
def test_bad_parameters(dtype):
    good = {"w": jnp.ones((5, 4))}
    bad = {"w": jnp.ones((5, 4), dtype)}
    loss = lambda p, x: readout(jnp.real(x @ p["w"]))  # noqa: E731
    grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0, engine=ENGINE)
    with pytest.raises(TypeError, match=jnp.dtype(dtype).name) as caught:
        grad_fn(bad, jnp.ones((BATCH, 3, 5)), geometry=geometry_of(good))
    sentence(caught)
