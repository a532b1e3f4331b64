"""Where a private run stands: one tree for every framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from dp_ilg.base import Params


@dataclasses.dataclass(frozen=True)
class Origin:
    """Which run a state is of: equal for states of one plan, whoever holds them.

    Attributes:
        plan: the plan's digest.
        run: the object that made it, which holds the run's secret.
        rebuild: parameters -> the kind of object the run was given.
    """

    plan: str
    run: Any = dataclasses.field(compare=False, repr=False)
    rebuild: Callable[[Params], Any] = dataclasses.field(compare=False, repr=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class PrivateState:
    """Parameters, optimizer state and step of a private run: a pytree.

    `dp_ilg.private_training` makes it and takes it; only what its ``step`` returned
    last can be stepped again. Parameters may be read, copied and evaluated at will.

    Attributes:
        params: the parameters that are trained.
        opt_state: the optimizer's state; it holds secret keys.
        step: steps taken, int32.
        origin: which run it is of.

    Privacy:
        `params` are released. `opt_state` holds the noise's keys: never publish it.

    Example:
        >>> import jax.numpy as jnp
        >>> origin = Origin("plan", None, lambda params: params)
        >>> PrivateState({"w": jnp.zeros((2, 3))}, (), jnp.int32(0), origin)
        PrivateState(step=0, 6 parameters, opt_state=<hidden>)
    """

    params: Any
    opt_state: Any
    step: Any
    origin: Origin = dataclasses.field(metadata=dict(static=True))

    @property
    def model(self) -> Any:
        """The user's own kind of object, with the parameters as they are here."""
        return self.origin.rebuild(self.params)

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        count = sum(getattr(leaf, "size", 1) for leaf in leaves)
        return (
            f"PrivateState(step={self.step}, {count:,} parameters, opt_state=<hidden>)"
        )


class Counted(NamedTuple):
    """What the compiled step carries: an optimizer's state and a number of steps."""

    inner: Any
    step: Any
