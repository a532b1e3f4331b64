"""The secret of a run, and the keys that are derived from it, each for one use.

Two releases with one noise and two clipped sums give the difference of the sums away,
without noise. So keys follow the secret *and* everything that a release depends on:
runs that could release different sums draw different noise.

Reference: RFC 7693 (BLAKE2b), keyed and personalised.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

_DOMAIN = b"dp_ilg.run_keys."  # BLAKE2b's person: 16 bytes
_SECRET_BYTES = 32
_KEY_WORDS = 2  # what JAX's threefry keys hold


class RunSecret:
    """256 bits that nobody else may know, and what is derived from them.

    Attributes:
        fixed: whether they came from a seed that was given.

    Privacy:
        Whoever knows it can draw the noise again and subtract it. It is never shown;
        `hex` is for files that only their owner can read.

    Example:
        >>> secret = RunSecret(7)
        >>> secret
        RunSecret(<hidden>)
        >>> bool((secret.key("noise") == RunSecret(7).key("noise")).all())
        True
        >>> bool((secret.key("noise") == secret.key("noise", plan="other")).all())
        False
    """

    def __init__(self, seed: Any = None):
        """Draws 256 bits from the operating system, or takes a seed.

        Args:
            seed: a whole number below 2**256, or None.

        Raises:
            ValueError: for a seed out of range.
        """
        self.fixed = seed is not None
        self._bytes = secret_from(seed)

    @classmethod
    def from_hex(cls, text: str, fixed: bool = False) -> "RunSecret":
        """What `hex` wrote.

        Args:
            text: 64 hexadecimal digits.
            fixed: whether they came from a seed.

        Returns:
            The same secret.

        Example:
            >>> RunSecret.from_hex(RunSecret(7).hex()).same(RunSecret(7))
            True
        """
        found = cls(int.from_bytes(bytes.fromhex(text), "little"))
        found.fixed = fixed
        return found

    def hex(self) -> str:
        """All of it, for a file that only its owner can read."""
        return self._bytes.hex()

    def same(self, other: "RunSecret") -> bool:
        """Whether two secrets are one, in constant time."""
        return secrets.compare_digest(self._bytes, other._bytes)

    def bytes(self, use: str, **facts: str) -> bytes:
        """256 bits for one use; see `derived_secret`."""
        return derived_secret(self._bytes, use, facts)

    def key(self, use: str, **facts: str) -> Any:
        """A typed JAX key for one use, with all the bits that such a key takes."""
        return typed_key(self.bytes(use, **facts))

    def words(self, use: str, **facts: str) -> np.ndarray:
        """Two uint32 words for one use."""
        return np.frombuffer(self.bytes(use, **facts), "<u4")[:2].astype(np.uint32)

    def __repr__(self) -> str:
        return "RunSecret(<hidden>)"


def derived_secret(secret: bytes, use: str, facts: Mapping[str, str]) -> bytes:
    """256 bits for one use: BLAKE2b under the secret, of use and facts as JSON.

    Args:
        secret: 32 bytes.
        use: what the bits are for.
        facts: what they are for besides; their order does not matter.

    Returns:
        32 bytes, as secret as the seed.

    Example:
        >>> one = derived_secret(bytes(32), "sampler", {"a": "1", "b": "2"})
        >>> one == derived_secret(bytes(32), "sampler", {"b": "2", "a": "1"})
        True
        >>> one == derived_secret(bytes(32), "optimizer", {"a": "1", "b": "2"})
        False
    """
    text = json.dumps([use, sorted(facts.items())], separators=(",", ":"))
    digest = hashlib.blake2b(text.encode(), digest_size=32, key=secret, person=_DOMAIN)
    return digest.digest()


def secret_from(seed: Any) -> bytes:
    r"""A seed as 32 bytes, or as many from the operating system.

    Args:
        seed: a whole number below 2**256, or None.

    Returns:
        32 bytes.

    Raises:
        ValueError: for anything else.

    Example:
        >>> secret_from(1)[:2], len(secret_from(None))
        (b'\x01\x00', 32)
        >>> secret_from(-1)
        Traceback (most recent call last):
        ValueError: The seed must be a whole number from 0 to 2**256 - 1, or None ...
    """
    if seed is None:
        return secrets.token_bytes(_SECRET_BYTES)
    whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
    if not whole or not 0 <= int(seed) < 2 ** (8 * _SECRET_BYTES):
        raise ValueError(
            "The seed must be a whole number from 0 to 2**256 - 1, or None for the "
            "operating system's entropy; what was given is not shown, since seeds are "
            "secrets."
        )
    return int(seed).to_bytes(_SECRET_BYTES, "little")


def typed_key(content: bytes) -> Any:
    r"""A typed JAX key of the first bits of a secret.

    Args:
        content: at least 8 bytes.

    Returns:
        The key.

    Example:
        >>> jax.random.key_data(typed_key(bytes(7) + b"\x01")).tolist()
        [0, 16777216]
    """
    words = np.frombuffer(content, "<u4")[:_KEY_WORDS].astype(np.uint32)
    return jax.random.wrap_key_data(jax.numpy.asarray(words), impl="threefry2x32")
