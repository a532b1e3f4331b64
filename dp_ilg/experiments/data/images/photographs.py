"""Photographs that ship inside Python packages, and what is cut out of them.

They are public and have nothing to do with any data set trained on: what is computed
from them costs no budget.
"""

import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from dp_ilg.experiments.data.files import DataError

FILES = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/motorcycle_left.png"),
)
_SHRINK = (0.5, 0.25, 0.125)  # small pictures are photographs from far away
_LEAST_SIDE = 40  # pixels of a photograph that become a small picture


@functools.lru_cache(maxsize=1)
def photographs() -> tuple[np.ndarray, ...]:
    """The photographs, in the order of `FILES`.

    Returns:
        uint8 ``[height, width, 3]`` each.

    Raises:
        DataError: where scikit-image, scikit-learn or Pillow is not installed.

    Privacy:
        Public pictures, two from scikit-learn and five from scikit-image. None of them
        is in CIFAR-10.

    Example:
        >>> photographs.cache_parameters()["maxsize"]
        1
    """
    try:
        from PIL import Image

        found = []
        for package, name in FILES:
            spec = importlib.util.find_spec(package)  # not imported
            places = (spec and spec.submodule_search_locations) or [f"no {package}"]
            with Image.open(Path(places[0]) / name) as picture:
                found.append(np.asarray(picture.convert("RGB")))
    except (ImportError, OSError) as error:
        raise DataError(
            f"The photographs of scikit-learn and scikit-image cannot be read "
            f'({type(error).__name__}); pip install "dp_ilg[photographs]".'
        ) from error
    return tuple(found)


def digest(photos: tuple[np.ndarray, ...]) -> str:
    """What names the photographs in the digest of what was computed from them.

    Args:
        photos: ``[height, width, 3]`` each.

    Returns:
        16 hexadecimal digits of all pixels.

    Example:
        >>> one = np.zeros((2, 2, 3), np.uint8)
        >>> digest((one,)) == digest((one + 1,))
        False
    """
    found = hashlib.sha256()
    for photo in photos:
        found.update(f"{photo.shape} ".encode())
        found.update(np.ascontiguousarray(photo).data)
    return found.hexdigest()[:16]


def patches(
    photos: tuple[np.ndarray, ...], number: int, size: int, seed: int
) -> np.ndarray:
    """Small squares from random places of the photographs, shrunk to 1/2, 1/4 and 1/8.

    Args:
        photos: ``[height, width, 3]`` each, bytes.
        number: how many.
        size: their side in pixels.
        seed: of the places; public.

    Returns:
        float32 ``[number, size, size, 3]`` in [0, 1]; half of them are mirrored.

    Example:
        >>> photo = np.full((64, 64, 3), 51, np.uint8)
        >>> patches((photo,), 2, 6, seed=0).shape
        (2, 6, 6, 3)
    """
    dice = np.random.default_rng(seed)
    images = [_shrunk(photo, by) for photo in photos for by in _SHRINK]
    images = [image for image in images if min(image.shape[:2]) >= size]
    found = np.empty((number, size, size, 3), np.float32)
    for place in found:
        image = images[dice.integers(len(images))]
        row = dice.integers(image.shape[0] - size + 1)
        column = dice.integers(image.shape[1] - size + 1)
        here = image[row : row + size, column : column + size]
        place[:] = here[:, ::-1] if dice.random() < 0.5 else here
    return found


def crops(
    photos: tuple[np.ndarray, ...], number: int, side: int, seed: int
) -> np.ndarray:
    """Squares of random size and place, shrunk to small pictures.

    Args:
        photos: ``[height, width, 3]`` each, bytes.
        number: how many.
        side: of the small pictures, in pixels.
        seed: of the places; public.

    Returns:
        float32 ``[number, side, side, 3]`` in [0, 1]; half of them are mirrored.

    Example:
        >>> photo = np.full((64, 64, 3), 51, np.uint8)
        >>> crops((photo,), 2, 8, seed=0).round(2).max().item()
        0.20000000298023224
    """
    dice = np.random.default_rng(seed)
    found = np.empty((number, side, side, 3), np.float32)
    pictures = [_picture(photo) for photo in photos]
    for place in found:
        picture = pictures[dice.integers(len(pictures))]
        least = np.log(min(_LEAST_SIDE, *picture.size))
        whole = int(np.exp(dice.uniform(least, np.log(min(picture.size)))))
        left = dice.integers(picture.width - whole + 1)
        top = dice.integers(picture.height - whole + 1)
        box = (left, top, left + whole, top + whole)
        here = np.asarray(picture.resize((side, side), _box(), box=box), np.float32)
        place[:] = (here[:, ::-1] if dice.random() < 0.5 else here) / 255
    return found


def _shrunk(photo: np.ndarray, by: float) -> np.ndarray:
    height, width = photo.shape[:2]
    size = (max(int(width * by), 1), max(int(height * by), 1))
    return np.asarray(_picture(photo).resize(size, _box()), np.float32) / 255


def _picture(photo: np.ndarray) -> Any:
    from PIL import Image

    return Image.fromarray(photo)


def _box() -> Any:
    """The mean over the pixels that become one."""
    from PIL import Image

    return Image.Resampling.BOX
