"""Checks of static facts at the door: one sentence, the value, the remedy.

Every check works on Python numbers only. A traced value (inside ``jit`` or
``optax.inject_hyperparams``) is let through, because nothing about it is known.
"""

import difflib
import math
import numbers
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def positive(name: str, value: Any) -> None:
    """Raises unless `value` is a finite number above zero.

    Args:
        name: what the caller calls it.
        value: the number to check; traced arrays pass.

    Raises:
        ValueError: for zero, negative, NaN, infinite or non-numeric values.

    Example:
        >>> positive("l2_clip_norm", 1.0)
        >>> positive("l2_clip_norm", -1)
        Traceback (most recent call last):
        ValueError: l2_clip_norm is -1, but must be a finite number above 0.
    """
    if isinstance(value, Tracer):
        return
    value = _plain(value)
    if not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(
            f"{name} is {shown(value)}, but must be a finite number above 0."
        )


def rate(name: str, value: Any) -> None:
    """Raises unless `value` is a finite number of at least zero.

    A learning rate or a weight decay of exactly 0 is one: warm-ups start there, and
    decays end there.

    Args:
        name: what the caller calls it.
        value: the number to check; traced arrays pass.

    Raises:
        ValueError: for negative, NaN, infinite or non-numeric values.

    Example:
        >>> rate("learning_rate", 0.0)
        >>> rate("learning_rate", -1)
        Traceback (most recent call last):
        ValueError: learning_rate is -1, but must be a finite number of at least 0.
    """
    if isinstance(value, Tracer):
        return
    value = _plain(value)
    if not (_is_number(value) and 0 <= value < math.inf):
        raise ValueError(
            f"{name} is {shown(value)}, but must be a finite number of at least 0."
        )


def fraction(name: str, value: Any, *, include_zero: bool = False) -> None:
    """Raises unless `value` lies strictly between 0 and 1 (0 if allowed).

    Args:
        name: what the caller calls it.
        value: the number to check; traced arrays pass.
        include_zero: whether exactly 0 is allowed.

    Raises:
        ValueError: for anything else.

    Example:
        >>> fraction("delta", 1e-5)
        >>> fraction("delta", 2)
        Traceback (most recent call last):
        ValueError: delta is 2, but must lie between 0 and 1.
    """
    if isinstance(value, Tracer):
        return
    value = _plain(value)
    low_ok = _is_number(value) and (value > 0 or (include_zero and value == 0))
    if not (low_ok and value < 1):
        raise ValueError(f"{name} is {shown(value)}, but must lie between 0 and 1.")


def whole(name: str, value: Any, minimum: int = 1, most: int | None = None) -> None:
    """Raises unless `value` is an integer of at least `minimum`.

    Args:
        name: what the caller calls it.
        value: the number to check.
        minimum: the smallest allowed value.
        most: the largest, None for any.

    Raises:
        ValueError: for anything else, booleans included.

    Example:
        >>> whole("num_steps", 10)
        >>> whole("num_steps", 0)
        Traceback (most recent call last):
        ValueError: num_steps is 0, but must be a whole number of at least 1.
    """
    is_int = isinstance(value, numbers.Integral) and _is_number(value)
    if not is_int or int(value) < minimum:
        raise ValueError(
            f"{name} is {shown(value)}, but must be a whole number of at least "
            f"{minimum}."
        )
    if most is not None and int(value) > most:
        raise ValueError(f"{name} is {shown(value)}, but must be at most {most}.")


def count(name: str, value: Any) -> int:
    """Returns a whole number of at least 0 as a Python integer, or raises.

    Args:
        name: what the caller calls it.
        value: a Python, NumPy or JAX integer without axes.

    Returns:
        The integer.

    Raises:
        ValueError: for anything else; floats, booleans and traced values included.

    Example:
        >>> count("step", jax.numpy.int32(3))
        3
        >>> count("step", np.float32(3))
        Traceback (most recent call last):
        ValueError: step is 3.0, but must be a whole number of at least 0.
    """
    value = value if isinstance(value, Tracer) else _plain(value)
    whole(name, value, 0)
    return int(value)


def key(name: str, value: Any) -> jax.Array:
    """Returns `value` as one typed PRNG key, or raises.

    Args:
        name: what the caller calls it.
        value: a typed key from ``jax.random.key`` or a raw ``uint32[2]`` key.

    Returns:
        The typed key.

    Raises:
        TypeError: for an integer seed, None, an array of keys or anything else.
        ValueError: for a key that ``optax.inject_hyperparams`` shows in its state.

    Example:
        >>> key("key", jax.random.PRNGKey(0)).shape
        ()
        >>> key("key", 0)
        Traceback (most recent call last):
        TypeError: key must be one PRNG key, not int; make it with jax.random.key(seed).
    """
    _refuse_shown(name, value)
    if isinstance(value, jax.Array):
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            if value.shape == ():
                return value
        elif value.dtype == "uint32" and value.shape == (2,):
            return jax.random.wrap_key_data(value)
    raise TypeError(
        f"{name} must be one PRNG key, not {type(value).__name__}; "
        "make it with jax.random.key(seed)."
    )


def key_words(name: str, value: Any) -> np.ndarray:
    """The words of one PRNG key, for code that does not know JAX.

    Args:
        name: what the caller calls it.
        value: the key.

    Returns:
        Its words, uint32; as secret as the key.

    Raises:
        TypeError: as `key`.

    Example:
        >>> key_words("key", jax.random.key(7)).tolist()
        [0, 7]
    """
    return np.asarray(jax.random.key_data(key(name, value)))


def callers(module: str) -> Iterator[FrameType]:
    """The frames on the stack that run a module's code, innermost first.

    For what a wrapper does before and after us, of which its arguments tell nothing.

    Args:
        module: its full name.

    Yields:
        The frames; none where the module is renamed, so nothing is refused by mistake.

    Example:
        >>> list(callers("no.such.module"))
        []
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            yield frame
        frame = frame.f_back


def nearest(name: str, known: Any) -> str:
    """Advice for a name that is in no table.

    Args:
        name: what was given.
        known: the names there are.

    Returns:
        The nearest known name as a question, else the list of names.

    Example:
        >>> nearest("mmist", ["mnist", "adult"])
        'did you mean mnist?'
        >>> nearest("x", ["mnist", "adult"])
        'known are adult, mnist.'
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"known are {listed(known)}."


def listed(names: Any) -> str:
    """Names in order, as a sentence takes them.

    Args:
        names: the names there are.

    Returns:
        The names, sorted, with commas between them.

    Example:
        >>> listed({"b", "a"})
        'a, b'
    """
    return ", ".join(sorted(names))


def _refuse_shown(name: str, value: Any) -> None:
    for frame in callers("optax.schedules._inject"):
        shown = frame.f_locals.get("hparams", {})
        if any(value is hyperparameter for hyperparameter in shown.values()):
            raise ValueError(
                f"optax.inject_hyperparams would show the secret {name} in "
                f"state.hyperparams; give it static_args={name!r}."
            )


def _plain(value: Any) -> Any:
    """A number out of an array without axes; anything else as it is."""
    arrays = jax.Array, np.ndarray, np.generic
    is_array = isinstance(value, arrays) and value.shape == ()
    return value.item() if is_array else value


def _is_number(value: Any) -> bool:
    """Whether it is a real number, and none too large for floating point."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and not (isinstance(value, int) and abs(value) > sys.float_info.max)


def shown(value: Any) -> str:
    """How a message shows a value: in one line, and not at length.

    Args:
        value: anything.

    Returns:
        Its `repr`, shortened.

    Example:
        >>> shown(np.ones((2, 2)))
        'array([[1., 1.], [1., 1.]])'
    """
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
