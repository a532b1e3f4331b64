"""What the noise of a step is bound to: the release that it was drawn for."""

import hashlib
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

_LENGTH = 64  # hexadecimal digits of SHA-256


def release_digest(params: Any, program: str) -> str:
    """A digest of what a step is released from, for ``ledger.record``.

    A step may be repeated for free if it releases the same bits. Its noise follows the
    key and the step, so what is left is that the clipped sum is the same: same
    parameters, same program, same data. The ledger compares this digest.

    It is computed on the host and fetches the parameters, so call it outside ``jit``.

    Args:
        params: the parameters before the step; any tree of arrays or PRNG keys. Add the
            optimizer's state where the program does not fix it: ``(params, state)``.
        program: everything else that decides the release, in words or as a digest:
            loss, learning rate, clip mode, layers, data, version of the code.

    Returns:
        64 hexadecimal digits: SHA-256 of names, types, shapes and all bits.

    Raises:
        TypeError: for a program that is no text, or a leaf that is no array.

    Privacy:
        Parameters are released, so their digest tells nothing new. A digest of private
        data inside `program` would: `PrivacyLedger(key=...)` keeps it under the key.

    Example:
        >>> import jax.numpy as jnp
        >>> one = release_digest({"w": jnp.zeros(2)}, "rate 0.1")
        >>> one == release_digest({"w": jnp.zeros(2)}, "rate 0.1")
        True
        >>> one == release_digest({"w": jnp.zeros(2)}, "rate 0.2")
        False
    """
    if not isinstance(program, str):
        raise TypeError(
            f"program is {type(program).__name__}, but must be text; name loss, "
            "learning rate and data in it."
        )
    digest = hashlib.sha256(f"{len(program)} {program}".encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = _plain(path, leaf)
        name = f" {jax.tree_util.keystr(path)} {array.dtype} {array.shape} "
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def next_digest(digest: str) -> str:
    """The digest of the step after one whose digest is known, without the parameters.

    What a step leaves is a function of what it was released from, of its key and of
    its batch, so a chain of digests that begins at one position names all that follow.
    It spares large models the fetching of their parameters at every step.

    Args:
        digest: of the step before.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: for anything but a digest.

    Privacy:
        As `release_digest`.

    Example:
        >>> next_digest("0" * 64) == next_digest("0" * 64) != "0" * 64
        True
    """
    if not isinstance(digest, str) or len(digest) != _LENGTH:
        raise ValueError(
            f"digest is {digest!r}, but must have {_LENGTH} digits; pass what "
            "release_digest returned."
        )
    return hashlib.sha256(f"next {digest}".encode()).hexdigest()


def _plain(path: Any, leaf: Any) -> np.ndarray:
    if isinstance(leaf, Tracer):
        raise TypeError(
            f"params{jax.tree_util.keystr(path)} is traced; call release_digest "
            "outside jit, once a step."
        )
    if hasattr(leaf, "dtype") and jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    ):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    if array.dtype == object:
        raise TypeError(
            f"params{jax.tree_util.keystr(path)} is {type(leaf).__name__}, but must be "
            "an array; pass the parameters alone."
        )
    return array
