"""The data section of a configuration: which data, and what is made of them."""

from dataclasses import dataclass

from dp_ilg.experiments.config.fields import required
from dp_ilg.validation import fraction, positive, whole


@dataclass(frozen=True)
class ProjectionConfig:
    """A private projection of feature maps, paid from epsilon.

    See `dp_ilg.projection.factor_pca`. Left out, nothing is projected. `channels` and
    `positions` are how many directions are kept over each axis; `noise_multiplier` is
    that of each of the three releases.

    Example:
        >>> ProjectionConfig().wanted
        False
        >>> ProjectionConfig(channels=48, positions=36, noise_multiplier=40.0).wanted
        True
    """

    channels: int | None = None
    positions: int | None = None
    noise_multiplier: float | None = None
    whitening: float = 0.2

    def __post_init__(self):
        parts = (self.channels, self.positions, self.noise_multiplier)
        if all(part is None for part in parts):
            return
        if any(part is None for part in parts):
            raise ValueError(
                f"data.projection has channels = {self.channels}, positions = "
                f"{self.positions} and noise_multiplier = {self.noise_multiplier}, but "
                "needs all three or none."
            )
        whole("data.projection.channels", self.channels)
        whole("data.projection.positions", self.positions)
        positive("data.projection.noise_multiplier", self.noise_multiplier)
        if not 0 <= self.whitening <= 0.5:
            raise ValueError(
                f"data.projection.whitening is {self.whitening}, but must lie in "
                "[0, 0.5]."
            )

    @property
    def wanted(self) -> bool:
        """Whether anything is projected."""
        return self.channels is not None


@dataclass(frozen=True)
class AugmentConfig:
    """Several random views of each image, whose mean gradient is clipped once.

    `name` is a row of `dp_ilg.training.frameworks.images.AUGMENTATIONS`; left out, an
    image is seen as it is. `views` are drawn anew for each image at each step, and
    `pad` is how many pixels it may move each way.

    Privacy:
        A view is a function of its example and of a key alone, so that one example has
        one gradient and one clip: epsilon stays what it is.

    Example:
        >>> AugmentConfig().wanted, AugmentConfig("crop_and_mirror").num_views
        (False, 4)
        >>> AugmentConfig("crop", views=0)
        Traceback (most recent call last):
        ValueError: data.augment.views is 0, but must be a whole number of at least 1.
    """

    name: str | None = None
    views: int | None = None
    pad: int | None = None

    def __post_init__(self):
        for name, least in (("views", 1), ("pad", 0)):
            value = getattr(self, name)
            if value is None:
                continue
            whole(f"data.augment.{name}", value, least)
            if self.name is None:
                raise ValueError(
                    f"data.augment.{name} is {value}, but data.augment.name is left "
                    "out; name an augmentation, such as crop_and_mirror."
                )

    @property
    def wanted(self) -> bool:
        """Whether images are seen in other ways than as they are."""
        return self.name is not None

    @property
    def num_views(self) -> int:
        """How many views an example has."""
        return 4 if self.views is None else self.views

    @property
    def pixels(self) -> int:
        """How many pixels an image may move each way."""
        return 4 if self.pad is None else self.pad


@dataclass(frozen=True)
class DataConfig:
    """Which data: `name` is a row of the table of loaders, or data of one's own.

    Data of one's own are ``./my.npz``, ``./folder``, ``package.module:function`` or
    ``./file.py:function`` with arrays x_train, y_train, x_test and y_test.
    `validation` is the share of training examples to hold out: they are then what the
    model is evaluated on, and the test part is not kept. `features` is a row of
    `dp_ilg.experiments.data.features.FEATURES`, or a function of one's own: what inputs
    are turned into beforehand. `num_classes`, `num_tokens` (of token ids) and `scale`
    (what inputs are divided by) are public facts of data that do not state them.
    `augment` shows the network several random views of each image.

    Example:
        >>> DataConfig(name="mnist").name
        'mnist'
    """

    name: str = required("digits")
    validation: float | None = None
    features: str = "raw"
    num_classes: int | None = None
    num_tokens: int | None = None
    scale: float | None = None
    projection: ProjectionConfig = ProjectionConfig()
    augment: AugmentConfig = AugmentConfig()

    def __post_init__(self):
        for name in ("num_classes", "num_tokens"):
            if getattr(self, name) is not None:
                whole(f"data.{name}", getattr(self, name), 2)
        if self.scale is not None:
            positive("data.scale", self.scale)
        if self.validation is not None:
            fraction("data.validation", self.validation)
