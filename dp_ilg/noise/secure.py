"""Normal draws from a cryptographic generator, made outside the jitted step.

JAX's threefry is fast and was not built to resist a cryptanalyst: its key has 64 bits.
Here the bits are those of SHAKE-256 (the operating system's or Python's own library)
under a secret of 256 bits, as a function of (secret, step, leaf), so that a resumed run
repeats its noise as everywhere else (law: keyed by step). Each draw takes 64 of them,
through the inverse of the normal distribution in float64, and reaches 9.1 standard
deviations.

What this does not change: noise is added in floating point. A sum of float32 numbers
lies on a grid that depends on the numbers, so some releases are possible only with a
certain record, whatever the generator; the proof is about real numbers. Who fears an
adversary that reads the last bits must round releases to a coarse public grid.

Reference: Mironov 2012, "On significance of the least significant bits for differential
privacy"; NIST FIPS 202 (SHAKE).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dp_ilg import validation

_DOMAIN = b"dp_ilg.secure_noise.1"  # separates these bits from other uses of a secret
_SECRET_BYTES = 32
_BLOCK = 1 << 18  # draws made at once, which bounds memory
_SCORES = 1 << 32  # stands for a leaf: more than there are


class NoiseDraws(NamedTuple):
    """The standard normal numbers of one step, for ``tx.update(..., noise=draws)``.

    Attributes:
        step: of which step; under any other the release is NaN.
        gradient: shaped like the parameters, float32 (float64 for such parameters).
        scores: one number a group, float32.

    Privacy: as secret as a key; who knows them can subtract the noise.
    """

    step: Any
    gradient: Any
    scores: Any


class SecureNoise:
    """Draws the noise of any step from a secret, in any order, without state.

    Privacy:
        With `NoiseDraws` of the right step in every update, the noise is as hard to
        tell from random as SHAKE-256 is, for who does not know the secret; keep it
        with the run's checkpoints and never use it for two runs. Floating point is as
        the module says.

    Example:
        >>> import dp_ilg, jax, jax.numpy as jnp, secrets
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100)
        >>> tx = dp_ilg.dp_adam_ilg(1e-2, plan, key=jax.random.key(0))
        >>> source = SecureNoise(secret=secrets.token_bytes(32))
        >>> params = {"w": jnp.zeros(2)}
        >>> state = tx.init(params)
        >>> draws = source.draws(0, params, tx.geometry(state))
        >>> grads = {"w": jnp.ones((5, 2))}
        >>> updates, state = jax.jit(tx.update)(grads, state, params, noise=draws)
        >>> source
        SecureNoise(secret=<hidden>)
    """

    def __init__(self, *, secret: Any):
        """Takes the secret.

        Args:
            secret: 32 bytes or more, from ``secrets.token_bytes(32)``.

        Raises:
            TypeError: for anything but bytes.
            ValueError: for fewer than 32.
        """
        if not isinstance(secret, bytes):
            raise TypeError(
                f"secret is {type(secret).__name__}, but must be bytes; make it with "
                "secrets.token_bytes(32)."
            )
        if len(secret) < _SECRET_BYTES:
            raise ValueError(
                f"secret has {len(secret)} bytes, but must have at least "
                f"{_SECRET_BYTES}; make it with secrets.token_bytes(32)."
            )
        self._secret = len(secret).to_bytes(8, "little") + secret

    def __repr__(self) -> str:
        return "SecureNoise(secret=<hidden>)"

    def draws(self, step: SupportsIndex, params: Any, geometry: Any) -> NoiseDraws:
        """The noise of one step, on the host.

        Args:
            step: which step, from 0: the one the state is at.
            params: the parameters; only shapes and dtypes are read.
            geometry: ``tx.geometry(state)``, for the number of groups.

        Returns:
            The draws, as JAX arrays.

        Raises:
            ValueError: for a step that is negative or no integer.

        Example:
            >>> import dp_ilg, jax.numpy as jnp
            >>> params = {"w": jnp.zeros((2, 3))}
            >>> source = SecureNoise(secret=bytes(32))
            >>> found = source.draws(4, params, dp_ilg.Geometry.uniform(params))
            >>> int(found.step), found.gradient["w"].shape, found.scores.shape
            (4, (2, 3), (1,))
        """
        step = validation.count("step", step)
        leaves, treedef = jax.tree.flatten(params)
        drawn = [self._leaf(step, i, x.shape, x.dtype) for i, x in enumerate(leaves)]
        count = (len(geometry.groups.names),)
        scores = self._leaf(step, _SCORES, count, jnp.float32)
        return NoiseDraws(jnp.int32(step), jax.tree.unflatten(treedef, drawn), scores)

    def _leaf(self, step: int, leaf: int, shape: Sequence[int], dtype: Any) -> Array:
        size = math.prod(shape)
        blocks = [
            _normals(self._bits(step, leaf, start, min(_BLOCK, size - start)))
            for start in range(0, size, _BLOCK)
        ]
        found = np.concatenate([np.zeros(0), *blocks]).reshape(shape)
        return jnp.asarray(found, jnp.promote_types(dtype, jnp.float32))

    def _bits(self, step: int, leaf: int, start: int, count: int) -> np.ndarray:
        place = b"".join(n.to_bytes(16, "little") for n in (step, leaf, start))
        stream = hashlib.shake_256(_DOMAIN + self._secret + place)
        return np.frombuffer(stream.digest(8 * count), "<u8")


def _normals(bits: np.ndarray) -> np.ndarray:
    """One bit for the sign and 63 for a probability below one half; float64."""
    from scipy import special

    positive = (bits >> np.uint64(63)).astype(bool)
    below_half = ((bits & np.uint64(2**63 - 1)).astype(np.float64) + 0.5) * 2.0**-64
    size = -special.ndtri(below_half)
    return np.where(positive, size, -size)


def given_leaves(noise: Any, step: Any, leaves: Sequence[Any]) -> list[Any]:
    """The gradient's draws, leaf by leaf, or NaN if they are another step's.

    Args:
        noise: what the caller passed.
        step: the state's, perhaps traced.
        leaves: arrays that noise is for; None where none is.

    Returns:
        Arrays of the same shapes and dtypes, or None.

    Raises:
        TypeError: for anything but `NoiseDraws`.
        ValueError: for other shapes.
    """
    _check(noise)
    drawn, right = jax.tree.leaves(noise.gradient), noise.step == step
    wanted = [None if x is None else x.shape for x in leaves]
    fits = len(drawn) == len(leaves) and all(
        shape in (None, x.shape) for shape, x in zip(wanted, drawn, strict=True)
    )
    if not fits:
        raise ValueError(
            f"The noise has shapes {[x.shape for x in drawn]}, but the gradient needs "
            f"{wanted}; draw it for these parameters."
        )
    return [
        None if x is None else jnp.where(right, d, jnp.nan).astype(x.dtype)
        for x, d in zip(leaves, drawn, strict=True)
    ]


def given_scores(noise: Any, step: Any, shape: Sequence[int]) -> Array:
    """The score's draws, or NaN if they are another step's.

    Args:
        noise: what the caller passed.
        step: the state's, perhaps traced.
        shape: of the statistic: nothing for one number, or one number a group.

    Returns:
        float32 of that shape.

    Raises:
        TypeError: for anything but `NoiseDraws`.
        ValueError: for too few numbers.
    """
    _check(noise)
    count = math.prod(shape)
    if noise.scores.ndim != 1 or noise.scores.size < count:
        raise ValueError(
            f"The noise has {noise.scores.shape} numbers for scores, but {count} are "
            "needed; draw it for this optimizer's geometry(state)."
        )
    found = noise.scores[:count].reshape(tuple(shape))
    return jnp.where(noise.step == step, found, jnp.nan).astype(jnp.float32)


def _check(noise: Any) -> None:
    if not isinstance(noise, NoiseDraws):
        raise TypeError(
            f"noise is {type(noise).__name__}, but must be NoiseDraws; make it with "
            "dp_ilg.noise.secure.SecureNoise(secret=...).draws(step, params, geometry)."
        )
