"""Which rows of a step's batch a process reads: its own, and nobody else's.

All processes draw the step's Poisson sample from one key, so they agree on it without
a word; each owns one stretch of the data and reads the drawn rows that lie in it.
"""

import math
from typing import Any, SupportsIndex

import jax
import numpy as np
from jax.sharding import Mesh

from dp_ilg.sampling.poisson import Chunk, PoissonSampler
from dp_ilg.training.mesh import row_sharding


class OwnRows(PoissonSampler):
    """A sampler whose chunks hold the drawn rows that one process owns.

    Process p of n owns rows ``[p N / n, (p + 1) N / n)``. Every process has as many
    chunks of one size as the one that drew most, all padding where it drew nobody, so
    that all take part in every sum.

    Attributes:
        owned: first and last row (exclusive) that this process reads.

    Privacy:
        Together the processes have the very sample of the sampler they were given.

    Example:
        >>> whole = PoissonSampler(6, 1.0, key=0)
        >>> [OwnRows(whole, p, 2, devices=2).chunks(0)[0].indices.tolist()
        ...  for p in (0, 1)]
        [[0, 1, 2, -1], [3, 4, 5, -1]]
    """

    def __init__(
        self, whole: PoissonSampler, process: int, processes: int, *, devices: int
    ):
        """Takes a sampler and the place of a process.

        Args:
            whole: draws the batches.
            process: which one this is, from 0.
            processes: how many there are.
            devices: of this process, which share a chunk evenly.
        """
        vars(self).update(vars(whole))
        self._whole = whole
        self._edges = np.arange(processes + 1) * whole.num_examples // processes
        self.owned = (int(self._edges[process]), int(self._edges[process + 1]))
        size = whole.chunk_size
        if processes > 1:
            mean = math.ceil(whole.num_examples / processes) * whole.sampling_prob
            stddev = math.sqrt(mean * (1 - whole.sampling_prob))
            size = min(size, math.ceil(mean + 6 * stddev))
        self.chunk_size = math.ceil(size / devices) * devices

    def chunks(self, step: SupportsIndex) -> list[Chunk]:
        """Returns the step's rows of this process, cut into chunks of one size.

        Args:
            step: which step, from 0.

        Returns:
            As many chunks as in every other process, at least one.

        Raises:
            ValueError: for a step that is negative, no integer or past the last one.

        Example:
            >>> nobody = PoissonSampler(6, 1e-9, key=0, chunk_size=2)
            >>> OwnRows(nobody, 0, 2, devices=1).chunks(0)[0].indices.tolist()
            [-1]
        """
        drawn = self._whole.indices(step)
        places = np.searchsorted(drawn, self._edges)
        most = int(np.diff(places).max())
        first, last = np.searchsorted(drawn, self.owned)
        count = max(1, math.ceil(most / self.chunk_size))
        rows = np.full((count, self.chunk_size), -1, np.int64)
        rows.flat[: last - first] = drawn[first:last]
        return [Chunk(row, row < 0) for row in rows]


def place_rows(mesh: Mesh, batch: Any) -> Any:
    """Lays a process's rows out on its devices, as its part of the whole batch.

    Args:
        mesh: of all processes' devices.
        batch: a tree of arrays, the first axis this process's rows.

    Returns:
        Arrays of the whole mesh, of which this process holds its own rows.

    Example:
        >>> from dp_ilg.training.mesh import make_mesh
        >>> place_rows(make_mesh(1, 1), np.ones((2, 3))).shape
        (2, 3)
    """
    at, processes = row_sharding(mesh), jax.process_count()

    def lay(rows: Any) -> jax.Array:
        rows = np.asarray(rows)
        shape = (rows.shape[0] * processes, *rows.shape[1:])
        return jax.make_array_from_process_local_data(at, rows, shape)

    return jax.tree.map(lay, batch)
