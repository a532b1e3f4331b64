"""Views of images: random crops and mirror images, for losses over several views.

A row of `AUGMENTATIONS` makes an augmentation of a number of pixels; a configuration
names it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dp_ilg import validation


def crop_and_mirror(
    crop: int = 4, *, mirror: bool = True
) -> Callable[[Any, Any], tuple[Any, ...]]:
    """Makes an augmentation: moved by some pixels, and mirrored or not.

    Several views of an example, whose mean gradient is clipped once, cost no privacy
    and average the chance of the crop away. Digits and letters are other ones in a
    mirror: leave it out there.

    Args:
        crop: how many pixels an image may move up or down, left or right, each way
            with the same chance; what comes in is its own border, reflected.
        mirror: whether left and right change places in half of the views.

    Returns:
        ``augment(example, key) -> view`` for `dp_ilg.private_training`; an example is a
        tuple whose first part is one image ``[height, width, channels]``.

    Raises:
        ValueError: for a crop that is negative, or no smaller than the image.
        TypeError: for an example that is no tuple.

    Privacy:
        A view is a function of its example and key alone, so one example still has one
        gradient, whatever the number of views: the sensitivity is that of one.

    Example:
        >>> augment = crop_and_mirror(1)
        >>> image, label = augment((jnp.eye(3)[..., None], 7), jax.random.key(0))
        >>> image.shape, label
        ((3, 3, 1), 7)

    Reference: De et al. 2022, section 3 (augmentation multiplicity).
    """
    validation.whole("crop", crop, 0)

    def augment(example: Any, key: Any) -> tuple[Any, ...]:
        if not isinstance(example, tuple) or not example:
            raise TypeError(
                "crop_and_mirror makes views of tuples that begin with an image, not "
                f"of {type(example).__name__}; give private_training(augment=) a "
                "function of your own."
            )
        image, *rest = example
        if jnp.ndim(image) != 3 or crop >= min(image.shape[:2]):
            raise ValueError(
                f"crop_and_mirror moves an image by up to {crop} pixels, but got one "
                f"of shape {jnp.shape(image)}; it needs [height, width, channels], "
                "both sides longer than that."
            )
        first, second = jax.random.split(key)
        padded = jnp.pad(image, ((crop, crop), (crop, crop), (0, 0)), mode="reflect")
        row, column = jax.random.randint(first, (2,), 0, 2 * crop + 1)
        moved = jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)
        if mirror:
            moved = jnp.where(jax.random.bernoulli(second), moved[:, ::-1], moved)
        return (moved, *rest)

    return augment


def crop_only(crop: int = 4) -> Callable[[Any, Any], tuple[Any, ...]]:
    """Makes an augmentation that moves an image and never mirrors it.

    Args:
        crop: as for `crop_and_mirror`.

    Returns:
        As `crop_and_mirror`.

    Raises:
        ValueError: as `crop_and_mirror`.

    Privacy: as `crop_and_mirror`.

    Example:
        >>> image, = crop_only(1)((jnp.ones((3, 3, 1)),), jax.random.key(0))
        >>> image.shape
        (3, 3, 1)
    """
    return crop_and_mirror(crop, mirror=False)


# name -> pixels -> (example, key) -> view
AUGMENTATIONS: dict[str, Callable[[int], Callable[[Any, Any], tuple[Any, ...]]]] = {
    "crop_and_mirror": crop_and_mirror,
    "crop": crop_only,
}
