"""Correlated noise as an auditor sees it: fresh draws, and what moves them.

From all releases the auditor knows the noise of every step, and from that the fresh
draws, which are independent. An example that takes part in step t moves the draws of
the steps t to t + b - 1, in the proportions of the strategy.
"""

from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg.accounting.correlated import cycles
from dp_ilg.accounting.plan import PrivacyPlan


def fresh(plan: PrivacyPlan, noise: list[Any]) -> Any:
    """The fresh draw of the last of some steps, from their noise.

    Args:
        plan: of the trainer.
        noise: what `Observer.left` returned of the gradient, of all steps so far.

    Returns:
        Leaves that are standard normal and independent of those of other steps.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=10, strategy=(1.0, 0.5))
        >>> fresh(plan, [[np.ones(1)], [np.ones(1)]])[0].tolist()
        [1.5]
    """
    pairs = list(zip(plan.strategy or (1.0,), reversed(noise), strict=False))
    return [
        sum(c * step[place] for c, step in pairs) for place in range(len(noise[-1]))
    ]


class Blocks:
    """Adds up the canaries' log-likelihood ratios, a step once its block is complete.

    Attributes:
        plan: of the trainer.
        parts: int[runs], the part of the data that the canary belongs to.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=500, strategy=(1.0, 0.5))
        >>> blocks = Blocks(plan, np.array([0]))
        >>> for _ in range(2):
        ...     blocks.add([jnp.ones((1, 1))], [jnp.ones((1, 3, 1))], jnp.zeros((1, 3)))
        >>> blocks.total().tolist()
        [[1.125, 1.125, 1.125]]
    """

    def __init__(self, plan: PrivacyPlan, parts: np.ndarray):
        """Starts before the first step."""
        self.plan, self.parts = plan, np.asarray(parts)
        self._noise: deque[list[Any]] = deque(maxlen=plan.bands)
        self._waiting: deque[tuple] = deque()
        self._step, self._sum = 0, np.zeros(())

    def add(self, left: list[Any], moved: list[Any], small: Any) -> None:
        """Takes in what a step released.

        Args:
            left: whitened noise leaves, ``[runs, *shape]``.
            moved: by how much each canary moves them, ``[runs, canaries, *shape]``.
            small: log-likelihood ratios of what is released beside, ``[runs,
                canaries]``, of a canary that was drawn.
        """
        self._noise.append(left)
        draw = fresh(self.plan, list(self._noise))
        self._waiting.append((self._step, moved, small, []))
        for begun, shift, _, products in self._waiting:
            c = (self.plan.strategy or (1.0,))[self._step - begun]
            products.append(_products(draw, shift, c))
        self._step += 1
        if self._step - self._waiting[0][0] == self.plan.bands:
            self._settle()

    def total(self) -> np.ndarray:
        """The sums over all steps, ``[runs, canaries]``; nothing can be added after."""
        while self._waiting:
            self._settle()
        return self._sum

    def _settle(self) -> None:
        step, _, small, products = self._waiting.popleft()
        rate = cycles.sampling_rate(self.plan)
        drawn = np.asarray(sum(products) + small, np.float64)
        ratio = (
            drawn if rate == 1 else np.logaddexp(np.log1p(-rate), np.log(rate) + drawn)
        )
        own = (self.parts == step % self.plan.bands)[:, None]
        self._sum = self._sum + np.where(own, ratio, 0.0)


@jax.jit
def _products(draw: list[Any], moved: list[Any], c: Any) -> Any:
    """What one draw of a block says of every canary, ``[runs, canaries]``."""

    def one(draw: list[Any], moved: list[Any]) -> Any:
        pairs = zip(draw, moved, strict=True)
        return sum(c * jnp.vdot(z, m) - c * c * jnp.vdot(m, m) / 2 for z, m in pairs)

    return jax.vmap(jax.vmap(one, (None, 0)))(draw, moved)
