"""BatchNorm replaced by GroupNorm: a mended copy of a module, and the diff to apply.

BatchNorm in training mode computes each example's output from the whole batch, so that
no gradient is one example's own. GroupNorm normalises within the example.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, NamedTuple

from dp_ilg import validation
from dp_ilg.training.frameworks.modules import is_module

MOST_GROUPS = 32


class Change(NamedTuple):
    """One layer that is replaced.

    Attributes:
        path: where it is, as in ``model.blocks[0].norm``.
        before: what stands there, as code.
        after: what is to stand there, as code.
    """

    path: str
    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class Mended:
    """A module without BatchNorm in training mode.

    Attributes:
        module: the mended copy; the module itself where nothing was to be mended; None
            for a linen module, of which only the source can be changed.
        changes: what was replaced, or is to be.
    """

    module: Any
    changes: tuple[Change, ...]

    @property
    def diff(self) -> str:
        """The changes as lines to apply to the source, ``-`` and ``+``; or nothing."""
        lines = [f"@ {c.path}\n- {c.before}\n+ {c.after}" for c in self.changes]
        return "\n".join(lines)


def mended(module: Any, *inputs: Any, most_groups: int = MOST_GROUPS) -> Mended:
    """Replaces every BatchNorm of a Flax module by a GroupNorm.

    Scale and bias are kept; running statistics are dropped. The number of groups is the
    largest up to `most_groups` that divides the channels.

    Args:
        module: an ``nnx.Module``; or a linen module, whose layers are code: nothing is
            replaced there, and the diff says what to write.
        *inputs: of a linen module: what ``init`` takes after the key, with a batch
            axis; only shapes are read.
        most_groups: the largest number of groups.

    Returns:
        A `Mended`; the module that was given is left as it is.

    Raises:
        TypeError: for anything but a Flax module, or a linen one without inputs.
        ValueError: for a BatchNorm over another axis than the last.

    Privacy: none by itself: it makes a model whose gradients are one example's own,
    which `dp_ilg.clipping.purity` and the engines need. GroupNorm of Flax reads the
    first axis as the batch: call the mended module on ``x[None]`` in the loss of one
    example.

    Example:
        >>> from flax import nnx
        >>> model = nnx.Sequential(
        ...     nnx.Linear(3, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
        >>> found = mended(model)
        >>> print(found.diff)
        @ model.layers[1]
        - nnx.BatchNorm(8)
        + nnx.GroupNorm(8, num_groups=8)
        >>> type(found.module.layers[1]).__name__
        'GroupNorm'

    Reference: Wu and He 2018 (GroupNorm); De et al. 2022 (in private training).
    """
    validation.whole("most_groups", most_groups)
    if is_module(module):
        return _of_nnx(module, int(most_groups))
    if _is_linen(module):
        if not inputs:
            raise TypeError(
                f"{type(module).__name__} is a linen module, whose layers show in a "
                "trace alone; pass an input with a batch axis, as to its init."
            )
        return _of_linen(module, int(most_groups), inputs)
    raise TypeError(
        f"module is {type(module).__name__}, but must be a Flax module, nnx or linen; "
        "in other frameworks write a GroupNorm where a BatchNorm is."
    )


def groups_of(channels: int, most: int = MOST_GROUPS) -> int:
    """The largest number of groups up to `most` that divides the channels.

    Example:
        >>> groups_of(48), groups_of(7), groups_of(37)
        (24, 7, 1)
    """
    return max(k for k in range(1, min(most, channels) + 1) if channels % k == 0)


def _of_nnx(module: Any, most: int) -> Mended:
    from flax import nnx

    copy, changes = nnx.clone(module), []
    for path, layer in list(nnx.iter_modules(copy)):
        if not isinstance(layer, nnx.BatchNorm) or not path:
            continue
        place = "model" + "".join(_step(part) for part in path)
        if layer.axis not in (-1,):
            raise ValueError(
                f"{place} normalises axis {layer.axis}, but GroupNorm takes the last "
                "one for channels; move channels to the end."
            )
        groups = groups_of(layer.num_features, most)
        after = f"nnx.GroupNorm({layer.num_features}, num_groups={groups})"
        changes.append(Change(place, f"nnx.BatchNorm({layer.num_features})", after))
        _put(copy, path, _group_norm(layer, groups))
    if is_module(module) and isinstance(module, nnx.BatchNorm):
        groups = groups_of(module.num_features, most)
        after = f"nnx.GroupNorm({module.num_features}, num_groups={groups})"
        one = Change("model", f"nnx.BatchNorm({module.num_features})", after)
        return Mended(_group_norm(module, groups), (one,))
    return Mended(copy if changes else module, tuple(changes))


def _group_norm(layer: Any, groups: int) -> Any:
    from flax import nnx

    made = nnx.GroupNorm(
        layer.num_features,
        num_groups=groups,
        epsilon=layer.epsilon,
        dtype=layer.dtype,
        use_bias=layer.bias is not None,
        use_scale=layer.scale is not None,
        rngs=nnx.Rngs(0),  # draws nothing: scale and bias are the layer's
    )
    made.scale, made.bias = layer.scale, layer.bias
    return made


def _step(part: Any) -> str:
    return f"[{part!r}]" if isinstance(part, int) else f".{part}"


def _put(root: Any, path: tuple, value: Any) -> None:
    for part in path[:-1]:
        root = root[part] if isinstance(part, int) else getattr(root, part)
    if isinstance(path[-1], int):
        root[path[-1]] = value
    else:
        setattr(root, path[-1], value)


def _is_linen(module: Any) -> bool:
    linen = sys.modules.get("flax.linen")
    return linen is not None and isinstance(module, linen.Module)


def _of_linen(module: Any, most: int, inputs: tuple) -> Mended:
    """What a linen module would have to say; found by a trace of it, without data."""
    import jax
    from flax import linen

    changes: dict[str, Change] = {}

    def watched(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = context.module
        if isinstance(layer, linen.BatchNorm) and context.method_name == "__call__":
            place = "/".join(layer.path)
            groups = groups_of(args[0].shape[-1], most)
            after = f"nn.GroupNorm(num_groups={groups})(x)"
            changes[place] = Change(place, "nn.BatchNorm(...)(x)", after)
        return call(*args, **kwargs)

    with linen.intercept_methods(watched):
        jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return Mended(None if changes else module, tuple(changes.values()))
