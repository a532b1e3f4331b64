"""Random losses: a seed becomes the source of a small JAX function and its data.

A program is Python text, so a failure prints what it ran. Each line draws an
operation and the parameters it reads; a parameter is a new leaf, an old one, or an
old one seen through a slice, transpose, reshape, factor or nonlinear function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import dp_ilg
from dp_ilg.clipping.clip import CLIP_MODES
from dp_ilg.geometry.layers import paths
from tests.zoo.control import own_dense, reversed_gradient
from tests.zoo.core import floats, readout

VOCABULARY = 5
Shape = tuple[int, ...]


class Program(NamedTuple):
    """A random loss with everything a comparison needs.

    Attributes:
        source: the text of ``loss(p, example)``.
        loss: the compiled function.
        params: its parameters.
        batch: ``(x [batch, tokens, features], ids [batch, tokens])``.
        geometry: random groups and weights.
        clip_mode: a name of `dp_ilg.clipping.clip.CLIP_MODES`.
    """

    source: str
    loss: Callable[[Any, Any], Any]
    params: dict[str, Any]
    batch: Any
    geometry: dp_ilg.Geometry
    clip_mode: str


class Writer:
    """The program so far: its lines, the shapes of its values and of its leaves."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.leaves: dict[str, Shape] = {}
        self.values: dict[str, Shape] = {}
        self.lines: list[str] = []

    def pick(self, options: Any) -> Any:
        """One of a sequence."""
        return options[int(self.rng.integers(len(options)))]

    def size(self) -> int:
        """A small dimension, often the same."""
        return self.pick([2, 3, 3, 4])

    def leaf(self, shape: Shape) -> str:
        """A leaf of this shape: an old one half of the time, if there is one."""
        old = [name for name, s in self.leaves.items() if s == shape]
        if old and self.rng.random() < 0.5:
            return f'p["{self.pick(old)}"]'
        name = f"w{len(self.leaves)}"
        self.leaves[name] = shape
        return f'p["{name}"]'

    def weight(self, shape: Shape, depth: int = 0) -> str:
        """An expression of this shape that depends on parameters only."""
        if depth < 2 and self.rng.random() < 0.5:
            text = self.pick(VIEWS)(self, shape, depth + 1)
            if text is not None:
                return text
        return self.leaf(shape)

    def value(self) -> tuple[str, Shape]:
        """An earlier value, the last three more often."""
        names = list(self.values)
        name = self.pick(names[-3:] if self.rng.random() < 0.7 else names)
        return name, self.values[name]

    def write(self, text: str, shape: Shape) -> None:
        """Adds a line that makes a new value."""
        name = f"v{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        self.values[name] = shape


# Views: ways for an expression of a wanted shape to come from leaves.
def transposed(w: Writer, shape: Shape, depth: int) -> str | None:
    return f"{w.weight(shape[::-1], depth)}.T" if len(shape) == 2 else None


def sliced(w: Writer, shape: Shape, depth: int) -> str | None:
    """A slice of an old leaf that is large enough, or of a new one."""
    fits = [
        name
        for name, s in w.leaves.items()
        if len(s) == len(shape) and all(a >= b for a, b in zip(s, shape, strict=True))
    ]
    whole = tuple(n + int(w.rng.integers(3)) for n in shape)
    name = w.pick(fits) if fits and w.rng.random() < 0.6 else None
    text = f'p["{name}"]' if name else w.weight(whole, depth)
    whole = w.leaves[name] if name else whole
    starts = [int(w.rng.integers(a - b + 1)) for a, b in zip(whole, shape, strict=True)]
    cut = ", ".join(f"{a}:{a + b}" for a, b in zip(starts, shape, strict=True))
    return f"{text}[{cut}]"


def reshaped(w: Writer, shape: Shape, depth: int) -> str | None:
    """A leaf of the same number of entries, or a flat one."""
    count = math.prod(shape)
    fits = [n for n, s in w.leaves.items() if math.prod(s) == count and s != shape]
    text = f'p["{w.pick(fits)}"]' if fits else w.weight((count,), depth)
    return f"{text}.reshape({shape})"


def row_of_stack(w: Writer, shape: Shape, depth: int) -> str | None:
    """One entry of a stacked leaf."""
    return f"{w.weight((3, *shape), depth)}[{int(w.rng.integers(3))}]"


def scaled(w: Writer, shape: Shape, depth: int) -> str | None:
    return f"({w.pick(['0.5 *', '-', '-1.5 *', '3.0 *'])} {w.weight(shape, depth)})"


def nonlinear(w: Writer, shape: Shape, depth: int) -> str | None:
    name = w.pick(["jnp.tanh", "jax.nn.softplus", "jnp.sin", "unit"])
    return f"{name}({w.weight(shape, depth)})"


def product(w: Writer, shape: Shape, depth: int) -> str | None:
    if len(shape) != 2:
        return None
    a, b = w.weight((shape[0], 2), depth), w.weight((2, shape[1]), depth)
    return f"({a} @ {b})"


def total(w: Writer, shape: Shape, depth: int) -> str | None:
    return f"({w.weight(shape, depth)} + {w.weight(shape, depth)})"


def joined(w: Writer, shape: Shape, depth: int) -> str | None:
    """Two leaves concatenated along some axis."""
    axis = int(w.rng.integers(len(shape)))
    first = shape[axis] // 2
    a = w.weight((*shape[:axis], first, *shape[axis + 1 :]), depth)
    b = w.weight((*shape[:axis], shape[axis] - first, *shape[axis + 1 :]), depth)
    return f"jnp.concatenate([{a}, {b}], {axis})"


def turned(w: Writer, shape: Shape, depth: int) -> str | None:
    """Read backwards along some axis."""
    return f"jnp.flip({w.weight(shape, depth)}, {int(w.rng.integers(len(shape)))})"


def permuted(w: Writer, shape: Shape, depth: int) -> str | None:
    rows = [int(i) for i in w.rng.integers(shape[0], size=shape[0])]
    return f"{w.weight(shape, depth)}[jnp.array({rows}, int)]"


VIEWS = [
    transposed,
    sliced,
    reshaped,
    row_of_stack,
    scaled,
    nonlinear,
    product,
    total,
    joined,
    turned,
    permuted,
]


# Operations: each writes one line. A value is [tokens, features].
def op_dense(w: Writer) -> None:
    v, (t, d) = w.value()
    n = w.size()
    bias = w.pick(["", f" + {w.weight((n,))}"])
    w.write(f"{v} @ {w.weight((d, n))}{bias}", (t, n))


def op_dense_tanh(w: Writer) -> None:
    v, (t, d) = w.value()
    n = w.size()
    w.write(f"jnp.tanh({v} @ {w.weight((d, n))})", (t, n))


def op_dense_left(w: Writer) -> None:
    v, (t, d) = w.value()
    n = w.size()
    w.write(f"{w.weight((n, t))} @ {v}", (n, d))


def op_heads(w: Writer) -> None:
    v, (t, d) = w.value()
    n = w.size()
    rule = w.pick(["ti,hio->tho", "ti,hio->hto", "ti,oih->tho", "ti,iho->tho"])
    shape = {"h": 2, "i": d, "o": n}
    letters = rule.split(",")[1].split("->")[0]
    text = w.weight(tuple(shape[c] for c in letters))
    w.write(f'jnp.einsum("{rule}", {v}, {text}).reshape({t}, -1)', (t, 2 * n))


def op_weight_per_token(w: Writer) -> None:
    v, (t, d) = w.value()
    n = w.size()
    w.write(f'jnp.einsum("ti,tio->to", {v}, {w.weight((t, d, n))})', (t, n))


def op_conv(w: Writer) -> None:
    v, (t, d) = w.value()
    n, stride = w.size(), int(w.rng.integers(1, 3))
    text = f"conv({v}, {w.weight((3, d, n))}, {stride})"
    w.write(text, (-(-t // stride), n))


def op_embedding(w: Writer) -> None:
    n = w.size()
    w.write(f"{w.weight((VOCABULARY, n))}[ids]", (w.values["x"][0], n))


def op_tied(w: Writer) -> None:
    v, (t, d) = w.value()
    w.write(f"{v} @ {w.weight((VOCABULARY, d))}.T", (t, VOCABULARY))


def op_bias(w: Writer) -> None:
    v, (t, d) = w.value()
    shape = w.pick([(d,), (t, d), (t, 1), (1,)])
    w.write(f"{v} + {w.weight(shape)}", (t, d))


def op_scale(w: Writer) -> None:
    v, (t, d) = w.value()
    shape = w.pick([(d,), (t, d), (1, d)])
    w.write(f"{v} * {w.weight(shape)}", (t, d))


def op_elementwise(w: Writer) -> None:
    v, shape = w.value()
    name = w.pick(["jnp.tanh", "jnp.sin", "jax.nn.gelu", "jax.nn.relu", "jnp.abs"])
    w.write(f"{name}({v})", shape)


def op_norm(w: Writer) -> None:
    v, (t, d) = w.value()
    w.write(f"norm({v}) * {w.weight((d,))}", (t, d))


def op_residual(w: Writer) -> None:
    v, shape = w.value()
    like = [n for n, s in w.values.items() if s == shape]
    w.write(f"{v} {w.pick(['+', '-', '*'])} {w.pick(like)}", shape)


def op_layout(w: Writer) -> None:
    v, (t, d) = w.value()
    text, shape = w.pick(
        [
            (f"{v}.T", (d, t)),
            (f"{v}[1:]", (t - 1, d)),
            (f"{v}[:, :2]", (t, 2)),
            (f"{v}[::-1]", (t, d)),
            (f"{v}.reshape({d}, {t})", (d, t)),
            (f"jnp.sort({v}, axis=0)", (t, d)),
            (f"jnp.cumsum({v}, axis=0)", (t, d)),
            (f"jnp.concatenate([{v}, 0.5 * {v}])", (2 * t, d)),
        ]
    )
    if min(shape) > 0 and max(shape) < 12:
        w.write(text, shape)


def op_attention(w: Writer) -> None:
    v, (t, d) = w.value()
    q, k, n = w.weight((d, 3)), w.weight((d, 3)), w.size()
    scores = f"jax.nn.softmax(({v} @ {q}) @ ({v} @ {k}).T)"
    w.write(f"{scores} @ ({v} @ {w.weight((d, n))})", (t, n))


def op_recurrent(w: Writer) -> None:
    v, (t, d) = w.value()
    n = w.size()
    body = f"jnp.tanh(h @ {w.weight((n, n))} + a @ {w.weight((d, n))})"
    option = w.pick(["", ", reverse=True"])
    run = f"lax.scan(lambda h, a: ({body}, h), jnp.zeros({n}), {v}{option})"
    w.write(f"{run}[1]", (t, n))


def op_stack(w: Writer) -> None:
    v, (t, d) = w.value()
    body = f"h + jnp.tanh(h @ s + {w.weight((d,))})"
    body = w.pick([body, f"jax.checkpoint(lambda h: {body})(h)"])
    stack = w.weight((2, d, d))
    w.write(f"lax.scan(lambda h, s: ({body}, None), {v}, {stack})[0]", (t, d))


def op_cond(w: Writer) -> None:
    v, (t, d) = w.value()
    a, b = w.weight((d, d)), w.weight((d,))
    yes, no = f"lambda: jnp.tanh({v} @ {a})", f"lambda: {v} * {b}"
    w.write(f"lax.cond(jnp.sum({v}) > 0, {yes}, {no})", (t, d))


def op_wrapped(w: Writer) -> None:
    v, (t, d) = w.value()
    n = w.size()
    body = f"lambda a: jnp.tanh(a @ {w.weight((d, n))})"
    name = w.pick(["jax.checkpoint", "jax.jit", "jax.vmap", "mapped"])
    w.write(f"{name}({body})({v})", (t, n))


def op_custom(w: Writer) -> None:
    v, (t, d) = w.value()
    n = w.size()
    text = w.weight((d, n))
    text = w.pick([f"own_dense({text}, {v})", f"reversed_gradient({v} @ {text})"])
    w.write(text, (t, n))


def op_chosen_by_data(w: Writer) -> None:
    v, (t, d) = w.value()
    n = w.size()
    w.write(f"{v} @ {w.weight((VOCABULARY, d, n))}[ids[0]]", (t, n))


def op_regulariser(w: Writer) -> None:
    n = w.size()
    w.write(f"0.1 * jnp.sum({w.weight((n, n))} ** 2).reshape(1, 1)", (1, 1))


OPERATIONS = [value for name, value in globals().items() if name.startswith("op_")]


# What programs may call.
def conv(v: Any, kernel: Any, stride: int) -> Any:
    """A one-dimensional convolution of [tokens, features]."""
    layout = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(
        v[None], kernel, (stride,), "SAME", dimension_numbers=layout
    )[0]


def norm(v: Any) -> Any:
    """Root-mean-square normalisation of the last axis."""
    return v * lax.rsqrt(jnp.mean(v**2, -1, keepdims=True) + 0.1)


def unit(v: Any) -> Any:
    """Divided by one plus its norm."""
    return v / (1 + jnp.linalg.norm(v))


def mapped(function: Callable) -> Callable:
    """``lax.map`` in the manner of ``jax.vmap``."""
    return lambda v: lax.map(function, v)


NAMES = dict(
    jax=jax,
    jnp=jnp,
    lax=lax,
    conv=conv,
    norm=norm,
    unit=unit,
    mapped=mapped,
    own_dense=own_dense,
    reversed_gradient=reversed_gradient,
    readout=readout,
)


def program(seed: int, most_lines: int) -> Program:
    """The program of a seed; the same in every process.

    Args:
        seed: any whole number.
        most_lines: programs have one to this many operations.

    Returns:
        The `Program`, in the float type JAX works in.
    """
    rng = np.random.default_rng(seed)
    writer = Writer(rng)
    writer.values["x"] = (writer.size(), writer.size())
    lines = int(rng.integers(1, most_lines + 1))
    while len(writer.lines) < lines or not writer.leaves:
        writer.pick(OPERATIONS)(writer)
    source = source_of(writer)
    names = dict(NAMES)
    exec(source, names)  # noqa: S102
    loss: Any = names["loss"]
    params = {n: floats(0.6 * rng.normal(size=s)) for n, s in writer.leaves.items()}
    mode = writer.pick(sorted(CLIP_MODES))
    batch = examples(rng, writer.values["x"])
    return Program(source, loss, params, batch, random_geometry(rng, params), mode)


def source_of(writer: Writer) -> str:
    """The text of the loss: every value counts, so that none is dead."""
    outputs = ", ".join([*writer.values])
    body = ["x, ids = example", *writer.lines, f"return readout(({outputs},))"]
    return "\n    ".join(["def loss(p, example):", *body]) + "\n"


def examples(rng: np.random.Generator, shape: Shape) -> Any:
    """A batch of three to five examples."""
    size = int(rng.integers(3, 6))
    x = rng.normal(size=(size, *shape)) * rng.lognormal(sigma=0.5, size=(size, 1, 1))
    ids = rng.integers(-VOCABULARY, VOCABULARY, (size, shape[0]))
    return floats(x), jnp.asarray(ids)


def random_geometry(rng: np.random.Generator, params: Any) -> dp_ilg.Geometry:
    """Random groups and weights: leaves, blocks, shared groups, frozen leaves."""
    cuts = [cut for path, x in paths(params) for cut in random_cut(rng, path[0], x)]
    frozen = [n for n in params if rng.random() < 0.1][: len(params) - 1]
    cuts = [cut for cut in cuts if cut.path not in frozen]
    few = int(rng.integers(1, 4))
    kind = int(rng.integers(3))
    if kind == 0:
        layers = dp_ilg.layers.by_leaf(*cuts, frozen=frozen)
    elif kind == 1:
        name_of = lambda path: f"group {int(path[0][1:]) % few}"  # noqa: E731
        layers = dp_ilg.layers.by_path(name_of, *cuts, frozen=frozen)
    else:
        layers = "module"
    names = dp_ilg.layers.group(params, layers).names
    weights = rng.lognormal(sigma=1.0, size=len(names)).tolist()
    return dp_ilg.Geometry.of(params, weights, layers)


def random_cut(rng: np.random.Generator, name: str, value: Any) -> list[Any]:
    """Blocks of a leaf along a random axis, or none."""
    axes = [a for a, n in enumerate(value.shape) if n > 1]
    if not axes or rng.random() < 0.5:
        return []
    axis = int(rng.choice(axes))
    inner = range(1, value.shape[axis])
    count = int(rng.integers(1, len(inner) + 1))
    edges = sorted(int(e) for e in rng.choice(list(inner), count, replace=False))
    return [dp_ilg.layers.blocks(name, axis=axis, edges=edges)]
