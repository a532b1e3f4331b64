"""Meshes of devices: every device takes its rows of a batch and its part of the rest.

A mesh has two axes. Parameters are copied ``replicas`` times, each copy cut into
``shards`` pieces; the batch is cut over all devices. Each device clips its own
examples and sums them; the sums are added up over the mesh, as gradients are in any
data-parallel training. Noise is drawn once for the whole parameter, each device its
own piece of it, and has the bits it has on one device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from dp_ilg.base import ClippedGrad, Example, Params
from dp_ilg.clipping.adding import devices
from dp_ilg.clipping.batches import batch_length
from dp_ilg.geometry import grid
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.noise.normal import sharded_draws
from dp_ilg.sampling.batch import opened

AXES = ("replicas", "shards")


class Shardings(NamedTuple):
    """Where the arrays of a step lie on a mesh.

    Attributes:
        params: like the parameters, a ``NamedSharding`` a leaf.
        state: like the optimizer's state.
        rows: that of batches and masks.

    Example:
        >>> at = Shardings.of({"w": np.zeros((4, 3))}, (), make_mesh(1, 1))
        >>> at.params["w"].is_fully_replicated
        True
    """

    params: Any
    state: Any
    rows: NamedSharding

    @classmethod
    def of(cls, params: Params, state: Any, mesh: Mesh) -> Shardings:
        """Places parameters, state and batches, given as arrays or shapes."""
        lying = param_shardings(params, mesh), state_shardings(state, params, mesh)
        return cls(*lying, row_sharding(mesh))

    def jit_options(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What ``jax.jit`` is told of the step, and of its part behind the sums."""
        out: dict[str, Any] = {"out_shardings": (self.params, self.state)}
        rows = (self.rows, self.rows)
        return {"in_shardings": (self.params, self.state, *rows), **out}, out

    def draws(self) -> Any:
        """A context in which noise is drawn where the parameters lie."""
        leaves = jax.tree.leaves(self.params)
        return sharded_draws([s if len(s.spec) else None for s in leaves])


def make_mesh(replicas: int, shards: int) -> Mesh:
    """Arranges devices: copies of the parameters, and pieces of each copy.

    Args:
        replicas: how many copies there are.
        shards: into how many pieces a copy is cut.

    Returns:
        A mesh with the axes `AXES`, over the first ``replicas * shards`` devices.

    Raises:
        ValueError: if there are fewer devices, or devices of another process would
            be left out.

    Example:
        >>> dict(make_mesh(1, 1).shape)
        {'replicas': 1, 'shards': 1}
        >>> make_mesh(1, 4096)
        Traceback (most recent call last):
        ValueError: 1 replicas of 4096 shards need 4096 devices, but there are ...
    """
    devices, wanted = jax.devices(), replicas * shards
    if wanted > len(devices):
        raise ValueError(
            f"{replicas} replicas of {shards} shards need {wanted} devices, but there "
            f"are {len(devices)}; ask for fewer, or on a CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted}."
        )
    if wanted < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"{replicas} replicas of {shards} shards use {wanted} of the processes' "
            f"{len(devices)} devices; several processes must use all of them."
        )
    return Mesh(np.array(devices[:wanted]).reshape(replicas, shards), AXES)


def cut_axis(shape: tuple[int, ...], shards: int) -> int | None:
    """Which axis of a parameter is cut: the longest that divides evenly.

    Args:
        shape: of the parameter.
        shards: number of pieces.

    Returns:
        The axis, the first of the longest; None if none divides, or there is one
        piece only: then every device holds all of it.

    Example:
        >>> cut_axis((3, 16, 8), 4), cut_axis((3, 5), 4), cut_axis((8,), 1)
        (1, None, None)
    """
    fits = [k for k, n in enumerate(shape) if n and n % shards == 0]
    return max(fits, key=lambda k: (shape[k], -k)) if fits and shards > 1 else None


def param_shardings(params: Params, mesh: Mesh) -> Any:
    """Where the pieces of each parameter lie.

    Args:
        params: arrays, or their shapes.
        mesh: from `make_mesh`.

    Returns:
        The tree with a ``NamedSharding`` in place of every leaf.

    Example:
        >>> mesh = make_mesh(1, 1)
        >>> param_shardings({"w": np.zeros((4, 3))}, mesh)["w"].is_fully_replicated
        True
    """
    return jax.tree.map(lambda x: NamedSharding(mesh, _spec(np.shape(x), mesh)), params)


def state_shardings(state: Any, params: Params, mesh: Mesh) -> Any:
    """Where an optimizer's state lies: what is shaped like the parameters, as they.

    Args:
        state: an optimizer's state, or its shapes; any part of it with the structure
            and shapes of `params` (moments, averages) is placed as they are, with one
            axis more (the memory of correlated noise) too.
        params: the parameters, or their shapes.
        mesh: from `make_mesh`.

    Returns:
        The state with a ``NamedSharding`` in place of every leaf; keys, steps and
        geometry are held by all.

    Example:
        >>> import optax
        >>> params, mesh = {"w": np.zeros((4, 3))}, make_mesh(1, 1)
        >>> state = optax.sgd(1.0, momentum=0.9).init(params)
        >>> state_shardings(state, params, mesh)[0].trace["w"].is_fully_replicated
        True
    """
    structure, shapes = jax.tree.structure(params), _shapes(params)

    def axes(part: Any) -> int | None:
        """How many axes stand before the parameters' own; None if unlike them."""
        found = _shapes(part) if jax.tree.structure(part) == structure else None
        cut = [[shape[lead:] for shape in found or []] for lead in (0, 1)]
        return cut.index(shapes) if shapes in cut else None

    def placed(part: Any) -> Any:
        lead = axes(part)
        if lead is None:
            return jax.tree.map(lambda x: NamedSharding(mesh, P()), part)
        lying = [P(*[None] * lead, *s) if (s := _spec(x, mesh)) else s for x in shapes]
        return jax.tree.unflatten(structure, [NamedSharding(mesh, s) for s in lying])

    return jax.tree.map(placed, state, is_leaf=lambda x: axes(x) is not None)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Where the rows of a batch lie: cut over all devices, in their order.

    Args:
        mesh: from `make_mesh`.

    Returns:
        The sharding, for arrays whose first axis is the batch.

    Example:
        >>> row_sharding(make_mesh(1, 1)).spec == P(AXES)
        True
    """
    return NamedSharding(mesh, P(AXES))


def spread(grad_fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A clipped gradient whose examples lie on the devices of a mesh.

    Every device runs `grad_fn` on its own rows, with its own micro-batches, and the
    sums are added up exactly, so that neither the number of devices nor their order
    changes a bit: a float64 and an int32 number a parameter, three times the bytes of
    ordinary data-parallel training, plus layer shares and counts. Sums of parameters
    that are cut are added up where their piece lies.

    Args:
        grad_fn: what `dp_ilg.clipped_grad` returned, with any engine.
        mesh: from `make_mesh`.

    Returns:
        ``(params, batch, *, geometry, is_padding_example) -> ClippedGrad``, to be
        called under ``jit`` with as many rows as the devices can share evenly.

    Raises:
        ValueError: when called with rows that cannot be shared evenly.

    Privacy: the sum of the devices' clipped sums: its sensitivity is that of one, for
    every example lies on one device. Nothing is noised yet.

    Example:
        >>> import dp_ilg, jax.numpy as jnp
        >>> params = {"w": jnp.zeros(2)}
        >>> loss = lambda p, x: jnp.sum(p["w"] * x)
        >>> grad_fn = dp_ilg.clipped_grad(loss, l2_clip_norm=1.0)
        >>> grad_fn = spread(grad_fn, make_mesh(1, 1))
        >>> geometry = dp_ilg.Geometry.uniform(params)
        >>> rows = jnp.array([[3.0, 4.0], [0.0, 0.5]]), jnp.array([False, False])
        >>> found = jax.jit(lambda x, m: grad_fn(
        ...     params, x, geometry=geometry, is_padding_example=m))(*rows)
        >>> [round(float(x), 3) for x in found.gradients["w"]]
        [0.6, 1.3]
    """

    def on_mesh(
        params: Params,
        batch: Example,
        *,
        geometry: Geometry,
        is_padding_example: Any = None,
    ) -> ClippedGrad:
        batch, mask = opened(batch, is_padding_example)
        mask = jnp.zeros(batch_length(batch), bool) if mask is None else mask
        _check_rows(len(mask), mesh)
        leaves, treedef = jax.tree.flatten(params)
        leaf_specs = [_spec(jnp.shape(x), mesh) for x in leaves]

        def local(params: Any, geometry: Any, batch: Any, mask: Any) -> Any:
            own = grad_fn(params, batch, geometry=geometry, is_padding_example=mask)
            steps = grid.leaf_steps(geometry, own.l2_clip_norm)
            sums = zip(grid.of_clipped(own), steps, leaf_specs, strict=True)
            pairs = [
                devices.reduced(
                    parts, step, functools.partial(_added, spec=spec, mesh=mesh)
                )
                for parts, step, spec in sums
            ]
            everywhere = functools.partial(lax.psum, axis_name=AXES)
            small = {
                "fits": everywhere(own.fits),
                "metrics": own.metrics and own.metrics.reduced(everywhere),
            } | devices.reduced_shares(own, everywhere)
            return pairs, small, own.l2_clip_norm, own.geometry.facts

        share = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), P(), P(AXES), P(AXES)),
            out_specs=([(spec, spec) for spec in leaf_specs], P(), P(), P()),
            check_vma=False,
        )
        pairs, small, bound, said = share(params, geometry, batch, mask)
        geometry = geometry.saying(said)
        sums = devices.settled(pairs, treedef, geometry, bound)
        return ClippedGrad(**sums, **small, geometry=geometry, l2_clip_norm=bound)

    return on_mesh


def whole(tree: Any) -> Any:
    """Brings every array of a tree to one device of this process, whole.

    Args:
        tree: arrays on one mesh, or ordinary ones.

    Returns:
        The same arrays with the same bits. Where pieces lie with other processes, all
        of them must call this together.

    Example:
        >>> whole({"w": jax.numpy.ones(2)})["w"].tolist()
        [1.0, 1.0]
    """
    cut = [x for x in jax.tree.leaves(tree) if not x.is_fully_replicated]
    if cut:
        everywhere = NamedSharding(cut[0].sharding.mesh, P())
        tree = jax.jit(lambda t: t, out_shardings=everywhere)(tree)
    return jax.tree.map(_own_copy, tree)


def placed(tree: Any, shardings: Any) -> Any:
    """Lays arrays of this process out on a mesh.

    Args:
        tree: arrays, typed PRNG keys too, the same in every process.
        shardings: a tree of ``NamedSharding`` with the same structure.

    Returns:
        Arrays of the whole mesh, each process holding its own pieces.

    Example:
        >>> at = row_sharding(make_mesh(1, 1))
        >>> placed({"w": np.ones(2)}, {"w": at})["w"].sharding == at
        True
    """
    return jax.tree.map(_lay, tree, shardings)


def _spec(shape: tuple[int, ...], mesh: Mesh) -> P:
    axis = cut_axis(shape, mesh.shape["shards"])
    return P() if axis is None else P(*[None] * axis, "shards")


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [tuple(np.shape(x)) for x in jax.tree.leaves(tree)]


def _added(value: Array, *, spec: P, mesh: Mesh) -> Array:
    """The sum over the mesh: all of it, or of a parameter that is cut its piece."""
    if not spec:
        return lax.psum(value, AXES)
    axis = len(spec) - 1
    own = lax.psum_scatter(value, "shards", scatter_dimension=axis, tiled=True)
    return lax.psum(own, "replicas") if mesh.shape["replicas"] > 1 else own


def _check_rows(rows: int, mesh: Mesh) -> None:
    devices = math.prod(mesh.shape.values())
    if rows % devices:
        raise ValueError(
            f"The batch has {rows} rows, which {devices} devices cannot share evenly; "
            "fill it up with padding."
        )


def _own_copy(array: Any) -> Any:
    if not jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array.addressable_data(0)
    words = jax.random.key_data(array).addressable_data(0)
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(array))


def _lay(array: Any, sharding: NamedSharding) -> Any:
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        words = _lay(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(array))
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, sharding, lambda at: host[at])
