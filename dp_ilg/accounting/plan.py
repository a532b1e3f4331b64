"""The privacy plan: every number that decides the guarantee, in one place.

Sampler, clip, noise, ledger and accountant all read the same frozen object, so that
what is claimed and what is done cannot drift apart.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from dp_ilg import validation
from dp_ilg.accounting import accountants, plan_checks, sealing, truncation
from dp_ilg.accounting.charges import noise_law
from dp_ilg.accounting.correlated import cycles, strategies
from dp_ilg.accounting.statements.statement import Statement, describe

if TYPE_CHECKING:
    import dp_accounting

_LATER_FIELDS = (
    "prior_releases",
    "max_batch_size",
    "num_parameters",
    "exact_noise",
    "metric_budget",
    "row_budget",
    "strategy",
    "unit",
)
_WHOLE = ("num_examples", "batch_size", "num_steps", "max_batch_size")
_SHARES = ("score_budget", "metric_budget", "row_budget")
_REAL = ("delta", "l2_clip_norm", "target_epsilon", *_SHARES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """Sampling, noise, clip norm and length of one private training run.

    Usually made by `dp_ilg.plan_privacy`. Frozen and hashable: a jitted step may close
    over it, and it may be a key of a cache.

    Attributes:
        num_examples: the number N of training examples.
        batch_size: the *expected* batch size; every example takes part in a step
            independently with probability ``batch_size / num_examples``.
        num_steps: the number of steps, the whole budget.
        delta: the delta of the guarantee.
        l2_clip_norm: the bound C of one example's gradient.
        score_budget: the share of each step's budget spent on layer scores, in [0, 1).
        stages: pairs of a number of steps and their effective noise multiplier z.
        accountant: a key of `dp_ilg.accounting.ACCOUNTANTS`.
        neighboring_relation: a key of `dp_ilg.accounting.NEIGHBORING_RELATIONS`.
        target_epsilon: what calibration aimed at, if it did.
        prior_releases: pairs of a name and a noise multiplier, one for each noisy sum
            over *all* the training examples released beside the steps (a DP-PCA, say);
            `event`, `epsilon`, statement and ledger charge them from the start.
        max_batch_size: a draw of more examples is cut to so many, at random; None cuts
            none. What that costs is charged, see `dp_ilg.accounting.truncation`.
        num_parameters: the most coordinates that noise is drawn for in a step; None for
            as many as 1 % of delta pays for, at most 10^9 (`most_parameters`).
        exact_noise: whether noise comes from an exact sampler only, which costs next to
            nothing at any delta (`dp_ilg.noise.exact`).
        metric_budget: the share of each step's budget spent on released metrics, such
            as the training loss (`dp_ilg.release_metrics`), in [0, 1).
        row_budget: the share of each step's budget spent on choosing the rows of an
            embedding that take part (`dp_ilg.keep_rows`), in [0, 1).
        strategy: coefficients by which the gradient's noise cancels over the steps
            (`dp_ilg.accounting.correlated.strategies`); () for independent noise.
        unit: "user" where the N examples are users, each with all of theirs; None where
            they are examples.

    Raises:
        ValueError: on construction, for any value that makes no valid plan.

    Privacy:
        Every step is one Poisson-sampled Gaussian with noise multiplier z relative to
        C. Its parts see the same sample. One with a budget of share r has multiplier
        z / sqrt(r), and the gradient, with what is left, z / sqrt(1 - sum of shares);
        jointly they are z. The claim holds if batches are
        drawn by Poisson sampling with this plan's rate and one example moves the
        clipped sum by at most C. A prior release is one Gaussian without sampling, its
        multiplier relative to how far one example moves it. With a strategy of b
        coefficients, b steps are one such Gaussian (`dp_ilg.accounting.correlated`).

    Example:
        >>> plan = PrivacyPlan(
        ...     num_examples=60_000, batch_size=600, num_steps=100, delta=1e-5,
        ...     l2_clip_norm=1.0, score_budget=0.01, stages=((100, 1.0),))
        >>> round(plan.epsilon(), 2)
        0.72
        >>> plan == PrivacyPlan.from_json(plan.to_json())
        True
    """

    num_examples: int
    batch_size: int
    num_steps: int
    delta: float
    l2_clip_norm: float
    score_budget: float
    stages: tuple[tuple[int, float], ...]
    accountant: str = "pld"
    neighboring_relation: str = "add_or_remove_one"
    target_epsilon: float | None = None
    prior_releases: tuple[tuple[str, float], ...] = ()
    max_batch_size: int | None = None
    num_parameters: int | None = None
    exact_noise: bool = False
    metric_budget: float = 0.0
    row_budget: float = 0.0
    strategy: Any = ()
    unit: str | None = None

    def __post_init__(self):
        plan_checks.check(self)
        for kind, names in ((int, _WHOLE), (float, _REAL)):
            for name in names:
                value = getattr(self, name)
                object.__setattr__(self, name, None if value is None else kind(value))
        stages = tuple((int(count), float(z)) for count, z in self.stages)
        object.__setattr__(self, "stages", stages)
        prior = tuple((str(name), float(z)) for name, z in self.prior_releases)
        object.__setattr__(self, "prior_releases", prior)
        object.__setattr__(self, "strategy", tuple(float(c) for c in self.strategy))
        if self.unit == "example":
            object.__setattr__(self, "unit", None)

    @property
    def bands(self) -> int:
        """Over how many steps noise is correlated; 1 for independent noise."""
        return max(1, len(self.strategy))

    @property
    def sampling_prob(self) -> float:
        """The probability with which an example takes part in a step."""
        return self.batch_size / self.num_examples

    @property
    def num_epochs(self) -> float:
        """How many steps an example takes part in on average."""
        return self.num_steps * self.sampling_prob

    @property
    def most_parameters(self) -> int:
        """The most coordinates a step may draw noise for; noise refuses larger ones."""
        return noise_law.most_parameters(self)

    @property
    def noise_charge(self) -> noise_law.Charge:
        """What the noise's law costs beside a Gaussian's, in epsilon and delta."""
        return noise_law.charge(self)

    @property
    def accounted_delta(self) -> float:
        """The delta that is left for the accountant: less than `delta` by a little."""
        return self.delta - self.noise_charge.delta

    @property
    def noise_multipliers(self) -> np.ndarray:
        """The effective multiplier z of every step: what is accounted (read-only)."""
        return _expand(self.stages)

    @property
    def gradient_noise_multipliers(self) -> np.ndarray:
        """Of the gradient's fresh noise: z / sqrt(1 - others), |c| times as long."""
        left = 1 - self.score_budget - self.metric_budget - self.row_budget
        longer = strategies.length(self.strategy) / math.sqrt(left)
        return self.noise_multipliers * longer

    @property
    def score_noise_multipliers(self) -> np.ndarray:
        """The multiplier of the scores' noise, z / sqrt(r); infinite if r is 0."""
        return self._part_multipliers(self.score_budget)

    @property
    def metric_noise_multipliers(self) -> np.ndarray:
        """The multiplier of the metrics' noise, z / sqrt(m); infinite if m is 0."""
        return self._part_multipliers(self.metric_budget)

    @property
    def row_noise_multipliers(self) -> np.ndarray:
        """The multiplier of the row counts' noise, z / sqrt(k); infinite if k is 0."""
        return self._part_multipliers(self.row_budget)

    def _part_multipliers(self, share: float) -> np.ndarray:
        if share == 0:
            return np.full(self.num_steps, np.inf)
        return self.noise_multipliers / math.sqrt(share)

    def event(self, steps: SupportsIndex | None = None) -> dp_accounting.DpEvent:
        """Returns what the first steps of the plan release, for any accountant.

        Args:
            steps: the number of steps taken, at most `num_steps`; None for all.

        Returns:
            The prior releases, each one Gaussian, then one Poisson-sampled Gaussian a
            step, self-composed by stage; truncated ones with `max_batch_size`. With
            a strategy one a cycle of `bands` steps, at `bands` times the rate.

        Raises:
            ValueError: for a negative number of steps or one past the plan.

        Example:
            >>> plan = PrivacyPlan(
            ...     num_examples=100, batch_size=10, num_steps=3, delta=1e-5,
            ...     l2_clip_norm=1.0, score_budget=0.0, stages=((3, 2.0),))
            >>> plan.event(2).events[0].count
            2
        """
        import dp_accounting  # slow to import, so only where it is needed

        events: list[Any] = [
            dp_accounting.GaussianDpEvent(z) for _, z in self.prior_releases
        ]
        for rate, z, count in cycles.samples(self, self._steps(steps)):
            step = self._step_event(rate, z)
            events.append(dp_accounting.SelfComposedDpEvent(step, count))
        return dp_accounting.ComposedDpEvent(events)

    def _step_event(self, rate: float, z: float) -> dp_accounting.DpEvent:
        import dp_accounting

        most = self.max_batch_size
        if most is not None:
            return truncation.truncated_event(self.num_examples, rate, most, z)
        gaussian = dp_accounting.GaussianDpEvent(z)
        return dp_accounting.PoissonSampledDpEvent(rate, gaussian)

    def epsilon(self, steps: SupportsIndex | None = None) -> float:
        """Returns epsilon after some steps; asked again, it answers from a cache.

        Args:
            steps: the number of steps taken, at most `num_steps`; None for all.

        Returns:
            Epsilon at the plan's delta, accountant and neighbouring relation, prior
            releases and the noise's law (`noise_charge`) included; infinite if a step
            has no noise.

        Raises:
            ValueError: for a negative number of steps or one past the plan.

        Example:
            >>> plan = PrivacyPlan(
            ...     num_examples=100, batch_size=10, num_steps=3, delta=1e-5,
            ...     l2_clip_norm=1.0, score_budget=0.0, stages=((3, 0.0),))
            >>> plan.epsilon(0), plan.epsilon()
            (0.0, inf)
        """
        found = accountants.epsilon(
            self.event(steps),
            self.accounted_delta,
            accountant=self.accountant,
            neighboring_relation=self.neighboring_relation,
        )
        bare = steps is not None and int(steps) == 0 and not found
        return found + (0.0 if bare else self.noise_charge.epsilon)

    def statement(self, steps: SupportsIndex | None = None) -> Statement:
        """Returns the guarantee in words and as JSON.

        Args:
            steps: the number of steps taken, at most `num_steps`; None for all.

        Returns:
            A statement; ``str(statement)`` is one paragraph for people and
            ``statement.as_dict()`` a record for programs.

        Raises:
            ValueError: for a negative number of steps or one past the plan.

        Privacy:
            Of some steps it holds if no result decided where to stop; else quote all.

        Example:
            >>> plan = PrivacyPlan(
            ...     num_examples=100, batch_size=10, num_steps=3, delta=1e-5,
            ...     l2_clip_norm=1.0, score_budget=0.0, stages=((3, 0.0),))
            >>> str(plan.statement())[:10]
            'NO PRIVACY'
        """
        return describe(self, self._steps(steps))

    def to_json(self) -> str:
        """Returns the plan as one line of JSON, the same for equal plans.

        Later fields are left out where there is nothing in them, so that plans and
        digests written before they existed stay as they are.
        """
        fields = dataclasses.asdict(self)
        for name in _LATER_FIELDS:
            if not fields[name]:
                del fields[name]
        return json.dumps(fields, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> PrivacyPlan:
        """Reads what `to_json` wrote.

        Args:
            text: a JSON object with exactly the plan's fields; those that came later
                may be absent.

        Returns:
            A plan equal to the one written.

        Raises:
            ValueError: if the text is not JSON, or a field is unknown, missing or
                wrong.

        Example:
            >>> PrivacyPlan.from_json('{"epsilon": 1}')
            Traceback (most recent call last):
            ValueError: The plan has an unknown field 'epsilon'; ...
        """
        return cls(**sealing.fields_of(cls, text, _LATER_FIELDS))

    def digest(self) -> str:
        """Returns 16 hexadecimal digits that name the plan, the same on any machine."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def _steps(self, steps: SupportsIndex | None) -> int:
        if steps is None:
            return self.num_steps
        steps = validation.count("steps", steps)
        if steps > self.num_steps:
            raise ValueError(
                f"steps is {steps}, but the plan ends after {self.num_steps}; make a "
                "longer plan before training."
            )
        return steps


@functools.lru_cache(maxsize=64)
def _expand(stages: tuple[tuple[int, float], ...]) -> np.ndarray:
    counts, multipliers = zip(*stages, strict=True)
    values = np.repeat(np.array(multipliers, np.float64), counts)
    values.flags.writeable = False
    return values
