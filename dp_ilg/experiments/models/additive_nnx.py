"""The sum of one table a column, in Flax NNX."""

from typing import Any

import jax.numpy as jnp
from flax import nnx

from dp_ilg.experiments.models.additive_linen import crossed


class Additive(nnx.Module):
    """As `dp_ilg.experiments.models.additive_linen.Additive`.

    Example:
        >>> sizes = dict(categories=(3, 5), numbers=2, outputs=1, slopes=(0.4, 0.0))
        >>> net = Additive(**sizes, scales=(1.0, 1.0, 0.5, 0.1), rngs=nnx.Rngs(0))
        >>> net((jnp.array([[2, 4]]), jnp.ones((1, 2)))).shape
        (1, 1)
    """

    def __init__(
        self,
        *,
        categories,
        numbers,
        outputs,
        scales,
        slopes,
        rngs,
        rank=0,
        stddev=0.1,
    ):
        self.outputs, self.rank = outputs, rank
        self.scales, self.slope_scales = tuple(scales), tuple(slopes)
        self.bias = nnx.Param(jnp.zeros((outputs,)))
        zeros, normal = nnx.initializers.zeros, nnx.initializers.normal(stddev)
        if numbers:
            self.numbers = nnx.Linear(
                numbers, outputs, use_bias=False, kernel_init=zeros, rngs=rngs
            )
        for i, count in enumerate(categories):
            tables = (
                {"column": outputs}
                if not slopes[i]
                else {"column": outputs, "slopes": numbers * outputs}
            )
            for name, width in tables.items():
                made = nnx.Embed(count, width, embedding_init=zeros, rngs=rngs)
                setattr(self, f"{name}_{i}", made)
            if rank:
                shape = (count, outputs * rank)
                made = nnx.Embed(*shape, embedding_init=normal, rngs=rngs)
                setattr(self, f"factors_{i}", made)

    def __call__(self, x):
        """Maps (categories ``[batch, columns]``, numbers ``[batch, k]``) to scores."""
        ids, numbers = x
        columns = ids.shape[1]
        total = self.scales[-1] * self.bias[...]
        if numbers.shape[-1]:
            total = total + self.scales[-2] * self.numbers(numbers)
        for i in range(columns):
            total = total + self.scales[i] * self._rows("column", i, ids)[..., 0]
            if self.slope_scales[i]:
                own = self._rows("slopes", i, ids)
                line = jnp.einsum("bok,bk->bo", own, numbers)
                total = total + self.slope_scales[i] * line
        if not self.rank:
            return total
        return total + crossed([self._rows("factors", i, ids) for i in range(columns)])

    def _rows(self, name: str, column: int, ids: Any) -> Any:
        """What a table says of each example, ``[batch, outputs, width]``."""
        table = getattr(self, f"{name}_{column}")
        rows = table(ids[:, column].astype(jnp.int32))
        return rows.reshape(len(rows), self.outputs, -1)
