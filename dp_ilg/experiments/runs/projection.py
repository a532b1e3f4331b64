"""The private projection of a run's inputs: fitted under its key, kept in its folder.

The basis is a release, charged in the plan. It is a function of (data, key), and a
resumed run reads it from the folder instead of releasing it again.
"""

import dataclasses
import io
from typing import Any

import jax
import numpy as np

from dp_ilg.experiments.config.data import ProjectionConfig
from dp_ilg.experiments.config.schema import Config
from dp_ilg.experiments.data.container import Dataset
from dp_ilg.projection.factor_pca import FactorPca, private_factor_pca

FILE = "projection.npz"
_USE = 0x0B_A5_15  # folded into the sampler's key, which steps fold differently


def check_probe(config: Config, data: Dataset) -> None:
    """Refuses synthetic images where a projection stands between them and the model.

    Args:
        config: the run.
        data: before the projection.

    Raises:
        ValueError: in one sentence.

    Example:
        >>> from dp_ilg.experiments.data.datasets import load_dataset
        >>> check_probe(Config(), load_dataset("digits"))
    """
    chosen, projected = config.probe.batch, config.data.projection.wanted
    if config.optimizer.source != "probe" or not projected or data.made_of is None:
        return
    if chosen == "pink_images":
        raise ValueError(
            f"probe.batch is {chosen!r}, but data.projection is made after the first "
            'probe, which cannot project images; take probe.batch = "gaussian", which '
            "fills projected features, or leave the projection out."
        )


def stand_in(data: Dataset, chosen: ProjectionConfig) -> Dataset:
    """Inputs of the projected shape that hold nothing, to plan and compile with.

    Args:
        data: with feature maps.
        chosen: the projection.

    Returns:
        The data set with inputs of zeros that take no memory.

    Raises:
        ValueError: for data without maps, or more directions than they have.

    Example:
        >>> from dp_ilg.experiments.data.datasets import load_dataset
        >>> stand_in(load_dataset("digits"), ProjectionConfig(2, 2, 1.0))
        Traceback (most recent call last):
        ValueError: data.projection needs feature maps, but ... "scattering" ...
    """
    if data.map_shape is None:
        raise ValueError(
            f"data.projection needs feature maps, but {data.name} as configured has "
            'none; set data.features to "scattering" or leave the projection out.'
        )
    sizes = (chosen.channels or 0, chosen.positions or 0)
    for name, size, most in zip(
        ("channels", "positions"), sizes, data.map_shape, strict=True
    ):
        if size > most:
            raise ValueError(
                f"data.projection.{name} is {size}, but the maps of {data.name} have "
                f"{most}; choose at most {most}."
            )
    empty = lambda a: np.broadcast_to(np.float32(0), (len(a), sizes[0] * sizes[1]))  # noqa: E731
    return dataclasses.replace(
        data,
        x_train=empty(data.x_train),
        x_test=empty(data.x_test),
        map_shape=None,
        made_of=None,
    )


def fit(data: Dataset, chosen: ProjectionConfig, sampler_key: Any) -> FactorPca:
    """Makes the release, under a key derived from the sampler's.

    Args:
        data: with feature maps.
        chosen: the projection.
        sampler_key: of the run.

    Returns:
        The projection, which is public.

    Privacy:
        That of `factor_pca.private_factor_pca` on the training inputs.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(9, 12)).astype(np.float32)
        >>> data = Dataset("d", x, np.zeros(9, int), x, np.zeros(9, int), 2, "",
        ...     map_shape=(3, 4))
        >>> fit(data, ProjectionConfig(2, 2, 1.0), jax.random.key(0)).num_features
        4
    """
    maps = _Maps(data.x_train, data.map_shape or ())
    return private_factor_pca(
        maps,
        chosen.channels or 0,
        chosen.positions or 0,
        noise_multiplier=chosen.noise_multiplier or 0.0,
        key=jax.random.fold_in(sampler_key, _USE),
        whitening=chosen.whitening,
    )


def apply(data: Dataset, pca: FactorPca) -> Dataset:
    """Replaces inputs by their projections.

    Args:
        data: with feature maps.
        pca: what `fit` gave.

    Returns:
        The data set with float32[N, pca.num_features] inputs.

    Example:
        >>> x = np.random.default_rng(0).normal(size=(9, 12)).astype(np.float32)
        >>> data = Dataset("d", x, np.zeros(9, int), x, np.zeros(9, int), 2, "",
        ...     map_shape=(3, 4))
        >>> pca = fit(data, ProjectionConfig(2, 2, 1.0), jax.random.key(0))
        >>> apply(data, pca).x_train.shape
        (9, 4)
    """
    return dataclasses.replace(
        data,
        x_train=pca.project(data.x_train),
        x_test=pca.project(data.x_test),
        map_shape=None,
        made_of=None,
        note=f"{data.note} Inputs are projected by a private factor PCA.",
    )


def to_bytes(pca: FactorPca) -> bytes:
    """A projection as the content of an .npz file.

    Example:
        >>> one = np.ones((1, 1), np.float32)
        >>> from_bytes(to_bytes(FactorPca(one, one, one, one, 2.0))).noise_multiplier
        2.0
    """
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {k: np.asarray(v) for k, v in pca._asdict().items()}
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def from_bytes(content: bytes) -> FactorPca:
    """Reads what `to_bytes` wrote.

    Raises:
        ValueError: if it is anything else.

    Example:
        >>> from_bytes(b"")
        Traceback (most recent call last):
        ValueError: The projection is damaged; restore it from a copy.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            found = FactorPca(*(file[name] for name in FactorPca._fields))
        return found._replace(noise_multiplier=float(found.noise_multiplier))
    except Exception:  # noqa: BLE001 - zip, npy and lookup errors alike
        raise ValueError("The projection is damaged; restore it from a copy.") from None


class _Maps:
    """Flat rows seen as [channels, positions], without reading a mapped file."""

    def __init__(self, rows: Any, map_shape: tuple[int, ...]):
        self._rows = rows
        self.shape = (len(rows), *map_shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, which: slice) -> np.ndarray:
        return np.asarray(self._rows[which]).reshape(-1, *self.shape[1:])
