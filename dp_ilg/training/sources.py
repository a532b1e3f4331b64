"""Where training rows come from: one interface for memory, files and other libraries.

A source has a length and gives rows by position. Whatever `dp_ilg.sampling.gather.take`
reads becomes one: arrays, memory maps, folders of shards, a ``datasets.Dataset``, a
Grain source or ``MapDataset``, a list. Positions come from the Poisson sampler alone,
so a loader's own shuffling and batching stay unused: they would not be the sample that
is accounted.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from dp_ilg.sampling.gather import length, take


@runtime_checkable
class Source(Protocol):
    """What a `Feed` reads.

    Privacy:
        An error of `rows` may name rows or quote them; the feed drops its words.

    Example:
        >>> isinstance(GatheredSource([1.0, 2.0]), Source)
        True
    """

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def rows(self, indices: np.ndarray) -> Any:
        """Gives rows by position.

        Args:
            indices: int64[rows]; -1 is padding.

        Returns:
            A tree of arrays with a leading axis of that length; what padding rows hold
            does not matter.
        """
        ...


class GatheredSource:
    """Rows of anything that has a length and positions, made into examples.

    Example:
        >>> people = [{"age": 31, "name": "a"}, {"age": 47, "name": "b"}]
        >>> source = GatheredSource(people, lambda rows: rows["age"] / 100)
        >>> len(source), source.rows(np.array([1, -1])).tolist()
        (2, [0.47, 0.0])
    """

    def __init__(self, data: Any, make: Callable[[Any], Any] = lambda rows: rows):
        """Takes the rows and what to make of a batch of them.

        Args:
            data: what `dp_ilg.sampling.gather.take` reads.
            make: a batch of rows -> what the loss takes; row i of its result must
                depend on row i alone, or one example would reach the others'
                gradients.
        """
        self._data, self._make = data, make

    def __len__(self) -> int:
        return length(self._data)

    def rows(self, indices: np.ndarray) -> Any:
        """Gathers rows; see `Source.rows`."""
        return self._make(take(self._data, indices))
