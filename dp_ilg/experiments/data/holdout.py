"""Held-out training examples: choices are made on them, and tests stay untouched."""

import dataclasses

import jax
import numpy as np

from dp_ilg import validation
from dp_ilg.experiments.data.container import Dataset

_SPLIT_SEED = 20_241_205  # public, and the same for every run: the split never moves


def hold_out(data: Dataset, share: float) -> Dataset:
    """Cuts a part off the training examples and puts it where the test part was.

    Args:
        data: a data set.
        share: of its training examples, strictly between 0 and 1.

    Returns:
        A data set of fewer training examples whose ``x_test`` and ``y_test`` are the
        ones cut off; the test part is gone. Both keep the order of `data`.

    Raises:
        ValueError: for a share out of range or one that leaves a part empty.

    Privacy:
        The split depends on the number of training examples alone. Held-out examples
        are private too, and an accuracy on them is computed without noise: no
        guarantee covers it, as the note of the data set says.

    Example:
        >>> from dp_ilg.experiments.data.datasets import load_dataset
        >>> digits = hold_out(load_dataset("digits"), 0.2)
        >>> len(digits.y_train), len(digits.y_test)
        (1150, 287)
    """
    validation.fraction("data.validation", share)
    count = len(data.y_train)
    held = round(share * count)
    if not 0 < held < count:
        raise ValueError(
            f"data.validation is {share}, which holds out {held} of {count} examples; "
            "choose a share that leaves some on both sides."
        )
    order = np.random.default_rng(_SPLIT_SEED).permutation(count)
    cut, kept = np.sort(order[:held]), np.sort(order[held:])
    rows = lambda tree, index: jax.tree.map(lambda a: a[index], tree)  # noqa: E731
    return dataclasses.replace(
        data,
        x_train=rows(data.x_train, kept),
        y_train=data.y_train[kept],
        x_test=rows(data.x_train, cut),
        y_test=data.y_train[cut],
        note=f"{data.note} {_note(held, count)}",
    )


def _note(held: int, count: int) -> str:
    return (
        f"Accuracy is that on {held:,} of the {count:,} training examples, which were "
        "held out; the test part was not used. That accuracy is computed without noise "
        "from private examples, and the guarantee does not cover it."
    )
