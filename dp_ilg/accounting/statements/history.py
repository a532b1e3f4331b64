"""What was spent so far, told step by step: for runs that have no plan.

A plan knows its whole run beforehand, and is to be preferred: calibrated, with sampler,
noise and ledger that read the same numbers. A history is for what was done already, by
any program: each step's rate and noise multiplier, and what they add up to.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex

from dp_ilg import validation
from dp_ilg.accounting import accountants

if TYPE_CHECKING:
    import dp_accounting

_FORMAT = 1
_KEYS = ("format", "accountant", "neighboring_relation", "steps")


class PrivacyHistory:
    """Poisson-sampled Gaussian steps as they were taken, and their epsilon.

    Attributes:
        accountant: a key of `dp_ilg.accounting.ACCOUNTANTS`.
        neighboring_relation: a key of `dp_ilg.accounting.NEIGHBORING_RELATIONS`.

    Privacy:
        Epsilon holds if batches were Poisson samples of the rates told, one example
        moved each sum by at most its clip norm, noise was normal with the multipliers
        told, and none of these numbers was chosen by what earlier steps released. For
        noise or rates that are chosen on the way use `dp_ilg.PrivacyFilter`. It charges
        Gaussians as told; what the law of this library's own draws costs beside, a
        plan includes (`PrivacyPlan.noise_charge`).

    Example:
        >>> history = PrivacyHistory()
        >>> for _ in range(100):
        ...     history.step(noise_multiplier=1.0, sampling_prob=0.01)
        >>> history.num_steps, round(history.epsilon(1e-5), 2)
        (100, 0.72)
        >>> again = PrivacyHistory.from_state(history.state())
        >>> again.epsilon(1e-5) == history.epsilon(1e-5)
        True

    Reference: Abadi et al. 2016 (the steps); Dong et al. 2022 (their composition).
    """

    def __init__(
        self,
        accountant: str = "pld",
        neighboring_relation: str = "add_or_remove_one",
    ):
        """Begins with nothing spent.

        Args:
            accountant: ``"pld"`` (tightest), ``"rdp"`` or ``"zcdp"``.
            neighboring_relation: ``"add_or_remove_one"`` or ``"replace_one"``.

        Raises:
            ValueError: for an unknown name.
        """
        accountants.check_names(accountant, neighboring_relation)
        self.accountant = accountant
        self.neighboring_relation = neighboring_relation
        self._steps: list[tuple[float, float, int]] = []

    def __repr__(self) -> str:
        return f"PrivacyHistory({self.accountant!r}, num_steps={self.num_steps})"

    @property
    def num_steps(self) -> int:
        """How many steps were told."""
        return sum(count for *_, count in self._steps)

    def step(
        self,
        *,
        noise_multiplier: SupportsFloat,
        sampling_prob: SupportsFloat,
        num_steps: SupportsIndex = 1,
    ) -> None:
        """Adds a step, or several that are alike.

        Args:
            noise_multiplier: the noise's standard deviation over the clip norm; 0 for a
                step without noise, after which epsilon is infinite.
            sampling_prob: the probability of each example in the step, in (0, 1].
            num_steps: how many such steps.

        Raises:
            ValueError: for a number out of its range; traced values included.

        Privacy: tell each step before its result is used, and never leave one out.
        """
        if noise_multiplier != 0:
            validation.positive("noise_multiplier", noise_multiplier)
        if sampling_prob != 1:
            validation.fraction("sampling_prob", sampling_prob)
        validation.whole("num_steps", num_steps)
        rate, z, count = float(sampling_prob), float(noise_multiplier), int(num_steps)
        if self._steps and self._steps[-1][:2] == (rate, z):
            count += self._steps.pop()[2]
        self._steps.append((rate, z, count))

    def event(self) -> dp_accounting.DpEvent:
        """Returns what was released, for any accountant of dp_accounting.

        Returns:
            One self-composed Poisson-sampled Gaussian for each run of equal steps.
        """
        import dp_accounting  # slow to import, so only where it is needed

        return dp_accounting.ComposedDpEvent(
            [
                dp_accounting.SelfComposedDpEvent(
                    dp_accounting.PoissonSampledDpEvent(
                        rate, dp_accounting.GaussianDpEvent(z)
                    ),
                    count,
                )
                for rate, z, count in self._steps
            ]
        )

    def epsilon(self, delta: SupportsFloat) -> float:
        """Returns epsilon of all steps told so far.

        Args:
            delta: the delta of the guarantee, strictly between 0 and 1.

        Returns:
            Epsilon, 0 before the first step; infinite if a step had no noise.

        Raises:
            ValueError: for another delta.
        """
        validation.fraction("delta", delta)
        if not self._steps:
            return 0.0
        if any(z == 0 for _, z, _ in self._steps):
            return math.inf
        return accountants.epsilon(
            self.event(),
            float(delta),
            accountant=self.accountant,
            neighboring_relation=self.neighboring_relation,
        )

    def state(self) -> dict[str, Any]:
        """Returns the history as plain JSON: for a checkpoint beside the parameters.

        Returns:
            Strings, numbers and lists; ``json.dumps`` and Orbax's ``JsonSave`` take it.
        """
        facts = _FORMAT, self.accountant, self.neighboring_relation
        return dict(zip(_KEYS, (*facts, [list(s) for s in self._steps]), strict=True))

    @classmethod
    def from_state(cls, state: Any) -> PrivacyHistory:
        """Reads what `state` returned, or its JSON text.

        Args:
            state: the dictionary, or a string of JSON.

        Returns:
            An equal history.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(state, str):
            try:
                state = json.loads(state)
            except ValueError as error:
                raise ValueError(f"The history is not valid JSON: {error}.") from None
        if not isinstance(state, dict) or sorted(state) != sorted(_KEYS):
            raise ValueError(
                f"The history must be what PrivacyHistory.state returned, with "
                f"{', '.join(_KEYS)}; it is {type(state).__name__} with other fields."
            )
        if state["format"] != _FORMAT:
            raise ValueError(
                f"The history has the format {state['format']!r}, but this version "
                f"reads {_FORMAT}; read it with the version that wrote it."
            )
        found = cls(state["accountant"], state["neighboring_relation"])
        for step in state["steps"]:
            if not isinstance(step, list | tuple) or len(step) != 3:
                raise ValueError(
                    f"The history has the step {step!r}, but each must be a rate, a "
                    "noise multiplier and a number of steps."
                )
            rate, z, count = step
            found.step(noise_multiplier=z, sampling_prob=rate, num_steps=count)
        return found
