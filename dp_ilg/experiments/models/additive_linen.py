"""A sum of one table a column, in Flax linen: what ratings and codes are made of."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp


def crossed(vectors: list[Any]) -> Any:
    """Sum over all pairs of columns of the products of their vectors.

    Args:
        vectors: one ``[..., rank]`` a column.

    Returns:
        ``[...]``.

    Example:
        >>> float(crossed([jnp.array([2.0]), jnp.array([3.0]), jnp.array([5.0])]))
        31.0

    Reference:
        Rendle, "Factorization Machines", ICDM 2010, lemma 3.1.
    """
    total = sum(vectors)
    squares = sum(vector**2 for vector in vectors)
    return jnp.sum(total**2 - squares, axis=-1) / 2


class Additive(nn.Module):
    """Bias, one table a column, a line for the numbers, slopes and products.

    Every part is multiplied with a public scale: parts of a large scale learn fast and
    take much of an example's clipped length, as features of a linear model do. `slopes`
    gives the rows of a column a line of their own on the numbers, and `rank` adds the
    products of all pairs of columns. All but the products begin at zero, and without
    them the model is linear.

    Example:
        >>> import jax
        >>> scales = dict(scales=(1.0, 1.0, 0.5, 0.1), slopes=(0.4, 0.0))
        >>> net = Additive(categories=(3, 5), numbers=2, outputs=1, rank=0, **scales)
        >>> x = (jnp.array([[2, 4]]), jnp.ones((1, 2)))
        >>> sorted(net.init(jax.random.key(0), x)["params"])
        ['bias', 'column_0', 'column_1', 'numbers', 'slopes_0']
    """

    categories: tuple[int, ...]
    numbers: int
    outputs: int
    scales: tuple[float, ...]
    slopes: tuple[float, ...]
    rank: int = 0
    stddev: float = 0.1

    @nn.compact
    def __call__(self, x):
        """Maps (categories ``[batch, columns]``, numbers ``[batch, k]``) to scores."""
        ids, numbers = x
        zeros = nn.initializers.zeros
        scales, columns = self.scales, len(self.categories)
        total = scales[-1] * self.param("bias", zeros, (self.outputs,))
        if self.numbers:
            line = nn.Dense(
                self.outputs, use_bias=False, kernel_init=zeros, name="numbers"
            )
            total = total + scales[-2] * line(numbers)
        for i in range(columns):
            total = total + scales[i] * self._rows(f"column_{i}", i, ids, self.outputs)
            if self.slopes[i]:
                width = self.numbers * self.outputs
                own = self._rows(f"slopes_{i}", i, ids, width)
                own = own.reshape(len(own), self.outputs, self.numbers)
                total = total + self.slopes[i] * jnp.einsum("bok,bk->bo", own, numbers)
        if not self.rank:
            return total
        return total + crossed([self._factors(i, ids) for i in range(columns)])

    def _rows(self, name: str, column: int, ids: Any, width: int) -> Any:
        count = self.categories[column]
        zeros = nn.initializers.zeros
        return nn.Embed(count, width, embedding_init=zeros, name=name)(
            ids[:, column].astype(jnp.int32)
        )

    def _factors(self, column: int, ids: Any) -> Any:
        """The vectors of a column, one for each output."""
        normal = nn.initializers.normal(self.stddev)
        embed = nn.Embed(
            self.categories[column],
            self.outputs * self.rank,
            embedding_init=normal,
            name=f"factors_{column}",
        )
        rows = embed(ids[:, column].astype(jnp.int32))
        return rows.reshape(len(rows), self.outputs, self.rank)
