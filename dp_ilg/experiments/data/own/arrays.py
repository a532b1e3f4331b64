"""Four arrays as a data set: images, vectors, numbers or token ids."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from dp_ilg.experiments.config.data import DataConfig
from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.data.files import DataError
from dp_ilg.experiments.data.shard_rows import unit_interval

_BYTES = 255  # the range of the type, not of the data


def as_dataset(
    name: str,
    source: str,
    arrays: Mapping[str, Any],
    facts: Mapping[str, int],
    note: str,
    chosen: DataConfig,
) -> Dataset:
    """Makes a data set of arrays, or says in one sentence what is lacking.

    Args:
        name: what reports call it.
        source: where it is from, for errors and the note.
        arrays: ``x_train`` and ``y_train``; ``x_test`` and ``y_test`` unless examples
            are held out.
        facts: ``num_classes`` and ``num_tokens``, if the source states them.
        note: what was computed from the data, in the maker's words.
        chosen: the section "data"; facts in it come first.

    Returns:
        The data set: float32 inputs (bytes are divided by 255, others by
        ``data.scale``), or uint16 or int32 token ids.

    Raises:
        DataError: in one sentence that names what was found.

    Privacy: nothing is computed from the rows but whether they fit what is stated.

    Example:
        >>> x, y = np.zeros((4, 3)), np.array([0, 1, 1, 0])
        >>> arrays = dict(x_train=x, y_train=y, x_test=x, y_test=y)
        >>> as_dataset("a", "a.npz", arrays, {}, "", DataConfig("a.npz"))
        Traceback (most recent call last):
        dp_ilg.experiments.data.files.DataError: a.npz does not say how many classes ...
    """
    whole = _whole(source, arrays, chosen)
    tokens = chosen.num_tokens or facts.get("num_tokens", 0)
    parts = {}
    for part in ("train", "test"):
        x, y = (np.asarray(whole[f"{letter}_{part}"]) for letter in "xy")
        parts[f"x_{part}"] = _inputs(f"x_{part} of {source}", x, tokens, chosen.scale)
        parts[f"y_{part}"] = _labels(f"y_{part} of {source}", y, x)
    if parts["x_train"].shape[1:] != parts["x_test"].shape[1:]:
        raise DataError(
            f"{source} has rows of shape {parts['x_train'].shape[1:]} to train on and "
            f"{parts['x_test'].shape[1:]} to test; write both alike."
        )
    continues = parts["y_train"].ndim == 2
    classes = tokens if continues else _classes(source, facts, chosen)
    _check_labels(source, parts, classes)
    words = f"From {source}. {note}{_stated(whole, classes, tokens, chosen)}"
    return Dataset(name, **parts, num_classes=classes, note=words, num_tokens=tokens)


def _whole(
    source: str, arrays: Mapping[str, Any], chosen: DataConfig
) -> dict[str, Any]:
    """All four arrays; without a test part nothing of it, if examples are held out."""
    found = {key: arrays[key] for key in arrays if key[:2] in ("x_", "y_")}
    for needed in ("x_train", "y_train"):
        if needed not in found:
            raise DataError(
                f"{source} holds {', '.join(arrays) or 'nothing'}, but no {needed}; "
                "name its arrays x_train, y_train, x_test and y_test, as in "
                "numpy.savez('my.npz', x_train=..., y_train=...)."
            )
    if "x_test" in found and "y_test" in found:
        return found
    if chosen.validation is None:
        lacks = "x_test and y_test" if "x_test" not in found else "y_test"
        raise DataError(
            f"{source} has no {lacks} to evaluate on; add them, or hold out a part of "
            "the training rows with --data.validation 0.1 (accuracy on them is not "
            "covered by the guarantee)."
        )
    none = {f"{letter}_test": found[f"{letter}_train"][:0] for letter in "xy"}
    return found | none


def _inputs(place: str, x: np.ndarray, tokens: int, scale: float | None) -> np.ndarray:
    if x.ndim < 2 or x.dtype.kind not in "biuf":
        raise DataError(
            f"{place} is {x.dtype}{list(x.shape)}, but must hold numbers, one "
            "example a row; reshape it to [examples, columns], or number its words."
        )
    if tokens:
        return _ids(place, x, tokens)
    if x.dtype == np.uint8 and scale is None and x.ndim in (3, 4):
        return unit_interval(x)
    if x.dtype.kind in "iu" and x.dtype != np.uint8 and scale is None:
        raise DataError(
            f"{place} is {x.dtype}{list(x.shape)}: for token ids state how many there "
            "are (--data.num-tokens V for ids from 0 to V - 1, 0 is padding), for "
            "numbers what to divide them by (--data.scale 1)."
        )
    by = scale or (_BYTES if x.dtype == np.uint8 else 1)
    return np.asarray(x, np.float32) / np.float32(by)


def _ids(place: str, x: np.ndarray, tokens: int) -> np.ndarray:
    if x.ndim != 2 or x.dtype.kind not in "iu":
        raise DataError(
            f"{place} is {x.dtype}{list(x.shape)}, but token ids are whole numbers "
            "[examples, length], padded with 0; leave --data.num-tokens out for others."
        )
    if x.size and not (0 <= x.min() and x.max() < tokens):
        raise DataError(
            f"{place} has ids from {x.min()} to {x.max()}, but {tokens} tokens were "
            f"stated, 0 to {tokens - 1}; replace rarer words by one id, or state more."
        )
    return x.astype(np.uint16 if tokens <= 2**16 else np.int32)


def _labels(place: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Labels as int32: one a row, or one a token."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    fits = y.shape == x.shape[:1] or (y.ndim == 2 and y.shape == x.shape)
    if not fits or y.dtype.kind not in "biu":
        raise DataError(
            f"{place} is {y.dtype}{list(y.shape)}, but must hold a whole number from 0 "
            f"for each of {len(x)} examples; number the classes."
        )
    return y.astype(np.int32)


def _classes(source: str, facts: Mapping[str, int], chosen: DataConfig) -> int:
    found = chosen.num_classes or facts.get("num_classes")
    if found:
        return found
    raise DataError(
        f"{source} does not say how many classes there are, which must be a public "
        "fact and is not counted in private rows; state it with --data.num-classes."
    )


def _check_labels(source: str, parts: Mapping[str, np.ndarray], classes: int) -> None:
    for part in ("train", "test"):
        y = parts[f"y_{part}"]
        if not len(y) and part == "train":
            raise DataError(f"x_train of {source} has no rows; give at least one.")
        if y.size and not (0 <= y.min() and y.max() < classes):
            raise DataError(
                f"y_{part} of {source} has labels from {y.min()} to {y.max()}, but "
                f"{classes} classes were stated, 0 to {classes - 1}; mend one of them."
            )


def _stated(
    whole: Mapping[str, Any], classes: int, tokens: int, chosen: DataConfig
) -> str:
    """What was taken from where, for the report."""
    words = f" Stated as public: {classes} classes"
    words += f", {tokens} tokens" if tokens else ""
    if tokens:
        return f"{words}."
    x = whole["x_train"]
    by = chosen.scale or (_BYTES if np.asarray(x[:1]).dtype == np.uint8 else 1)
    return words + (f". Inputs are divided by {by:g}." if by != 1 else ".")
