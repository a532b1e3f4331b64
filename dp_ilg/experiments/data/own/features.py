"""Features by a function from outside: each row of them from its own row alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from dp_ilg.experiments.data.container import Dataset

_ROWS = 256  # at a time: one shape, so compiled once
_TRIED = 4
_CLOSE = 1e-4


def outside_features(
    data: Dataset, name: str, function: Callable[[Any], Any]
) -> Dataset:
    """Replaces inputs by what a function makes of a batch of them.

    Args:
        data: one array of inputs, images, vectors or token ids.
        name: what the function is called.
        function: a batch ``[rows, ...]`` to features ``[rows, ...]``; JAX or NumPy.

    Returns:
        The data set with float32 inputs; token ids are none any more. Nothing is kept
        on disk.

    Raises:
        ValueError: in one sentence, for other inputs, a function that fails or gives
            another number of rows, and one that mixes rows.

    Privacy:
        The guarantee for features is that for inputs only if row i of them is a
        function of input i alone. That is tried on made-up rows, never on the data: a
        function that normalises over its batch is refused. What it learned from the
        data before, nobody can see from here.

    Example:
        >>> from dp_ilg.experiments.data.datasets import load_dataset
        >>> halves = lambda x: x[:, ::2].reshape(len(x), -1)
        >>> found = outside_features(load_dataset("digits"), "halves", halves)
        >>> found.x_train.shape
        (1437, 32)
    """
    inputs = data.x_train
    if not isinstance(inputs, np.ndarray):
        raise ValueError(
            f"data.features is {name!r}, which is made of one array in memory, but "
            f"{data.name} has {type(inputs).__name__}; set data.features to 'raw'."
        )
    apply = _guarded(name, function)
    _check_rows_apart(name, apply, inputs)
    x_train, x_test = (_chunks(apply, x) for x in (inputs, data.x_test))
    note = f"{data.note} Inputs are features by {name}, of each input alone."
    return dataclasses.replace(
        data, x_train=x_train, x_test=x_test, num_tokens=0, words=(), note=note
    )


def _guarded(name: str, function: Callable[[Any], Any]) -> Callable[[Any], np.ndarray]:
    """One batch at a time, as float32; what goes wrong is one sentence."""

    def apply(rows: np.ndarray) -> np.ndarray:
        try:
            found = np.asarray(function(jnp.asarray(rows)), np.float32)
        except Exception as error:  # noqa: BLE001 - somebody else's code
            words = " ".join(str(error).split())
            raise ValueError(
                f"data.features is {name!r}, which raises {type(error).__name__} for "
                f"a batch {rows.dtype}{list(rows.shape)}: {words}."
            ) from None
        if found.ndim < 2 or len(found) != len(rows):
            raise ValueError(
                f"data.features is {name!r}, which makes {list(found.shape)} of a "
                f"batch of {len(rows)} inputs, but must make one row of features each."
            )
        return found

    return apply


def _check_rows_apart(
    name: str, apply: Callable[[Any], np.ndarray], inputs: np.ndarray
) -> None:
    """Other rows beside a row must not change what is made of it; on made-up rows."""
    shape, dtype = inputs.shape[1:], inputs.dtype
    draws = np.random.default_rng(0).random((2, _TRIED, *shape))
    one, other = (draws * (9 if dtype.kind in "iu" else 1)).astype(dtype)
    other[0] = one[0]
    here, there = apply(one)[0], apply(other)[0]
    size = np.max(np.abs(here), initial=1e-30)
    if not np.allclose(here, there, rtol=_CLOSE, atol=_CLOSE * size, equal_nan=True):
        raise ValueError(
            f"data.features is {name!r}, which makes other features of an input when "
            "others stand beside it; compute each row from its own input alone, or "
            "what one example changes is not bounded."
        )


def _chunks(apply: Callable[[Any], np.ndarray], inputs: np.ndarray) -> np.ndarray:
    found = []
    for begin in range(0, max(len(inputs), 1), _ROWS):
        rows = np.asarray(inputs[begin : begin + _ROWS])
        missing = [(0, _ROWS - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
        found.append(apply(np.pad(rows, missing))[: len(rows)])
    return np.concatenate(found)
