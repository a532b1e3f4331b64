"""Several views of each image in a run: the loss over them, and what their keys are of.

The views of an example at a step are a function of the run's key, the step and the
number of the example, so a run that stopped sees the same ones again. Their mean
gradient is clipped once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from dp_ilg.base import LossFn
from dp_ilg.experiments.config.data import AugmentConfig, DataConfig
from dp_ilg.experiments.data.container import Dataset
from dp_ilg.experiments.data.features import EVEN, FEATURE_ROWS, RAW
from dp_ilg.training.frameworks.images import AUGMENTATIONS
from dp_ilg.training.loop.losses import (
    KeyedLoss,
    over_views,
    with_row_words,
    without_key,
)
from dp_ilg.training.loop.rows import Rows
from dp_ilg.training.run_secret import derived_secret
from dp_ilg.validation import nearest


def check_augmentation(data: DataConfig) -> None:
    """Raises for an augmentation that nobody knows, or of features that are no images.

    Args:
        data: the section ``data``.

    Raises:
        ValueError: in one sentence.

    Example:
        >>> chosen = AugmentConfig("crop_and_miror")
        >>> check_augmentation(DataConfig("digits", augment=chosen))
        Traceback (most recent call last):
        ValueError: data.augment.name is 'crop_and_miror', which is unknown; did you \
mean crop_and_mirror?
    """
    name = data.augment.name
    if name is not None and name not in AUGMENTATIONS:
        raise ValueError(
            f"data.augment.name is {name!r}, which is unknown; "
            f"{nearest(name, AUGMENTATIONS)}"
        )
    if name is not None and data.features in {*FEATURE_ROWS} - {RAW, EVEN}:
        raise ValueError(
            f"data.augment.name is {name!r}, which makes views of images, but "
            f"data.features is {data.features!r}, which are none; leave one of the two "
            "out."
        )


def with_views(data: Dataset, chosen: AugmentConfig) -> Dataset:
    """The data with a note of how they are seen; no data but images have views.

    Args:
        data: what a run trains on.
        chosen: the section ``data.augment``.

    Returns:
        The same data, with another note where there are views.

    Raises:
        ValueError: for data that are no images, and images smaller than the crop.

    Privacy:
        Views are drawn under the run's key; the guarantee is that of the examples.

    Example:
        >>> from dp_ilg.experiments.data.datasets import load_dataset
        >>> data = with_views(load_dataset("digits"), AugmentConfig("crop", 2, 1))
        >>> data.note[-57:]
        '2 random view(s) of each image (crop, by up to 1 pixels).'
    """
    if not chosen.wanted:
        return data
    shape = getattr(data.x_train, "shape", ())
    if len(shape) != 4 or np.dtype(data.x_train.dtype).kind != "f":
        raise ValueError(
            f"data.augment.name is {chosen.name!r}, which makes views of images "
            f"[height, width, channels], but {data.name} has inputs of another kind "
            "(features, texts or tables); leave data.augment out."
        )
    if chosen.pixels >= min(shape[1:3]):
        raise ValueError(
            f"data.augment.pad is {chosen.pixels}, but images of {data.name} have "
            f"{shape[1]} x {shape[2]} pixels; choose less than either."
        )
    note = (
        f"{data.note} A step sees {chosen.num_views} random view(s) of each image "
        f"({chosen.name}, by up to {chosen.pixels} pixels)."
    )
    return dataclasses.replace(data, note=note)


def seen_loss(chosen: AugmentConfig, loss: LossFn) -> LossFn:
    """The loss that a run clips the gradient of: the mean over views, if there are any.

    Args:
        chosen: the section ``data.augment``.
        loss: of one example (x, y).

    Returns:
        A loss of ((x, y), words), see `dp_ilg.training.loop.rows.row_words`; the same
        loss without views.

    Example:
        >>> seen_loss(AugmentConfig(), abs) is abs
        True
    """
    return with_row_words(_mean(chosen, loss)) if chosen.wanted else loss


def publicly_seen(chosen: AugmentConfig, loss: LossFn) -> LossFn:
    """The same mean with views under one public key: for audits and studies of layers.

    Args:
        chosen: the section ``data.augment``.
        loss: of one example (x, y).

    Returns:
        A loss of one example (x, y).

    Privacy:
        Views are functions of their own example whatever the key, so what an audit
        bounds does not depend on it.

    Example:
        >>> publicly_seen(AugmentConfig(), abs) is abs
        True
    """
    return without_key(_mean(chosen, loss)) if chosen.wanted else loss


def _mean(chosen: AugmentConfig, loss: LossFn) -> KeyedLoss:
    augment = AUGMENTATIONS[chosen.name or ""](chosen.pixels)
    keyless: KeyedLoss = lambda params, example, key: loss(params, example)  # noqa: E731
    return over_views(keyless, chosen.num_views, augment)


def with_words(chosen: AugmentConfig, rows: Any) -> Any:
    """Rows of a batch as `seen_loss` takes them, for shapes alone.

    Args:
        chosen: the section ``data.augment``.
        rows: (x, y), arrays or shapes.

    Returns:
        Shapes of the words beside them; the same rows without views.

    Example:
        >>> rows = np.zeros((6, 8, 8, 1)), np.zeros(6)
        >>> with_words(AugmentConfig("crop"), rows)[1].shape
        (6, 5)
    """
    if not chosen.wanted:
        return rows
    return rows, jax.ShapeDtypeStruct((rows[1].shape[0], 5), np.uint32)


def rows_of(chosen: AugmentConfig, rows: Any, sampler_key: Any) -> Any:
    """What a feed reads: rows with the words of their views beside them.

    Args:
        chosen: the section ``data.augment``.
        rows: (x, y) of all examples.
        sampler_key: of the run; the words are derived from it by a hash of its own.

    Returns:
        A source for `dp_ilg.training.feeds.Feed`; the same rows without views.

    Privacy:
        The words are as secret as the key, and as independent of the draws as
        BLAKE2b is random.

    Example:
        >>> rows = np.zeros((6, 8, 8, 1)), np.zeros(6)
        >>> source = rows_of(AugmentConfig("crop"), rows, jax.random.key(0))
        >>> source.rows_at(3, np.array([5]))[1][0, 2:].tolist()
        [3, 0, 5]
    """
    if not chosen.wanted:
        return rows
    found = Rows(rows)
    key = np.asarray(jax.random.key_data(sampler_key)).astype("<u4").tobytes()
    secret = derived_secret(key, "views", {})
    found.words = np.frombuffer(secret, "<u4")[:2].astype(np.uint32)
    return found
