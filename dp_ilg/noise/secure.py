"""Draws from a cryptographic generator, made outside the jitted step.

JAX's threefry is fast and was not built to resist a cryptanalyst: its key has 64 bits.
Here the bits are those of SHAKE-256 (the operating system's or Python's own library)
under a secret of 256 bits, as a function of (secret, step, leaf), so that a resumed run
repeats its noise as everywhere else (law: keyed by step). `SecureNoise` makes the same
draws of them as the compiled step does, so that the law is the same;
`dp_ilg.noise.exact` makes discrete Gaussian ones, whose distance is next to nothing.

Reference: NIST FIPS 202 (SHAKE).
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
from dp_ilg.base import MOST_METRICS
from dp_ilg.noise.steps import WORDS, steps_of

_DOMAIN = b"dp_ilg.secure_noise.2"  # separates these bits from other uses of a secret
_SECRET_BYTES = 32
_BLOCK = 1 << 18  # draws made at once, which bounds memory
_SCORES = 1 << 32  # stands for a leaf: more than there are
_METRICS = _SCORES + 1
_ROWS = _SCORES + 2


class NoiseDraws(NamedTuple):
    """The draws of one step, for ``tx.update(..., noise=draws)``.

    Attributes:
        step: of which step; under any other the release is NaN.
        gradient: shaped like the parameters, int32: steps of 2^-27 standard deviations.
        scores: one number a group, int32.
        metrics: `MOST_METRICS` numbers, int32, of which a step uses one a metric.
        rows: one number a row that is counted, int32; None where no row is.

    Privacy: as secret as a key; who knows them can subtract the noise.
    """

    step: Any
    gradient: Any
    scores: Any
    metrics: Any
    rows: Any = None


class ExactDraws(NamedTuple):
    """Draws of one step that `dp_ilg.noise.exact.ExactNoise` made.

    Attributes:
        step: as in `NoiseDraws`.
        gradient: as in `NoiseDraws`.
        scores: as in `NoiseDraws`.
        metrics: as in `NoiseDraws`.
        rows: as in `NoiseDraws`.

    Privacy: as secret as a key; who knows them can subtract the noise.
    """

    step: Any
    gradient: Any
    scores: Any
    metrics: Any
    rows: Any = None


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

    _domain = _DOMAIN

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
        return f"{type(self).__name__}(secret=<hidden>)"

    def draws(
        self, step: SupportsIndex, params: Any, geometry: Any, rows: SupportsIndex = 0
    ) -> NoiseDraws:
        """The noise of one step, on the host.

        Args:
            step: which step, from 0: the one the state is at.
            params: the parameters; only shapes and dtypes are read.
            geometry: ``tx.geometry(state)``, for the number of groups.
            rows: how many rows are counted (`dp_ilg.keep_rows`).

        Returns:
            The draws, as JAX arrays.

        Raises:
            ValueError: for a step that is negative, no integer, or above 2^31 - 1.

        Example:
            >>> import dp_ilg, jax.numpy as jnp
            >>> params = {"w": jnp.zeros((2, 3))}
            >>> source = SecureNoise(secret=bytes(32))
            >>> found = source.draws(4, params, dp_ilg.Geometry.uniform(params))
            >>> int(found.step), found.gradient["w"].shape, found.scores.shape
            (4, (2, 3), (1,))
        """
        step = validation.count("step", step)
        if step >= 2**31:
            raise ValueError(
                f"step is {step}, but must be below 2^31; use fewer steps."
            )
        leaves, treedef = jax.tree.flatten(params)
        drawn = [self._leaf(step, i, x.shape) for i, x in enumerate(leaves)]
        scores = self._leaf(step, _SCORES, (len(geometry.groups.names),))
        metrics = self._leaf(step, _METRICS, (MOST_METRICS,))
        gradient = jax.tree.unflatten(treedef, drawn)
        count = validation.count("rows", rows)
        counted = self._leaf(step, _ROWS, (count,)) if count else None
        return NoiseDraws(jnp.int32(step), gradient, scores, metrics, counted)

    def _leaf(self, step: int, leaf: int, shape: Sequence[int]) -> Array:
        size = math.prod(shape)
        blocks = [
            self._drawn((step, leaf, start), min(_BLOCK, size - start))
            for start in range(0, size, _BLOCK)
        ]
        found = np.concatenate([np.zeros(0, np.int32), *blocks]).reshape(shape)
        return jnp.asarray(found)

    def _drawn(self, place: tuple[int, int, int], count: int) -> np.ndarray:
        """Draws of one block, int32."""
        stream = self._stream(place).digest(4 * WORDS * count)
        words = np.frombuffer(stream, "<u4").reshape(WORDS, count)
        return steps_of(tuple(words), np)

    def _stream(self, place: tuple[int, ...]) -> Any:
        """The bits of (step, leaf, start): as many as are asked for."""
        where = b"".join(n.to_bytes(16, "little") for n in place)
        return hashlib.shake_256(self._domain + self._secret + where)


def given_leaves(noise: Any, step: Any, leaves: Sequence[Any]) -> tuple[list[Any], Any]:
    """The gradient's draws, leaf by leaf, and whether they are this step's.

    Args:
        noise: what the caller passed.
        step: the state's, perhaps traced.
        leaves: arrays that noise is for; None where none is.

    Returns:
        Two things: int32 arrays of the same shapes (or None), and whether they are the
        step's own: if not, NaN has to be released.

    Raises:
        TypeError: for anything but `NoiseDraws` of int32.
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
    found = [None if x is None else d for x, d in zip(leaves, drawn, strict=True)]
    return found, right


def given_scores(noise: Any, step: Any, shape: Sequence[int]) -> tuple[Array, Any]:
    """The score's draws, and whether they are this step's.

    Args:
        noise: what the caller passed.
        step: the state's, perhaps traced.
        shape: of the statistic: nothing for one number, or one number a group.

    Returns:
        Two things: int32 of that shape, and whether they are the step's own: if not,
        NaN has to be released.

    Raises:
        TypeError: for anything but `NoiseDraws` of int32.
        ValueError: for too few numbers.
    """
    _check(noise)
    count = math.prod(shape)
    if noise.scores.ndim != 1 or noise.scores.size < count:
        raise ValueError(
            f"The noise has {noise.scores.shape} numbers for scores, but {count} are "
            "needed; draw it for this optimizer's geometry(state)."
        )
    return noise.scores[:count].reshape(tuple(shape)), noise.step == step


def given_metrics(noise: Any, step: Any, count: int) -> tuple[Array, Any]:
    """The metrics' draws, and whether they are this step's.

    Args:
        noise: what the caller passed.
        step: the state's, perhaps traced.
        count: how many metrics there are, at most `MOST_METRICS`.

    Returns:
        Two things: int32 ``[count]``, and whether they are the step's own: if not, NaN
        has to be released.

    Raises:
        TypeError: for anything but `NoiseDraws` of int32.
    """
    _check(noise)
    return noise.metrics[:count], noise.step == step


def given_rows(noise: Any, step: Any, count: int) -> tuple[Array, Any]:
    """The row counts' draws, and whether they are this step's.

    Args:
        noise: what the caller passed.
        step: the state's, perhaps traced.
        count: how many rows are counted.

    Returns:
        Two things: int32 ``[count]``, and whether they are the step's own: if not, NaN
        has to be released.

    Raises:
        TypeError: for anything but `NoiseDraws` of int32.
        ValueError: for another number of rows.
    """
    _check(noise)
    if noise.rows is None or noise.rows.shape != (count,):
        shape = None if noise.rows is None else noise.rows.shape
        raise ValueError(
            f"The noise has {shape} numbers for rows, but {count} are needed; draw it "
            "with rows= that number."
        )
    return noise.rows, noise.step == step


def check_draws(noise: Any, exact: bool) -> None:
    """Raises unless an update was given the draws that its noise stage asks for.

    Args:
        noise: what the caller passed, or None.
        exact: whether only an exact sampler's will do.

    Raises:
        TypeError: for anything but int32 draws of the kind that is needed.

    Example:
        >>> check_draws(None, exact=False)
        >>> check_draws(None, exact=True)
        Traceback (most recent call last):
        TypeError: noise is NoneType, but exact noise needs ExactDraws; make them ...
    """
    if exact and not isinstance(noise, ExactDraws):
        raise TypeError(
            f"noise is {type(noise).__name__}, but exact noise needs ExactDraws; make "
            "them with dp_ilg.noise.exact.ExactNoise(secret=...).draws(step, params, "
            "geometry) and give them to update as noise=."
        )
    if noise is not None:
        _check(noise)


def _check(noise: Any) -> None:
    if not isinstance(noise, NoiseDraws | ExactDraws):
        raise TypeError(
            f"noise is {type(noise).__name__}, but must be NoiseDraws; make it with "
            "dp_ilg.noise.secure.SecureNoise(secret=...).draws(step, params, geometry)."
        )
    drawn = (*jax.tree.leaves(noise.gradient), noise.scores, noise.metrics)
    drawn += () if noise.rows is None else (noise.rows,)
    kinds = {str(x.dtype) for x in drawn}
    if kinds - {"int32"}:
        raise TypeError(
            f"The noise holds {', '.join(sorted(kinds))}, but draws are int32; make "
            "them with dp_ilg.noise.secure.SecureNoise."
        )
