"""Residual networks with GroupNorm: no layer mixes examples, so each has a gradient."""

import flax.linen as nn


class ResNet(nn.Module):
    """Three stages of residual blocks of two 3 x 3 convolutions, as on CIFAR-10.

    With one block a stage and widths 16, 32, 64 it has eight layers with weights on
    the way and 0.08 million parameters; the paper's ResNet-18 has 11 million and takes
    about 45 times the work.

    Attributes:
        outputs: number of classes.
        widths: channels of each stage; every stage but the first halves the image.
        blocks: residual blocks of a stage.
        groups: of GroupNorm; divides every width.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> net = ResNet(10, widths=(4, 8, 8), groups=2)
        >>> image = jnp.zeros((1, 8, 8, 3))
        >>> found = jax.eval_shape(net.init, jax.random.key(0), image)
        >>> list(found), found["params"]["stage_1_block_0_shortcut"]["kernel"].shape
        (['params'], (1, 1, 4, 8))

    Reference: He et al. 2016, section 4.2; Wu and He 2018 (GroupNorm).
    """

    outputs: int
    widths: tuple[int, ...] = (16, 32, 64)
    blocks: int = 1
    groups: int = 8

    @nn.compact
    def __call__(self, x):
        """Maps ``[batch, height, width, channels]`` to logits."""
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(nn.GroupNorm(self.groups, name="stem_norm")(x))
        for stage, width in enumerate(self.widths):
            for block in range(self.blocks):
                stride = 2 if stage and not block else 1
                x = self._block(x, width, stride, f"stage_{stage}_block_{block}")
        return nn.Dense(self.outputs, name="output")(x.mean((-3, -2)))

    def _block(self, x, width, stride, name):
        conv = lambda size, stride, part: nn.Conv(  # noqa: E731
            width, (size, size), stride, use_bias=False, name=f"{name}_{part}"
        )
        norm = lambda part: nn.GroupNorm(self.groups, name=f"{name}_{part}")  # noqa: E731
        y = nn.relu(norm("norm_0")(conv(3, stride, "conv_0")(x)))
        y = norm("norm_1")(conv(3, 1, "conv_1")(y))
        if x.shape != y.shape:
            x = conv(1, stride, "shortcut")(x)
        return nn.relu(x + y)
