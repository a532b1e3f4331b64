"""What one training run is: frozen dataclasses, read from TOML and written back.

The defaults are the bundled digits run, so an installed wheel trains without any
file. A number that decides the guarantee is stated in the file or refused: nothing
about privacy is inherited silently from the digits.
"""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from dp_ilg.experiments.config.data import DataConfig
from dp_ilg.experiments.config.fields import (
    assignments,
    from_mapping,
    given,
    json_rows,
    required,
)
from dp_ilg.experiments.config.metrics import MetricsConfig
from dp_ilg.experiments.config.report import ReportConfig
from dp_ilg.experiments.config.run import RunConfig, flag
from dp_ilg.experiments.config.sources import PriorConfig, ProbeConfig
from dp_ilg.validation import fraction, positive, rate, whole


@dataclass(frozen=True)
class ModelConfig:
    """Which network, and its sizes: a row of `models.networks.MODELS`.

    A size left out (None) is the model's own default; a size the model does not
    have is refused when the model is built.

    Example:
        >>> ModelConfig(name="cnn", hidden=(32,)).options()
        {'hidden': (32,)}
    """

    name: str = required("mlp")
    framework: Literal["linen", "nnx"] = "linen"
    hidden: tuple[int, ...] | None = None
    activation: Literal["tanh", "relu", "gelu"] | None = None
    channels: tuple[int, ...] | None = None
    embed_dim: int | None = None
    embed_scale: float | None = None
    embed_init: float | None = None
    depth: int | None = None
    heads: int | None = None
    length: int | None = None
    scales: tuple[float, ...] | None = None
    slopes: tuple[float, ...] | None = None
    order: Literal["conv_norm_relu", "conv_relu_norm"] | None = None

    def __post_init__(self):
        checks: dict[str, Any] = {"slopes": rate}
        checks |= dict.fromkeys(("embed_scale", "embed_init", "scales"), positive)
        words = ("name", "framework", "activation", "order")
        for name, value in given(self, *words).items():
            check = checks.get(name, whole)
            for size in value if isinstance(value, tuple) else (value,):
                check(f"model.{name}", size)

    def options(self) -> dict[str, Any]:
        """Returns the sizes that were given, as keyword arguments of the builder."""
        return given(self, "name", "framework")


@dataclass(frozen=True)
class ScheduleConfig:
    """The shape of the noise over steps: a row of `dp_ilg.schedules.SCHEDULES`.

    Example:
        >>> ScheduleConfig(name="linear", end=0.5).options()
        {'end': 0.5}
    """

    name: str = required("constant")
    decay: float | None = None
    floor: float | None = None
    end: float | None = None
    rate: float | None = None
    values: tuple[float, ...] | None = None

    def options(self) -> dict[str, Any]:
        """Returns the parameters that were given, for the schedule's factory."""
        return given(self, "name")


@dataclass(frozen=True)
class PrivacyConfig:
    """The claim and what it costs: everything `dp_ilg.plan_privacy` is told.

    Privacy:
        These fields, the number of training examples and the sampler decide
        (epsilon, delta); the batch size is the expected one of a Poisson sample, which
        `max_batch_size` cuts where it is larger, at a cost that epsilon includes. With
        `bands` noise is correlated over as many steps, which draw from parts in turn.

    Example:
        >>> PrivacyConfig(epsilon=-1.0)
        Traceback (most recent call last):
        ValueError: privacy.epsilon is -1.0, but must be a finite number above 0.
    """

    epsilon: Annotated[float, flag("--epsilon")] = required(8.0)
    delta: Annotated[float, flag("--delta")] = required(1e-5)
    batch_size: Annotated[int, flag("--batch-size")] = required(256)
    num_steps: Annotated[int, flag("--num-steps")] = required(200)
    l2_clip_norm: float = 1.0
    clip_mode: Literal["joint", "normalize", "per_layer"] = "joint"
    score_budget: float = 0.01
    accountant: Literal["pld", "rdp", "zcdp"] = "pld"
    neighboring_relation: Literal["add_or_remove_one", "replace_one"] = (
        "add_or_remove_one"
    )
    schedule: ScheduleConfig = ScheduleConfig()
    num_stages: int = 16
    max_batch_size: int | None = None
    bands: int | Literal["auto"] | None = None
    noise: Annotated[Literal["default", "exact"], flag("--noise")] = "default"

    def __post_init__(self):
        positive("privacy.epsilon", self.epsilon)
        fraction("privacy.delta", self.delta)
        whole("privacy.batch_size", self.batch_size)
        whole("privacy.num_steps", self.num_steps)
        positive("privacy.l2_clip_norm", self.l2_clip_norm)
        fraction("privacy.score_budget", self.score_budget, include_zero=True)
        whole("privacy.num_stages", self.num_stages)
        if self.max_batch_size is not None:
            whole("privacy.max_batch_size", self.max_batch_size, self.batch_size)
        if self.bands is not None and self.bands != "auto":
            whole("privacy.bands", self.bands)


@dataclass(frozen=True)
class LearningRateConfig:
    """How the learning rate moves: a warm-up, then constant, cosine or linear.

    `end` is the share of the learning rate that is left at the last step.

    Example:
        >>> LearningRateConfig(name="cosine", warmup_steps=10).end
        0.0
    """

    name: Literal["constant", "cosine", "linear"] = required("constant")
    warmup_steps: int = 0
    end: float = 0.0

    def __post_init__(self):
        whole("optimizer.learning_rate_schedule.warmup_steps", self.warmup_steps, 0)


@dataclass(frozen=True)
class BlockConfig:
    """One leaf cut into blocks along an axis: `dp_ilg.layers.blocks`, in a file.

    Example:
        >>> BlockConfig(path="embedding", num_blocks=8).axis
        0
    """

    path: str = required("")
    axis: int = 0
    num_blocks: int | None = None
    edges: tuple[int, ...] | None = None

    def __post_init__(self):
        if (self.num_blocks is None) == (self.edges is None):
            raise ValueError(
                f"optimizer.blocks for {self.path!r} has num_blocks = "
                f"{self.num_blocks} and edges = {self.edges}, but must have exactly "
                "one of them."
            )


Blocks = Annotated[tuple[BlockConfig, ...], json_rows(BlockConfig)]


@dataclass(frozen=True)
class OptimizerConfig:
    """Which method, and what it does: importance, groups, Adam.

    `method` is a row of `dp_ilg.baselines.BASELINES`; an option the method does not
    have is refused, not ignored. The last five are for methods that have them.

    Example:
        >>> OptimizerConfig(importance="uniform").importance  # DP-Adam, exactly
        'uniform'
    """

    learning_rate: Annotated[float, flag("--learning-rate")] = required(0.02)
    learning_rate_schedule: LearningRateConfig = LearningRateConfig()
    method: str = "dp_adam_ilg"
    importance: Annotated[str, flag("--importance")] = "min_noise_energy"
    source: Literal["scores", "released", "public", "prior", "probe"] = "scores"
    score: str = "l2"
    layers: Literal["module", "leaf"] = "module"
    blocks: Blocks = ()
    frozen: tuple[str, ...] = ()
    adam: Literal["plain", "noise_corrected", "balanced"] = "plain"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    ema_decay: float = 0.9
    floor: float = 0.01
    weight_decay: float = 0.0
    average: float = 0.0
    momentum: float | None = None
    quantile: float | None = None
    step_size: float | None = None
    gamma: float | None = None
    scale_eps: float | None = None

    def __post_init__(self):
        positive("optimizer.learning_rate", self.learning_rate)
        positive("optimizer.eps", self.eps)
        fraction("optimizer.floor", self.floor)
        for name in ("b1", "b2", "ema_decay", "weight_decay", "average"):
            value = getattr(self, name)
            fraction(f"optimizer.{name}", value, include_zero=True)


@dataclass(frozen=True)
class Config:
    """One training run; the defaults are the bundled digits.

    Example:
        >>> config = Config()
        >>> config.data.name, config.privacy.epsilon
        ('digits', 8.0)
    """

    data: DataConfig = field(default=DataConfig(), metadata={"required": True})
    model: ModelConfig = field(default=ModelConfig(), metadata={"required": True})
    privacy: PrivacyConfig = field(default=PrivacyConfig(), metadata={"required": True})
    optimizer: OptimizerConfig = field(
        default=OptimizerConfig(), metadata={"required": True}
    )
    prior: PriorConfig = PriorConfig()
    probe: ProbeConfig = ProbeConfig()
    run: RunConfig = RunConfig()
    metrics: MetricsConfig = MetricsConfig()
    report: ReportConfig = ReportConfig()


_LEFT_OUT = {"report": ReportConfig(), "prior": PriorConfig(), "probe": ProbeConfig()}


def read_config(path: Path) -> Config:
    """Reads and checks a TOML file.

    Args:
        path: the file.

    Returns:
        The configuration.

    Raises:
        ValueError: in one sentence, for a file that cannot be read or is no TOML,
            and for unknown, missing or mistyped fields.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "digits.toml"
        >>> _ = path.write_text(config_to_toml(Config()))
        >>> read_config(path) == Config()
        True
    """
    try:
        mapping = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"The config {path} cannot be read: {reason}.") from None
    except (ValueError, RecursionError) as error:  # its own errors are ValueErrors
        raise ValueError(f"The config {path} is not valid TOML: {error}.") from None
    return config_from_mapping(mapping, source=str(path))


def config_from_mapping(mapping: dict[str, Any], source: str = "config") -> Config:
    """Checks a mapping of sections, as TOML gives it.

    Args:
        mapping: sections to fields.
        source: how errors name it.

    Returns:
        The configuration.

    Raises:
        ValueError: for unknown, missing or mistyped fields, in one sentence.

    Example:
        >>> config_from_mapping({"date": {}})
        Traceback (most recent call last):
        ValueError: config has an unknown section date; did you mean data?
    """
    return from_mapping(Config, mapping, source=source)


def config_to_toml(config: Config, *, seed: bool = False) -> str:
    """Writes a configuration as TOML that `read_config` reads back.

    Args:
        config: the configuration.
        seed: whether to write the seed too.

    Returns:
        The text; fields that are None are left out, and sections of which nothing is
        said: report, prior and probe.

    Privacy:
        The seed is left out unless asked for: who knows it can subtract the noise.

    Example:
        >>> print(config_to_toml(Config()).splitlines()[0:2])
        ['[data]', 'name = "digits"']
    """
    if not seed:
        config = dataclasses.replace(
            config, run=dataclasses.replace(config.run, seed=None)
        )
    sections = []
    for name in get_type_hints(Config):
        if getattr(config, name) == _LEFT_OUT.get(name, ()):
            continue
        lines = [f"[{name}]", *assignments(getattr(config, name))]
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"
