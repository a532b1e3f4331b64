"""Public sources of importance in a file: the sections `prior` and `probe`."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np

from dp_ilg.experiments.config.fields import given, json_rows
from dp_ilg.geometry import priors
from dp_ilg.optimizers.public.prior import Prior
from dp_ilg.optimizers.public.probe import Probe

Steps = Literal["restored", "whitened", "preconditioned"]


@dataclass(frozen=True)
class LawConfig:
    """A public vector for one axis of one leaf, by a law: a row of `LAWS`.

    The first `first` places are marks, such as padding, and count as rank 1.

    Example:
        >>> law = LawConfig(path="embedding", law="zipf", first=1)
        >>> [round(float(x), 2) for x in law.vector(3)]
        [0.4, 0.4, 0.2]
    """

    path: str = ""
    axis: int = 0
    law: Literal["zipf", "occurrence", "idf", "cardinality", "values"] = "zipf"
    exponent: float = 1.0
    shift: float = 0.0
    first: int = 0
    length: float = 200.0
    documents: float = 1e5
    sizes: tuple[int, ...] | None = None
    values: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        needs = {"cardinality": "sizes", "values": "values"}.get(self.law)
        if not self.path:
            raise ValueError("prior.laws has a row without path; name a parameter.")
        if needs and getattr(self, needs) is None:
            raise ValueError(
                f"prior.laws for {self.path!r} has law = {self.law!r}, which needs "
                f"{needs}; give them."
            )
        if self.axis < 0:
            raise ValueError(
                f"prior.laws for {self.path!r} has axis = {self.axis}, but axes count "
                "from 0."
            )

    def vector(self, size: int) -> Any:
        """The vector for an axis of a length.

        Raises:
            ValueError: for numbers that the law refuses.
        """
        return LAWS[self.law](self, size)


def _zipf(law: LawConfig, size: int) -> Any:
    ranks = np.maximum(np.arange(size) - law.first + 1, 1)
    return priors.zipf(ranks, law.exponent, law.shift)


def _occurrence(law: LawConfig, size: int) -> Any:
    return priors.occurrence(_zipf(law, size), law.length)


LAWS: dict[str, Callable[[LawConfig, int], Any]] = {
    "zipf": _zipf,
    "occurrence": _occurrence,
    "idf": lambda law, size: 1 / priors.idf(_occurrence(law, size), law.documents),
    "cardinality": lambda law, size: priors.cardinality(law.sizes or ()),
    "values": lambda law, size: law.values,
}
Laws = Annotated[tuple[LawConfig, ...], json_rows(LawConfig)]


@dataclass(frozen=True)
class PriorConfig:
    """A `dp_ilg.Prior`: public vectors over the entries of leaves.

    Privacy:
        Every law, number and order must be a public fact.

    Example:
        >>> PriorConfig(laws=(LawConfig(path="embedding"),)).build().steps
        'restored'
    """

    laws: Laws = ()
    rule: str | None = None
    groups: Literal["public", "scores"] = "public"
    steps: Steps = "restored"

    def build(self) -> Prior:
        """Makes the prior.

        Raises:
            ValueError: without laws, and as `dp_ilg.Prior`.
        """
        if not self.laws:
            raise ValueError(
                "optimizer.source is 'prior', but the file has no prior.laws; give "
                'some, such as [{path = "embedding", law = "zipf"}].'
            )
        if any(law.law == "idf" for law in self.laws) and self.rule != "given":
            raise ValueError(
                "prior.laws has law = 'idf', which is a scale and no share; set "
                'prior.rule = "given".'
            )
        shares: dict[str, list[Any]] = {}
        for law in self.laws:
            axes = shares.setdefault(law.path, [])
            axes += [None] * (law.axis + 1 - len(axes))
            axes[law.axis] = functools.partial(LawConfig.vector, law)
        vectors = {path: tuple(axes) for path, axes in shares.items()}
        return Prior(vectors, rule=self.rule, groups=self.groups, steps=self.steps)


@dataclass(frozen=True)
class ProbeConfig:
    """A `dp_ilg.Probe`: importance from synthetic examples.

    Privacy:
        Numbers of classes and tokens are the data set's public ones.

    Example:
        >>> ProbeConfig(depth="diagonal").build().depth
        'diagonal'
    """

    batch: str = "auto"
    depth: Literal["group", "diagonal", "kronecker"] = "group"
    every: int = 50
    num_examples: int = 64
    seed: int = 0
    damping: float = 0.1
    max_axis: int = 1024
    rule: str | None = None
    groups: Literal["probe", "scores"] = "probe"
    steps: Steps = "restored"
    microbatch_size: int = 16

    def build(self) -> Probe:
        """Makes the probe, which does not know its loss yet.

        Raises:
            ValueError: as `dp_ilg.Probe`.
        """
        return Probe(**given(self))
