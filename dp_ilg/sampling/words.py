"""Random words of a sampler: a function of its key and the step alone."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from dp_ilg import validation

_DOMAIN = b"dp_ilg.sampling1"  # separates these bits from every other use of the key
_DEAL = (1 << 128) - 1  # stands for a step: more than there are


def bits(secret: bytes, step: int) -> np.random.Philox:
    """The generator of one step.

    Args:
        secret: from `key_bytes`.
        step: which step, from 0.

    Example:
        >>> bits(key_bytes(0), 3).random_raw(2).dtype
        dtype('uint64')
    """
    message = secret + step.to_bytes(16, "little")
    digest = hashlib.blake2b(message, digest_size=16, person=_DOMAIN).digest()
    return np.random.Philox(key=np.frombuffer(digest, "<u8").astype(np.uint64))


def dealt(secret: bytes, num_examples: int, parts: int) -> np.ndarray:
    """The part of every example, each dealt by itself.

    Args:
        secret: from `key_bytes`.
        num_examples: N.
        parts: b.

    Returns:
        int64[num_examples], from 0 to ``parts - 1``.

    Privacy: an example's part does not depend on the others, so that adding or removing
    one moves no other to another part.

    Example:
        >>> sorted(set(dealt(key_bytes(0), 100, 3).tolist()))
        [0, 1, 2]
    """
    found = bits(secret, _DEAL).random_raw(num_examples)
    return (found % np.uint64(parts)).astype(np.int64)


def checked_parts(parts: Any, sampler: Any) -> int:
    """The number of parts, if the sampler can draw from so many.

    Args:
        parts: b.
        sampler: with `sampling_prob` and `max_batch_size`.

    Raises:
        ValueError: for no whole number, for parts smaller than a batch, or beside
            `max_batch_size`.

    Example:
        >>> from types import SimpleNamespace
        >>> sampler = SimpleNamespace(sampling_prob=0.3, max_batch_size=None)
        >>> checked_parts(4, sampler)
        Traceback (most recent call last):
        ValueError: parts is 4, but a part would have to give 1.2 times ...
    """
    validation.whole("parts", parts)
    if parts > 1 and sampler.max_batch_size is not None:
        raise ValueError(
            f"parts is {parts} and max_batch_size is {sampler.max_batch_size}, but cut "
            "draws from parts are not accounted; leave one of them out."
        )
    if parts * sampler.sampling_prob > 1 + 1e-9:
        raise ValueError(
            f"parts is {parts}, but a part would have to give "
            f"{parts * sampler.sampling_prob:.3g} times its examples in a step at "
            f"sampling_prob {sampler.sampling_prob:g}; use at most "
            f"{int(1 / sampler.sampling_prob)} parts."
        )
    return int(parts)


def key_bytes(key: Any) -> bytes:
    """The key's bits; equal bytes mean equal kind and equal key.

    Args:
        key: a typed JAX key, a raw uint32[2] key, or an integer seed of at least 0.

    Raises:
        ValueError: for a negative seed.
        TypeError: for anything else, or a traced key.

    Example:
        >>> key_bytes(255)
        b'seedff'
    """
    if isinstance(key, Tracer):
        raise TypeError("key is traced; build the sampler outside jit.")
    if isinstance(key, jax.Array):
        words = np.asarray(jax.random.key_data(validation.key("key", key)))
        return b"key" + words.astype("<u4").tobytes()
    if isinstance(key, np.integer | int) and not isinstance(key, bool):
        if key < 0:
            raise ValueError("key is a negative seed; use an integer of at least 0.")
        return b"seed" + f"{int(key):x}".encode()
    raise TypeError(
        f"key must be a JAX key or an integer seed, not {type(key).__name__}; "
        "make one with jax.random.key(seed)."
    )
