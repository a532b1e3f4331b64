"""The privacy statement: what a plan promises, in words and as JSON."""

import dataclasses
import importlib.metadata
import math
from typing import Any

from dp_ilg.accounting import accountants
from dp_ilg.accounting.correlated import cycles, strategies
from dp_ilg.accounting.statements.units import unit_of

ACCOUNTANTS = {
    "pld": (
        "composition of privacy loss distributions; every approximation is rounded "
        "upwards by a proven bound, at any delta"
    ),
    "rdp": "composition of Renyi differential privacy",
    "zcdp": (
        "composition of zero concentrated differential privacy, which takes no "
        "advantage of the random sampling of batches"
    ),
}
NOT_COVERED = (
    "the choice of hyper-parameters, if several were tried on the same data",
    "a vocabulary, a feature scaling or other preprocessing computed from the data, "
    "unless it is named above",
    "results of evaluating the model on test data, which speak of that data",
    "further releases computed from the same data, whose costs add up",
    "a computer that is not as assumed: the gradient of an example is computed from "
    "its own row, float64 rounds as IEEE 754 says, and random bits cannot be guessed",
)


@dataclasses.dataclass(frozen=True)
class Statement:
    """What a plan promises: a paragraph for people and a record for programs.

    Attributes:
        text: one paragraph that a data-protection officer can read.
        facts: the same as (name, value) pairs, ready for JSON.

    Example:
        >>> statement = Statement("Epsilon is 2.", (("epsilon", 2.0),))
        >>> print(statement)
        Epsilon is 2.
        >>> statement.as_dict()
        {'epsilon': 2.0}
    """

    text: str
    facts: tuple[tuple[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the facts as a new dictionary that ``json.dumps`` accepts.

        Returns:
            Names to numbers, strings, lists of strings, booleans or None.
        """
        facts = dict(self.facts)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in facts.items()}

    def __str__(self) -> str:
        return self.text


def describe(plan: Any, steps: int | None = None) -> Statement:
    """Writes the statement of a plan.

    Args:
        plan: a `dp_ilg.PrivacyPlan`.
        steps: the steps taken so far, at most those of the plan; None for all.

    Returns:
        The statement of so many steps.
    """
    taken: int = plan.num_steps if steps is None else steps
    epsilon = plan.epsilon(taken)
    if math.isinf(epsilon):
        text = _no_guarantee(plan, taken)
        return Statement(text, tuple(_facts(plan, taken, epsilon, text).items()))
    sentences = [
        _guarantee(plan, epsilon),
        *_so_far(plan, taken),
        _mechanism(plan, taken),
        _scores(plan),
        *_prior(plan),
        _accounting(plan),
        _noise(plan),
        "The guarantee does not cover: " + "; ".join(NOT_COVERED) + ".",
    ]
    text = " ".join(sentences)
    return Statement(text, tuple(_facts(plan, taken, epsilon, text).items()))


def _no_guarantee(plan, steps: int) -> str:
    bare = int((plan.noise_multipliers[:steps] == 0).sum())
    return (
        "NO PRIVACY: the noise is zero or negligible (training steps without any: "
        f"{bare:,} of {steps:,}), so epsilon is infinite and "
        "nothing is guaranteed to anybody whose data were used. Treat the model, its "
        "logs and everything derived from them as if they were the data themselves."
    )


def _guarantee(plan, epsilon: float) -> str:
    shown = round_up(epsilon)
    factor = round_up(math.exp(epsilon)) if epsilon < 50 else f"exp({shown})"
    unit = unit_of(plan)
    weak = " An epsilon this large is a weak promise by itself." if epsilon > 10 else ""
    return (
        f"Training satisfies ({shown}, {plan.delta:g})-differential privacy. The unit "
        f"of privacy is {unit.one}: for every way of "
        f"{unit.relations[plan.neighboring_relation]}, any result that a reader of the "
        "trained model, or of every noisy gradient released on the way, could look for "
        f"becomes at most {factor} times as likely (epsilon = {shown}), plus a "
        f"probability of at most {plan.delta:g} (delta). {unit.beside}{weak}"
    )


def _so_far(plan, steps: int) -> list[str]:
    """Where only some steps were taken: until when the smaller number may be quoted."""
    if steps == plan.num_steps:
        return []
    return [
        f"This is about the first {steps:,} of {plan.num_steps:,} planned steps. It "
        "may be quoted if nothing that the run showed decided when to stop; if "
        "something did, the guarantee is that of the whole plan: epsilon = "
        f"{_shown(plan.epsilon())} at the same delta."
    ]


def _shown(epsilon: float) -> str:
    return round_up(epsilon) if math.isfinite(epsilon) else "infinity"


def _mechanism(plan, steps: int) -> str:
    low, high = _multipliers(plan, steps)
    noise = f"{low:.4g}" if low == high else f"between {low:.4g} and {high:.4g}"
    word = "step" if plan.num_steps == 1 else "steps"
    return (
        f"Training takes {plan.num_steps:,} {word}. {_sampling(plan)}, "
        f"{plan.batch_size:,} on average{_cut(plan)}; sums are divided by this average "
        "and never by the number drawn, and rows that only fill up a batch count as "
        f"absent. The gradient of each {unit_of(plan).noun} is limited to a norm of "
        f"{plan.l2_clip_norm:g} before it enters the sum, and normally distributed "
        "noise is added whose standard deviation, relative to that limit and over all "
        f"that a step releases, is {noise} (the noise multiplier).{_bands(plan)}"
    )


def _sampling(plan) -> str:
    noun = unit_of(plan).noun
    if plan.bands == 1:
        return (
            f"In each step every one of the {plan.num_examples:,} {noun}s takes part "
            "independently of all others with probability "
            f"{plan.sampling_prob:.6g} (Poisson sampling)"
        )
    return (
        f"Each of the {plan.num_examples:,} {noun}s belongs to one of {plan.bands} "
        "parts, dealt at random and each by itself; the parts take turns, and in a "
        f"step every {noun} of the part takes part independently of all others with "
        f"probability {cycles.sampling_rate(plan):.6g} (cyclic Poisson sampling)"
    )


def _bands(plan) -> str:
    if plan.bands == 1:
        return ""
    return (
        f" The noise of a step takes back a part of that of the {plan.bands - 1} "
        f"before, so that it adds up to less; its fresh part is "
        f"{strategies.length(plan.strategy):.4g} times as long for that, and "
        f"{plan.bands} steps together, in which an example takes part at most once, "
        "are one release with that noise multiplier."
    )


def _multipliers(plan, steps: int) -> tuple[float, float]:
    """The least and the most noise of the steps taken; before any, of the plan's."""
    taken = plan.noise_multipliers[: steps or None]
    return float(taken.min()), float(taken.max())


def _cut(plan) -> str:
    if plan.max_batch_size is None:
        return ""
    return (
        f", and a batch of more than {plan.max_batch_size:,} is cut to that number by "
        "leaving out examples chosen at random, whose cost epsilon includes"
    )


def _scores(plan) -> str:
    shares = plan.score_budget, plan.metric_budget, plan.row_budget
    scores, metrics, rows = (f"{100 * share:.3g} %" for share in shares)
    if not any(shares):
        return "Nothing is spent on measuring the importance of layers."
    if plan.metric_budget == 0 == plan.row_budget:
        return (
            f"{scores} of each step's privacy budget pays for noisy measurements of "
            "how important each layer of the model is, and the rest for the gradient "
            "itself; epsilon includes both."
        )
    layers = (
        f"{scores} for noisy measurements of how important each layer of the model is, "
        if plan.score_budget
        else ""
    )
    told = (
        f"{metrics} for noisy metrics of the training examples, such as their mean "
        "loss, "
        if plan.metric_budget
        else ""
    )
    chosen = (
        f"{rows} for noisy counts that choose which rows of an embedding take part, "
        if plan.row_budget
        else ""
    )
    return (
        f"Each step's privacy budget pays {layers}{told}{chosen}and the rest for the "
        "gradient itself; epsilon includes all of it."
    )


def _prior(plan) -> list[str]:
    if not plan.prior_releases:
        return []
    named = ", ".join(
        f"{name} (noise multiplier {z:.4g})" for name, z in plan.prior_releases
    )
    return [
        "Noisy statistics of all the training examples were released besides, each "
        f"limiting what one example contributes: {named}; epsilon includes them."
    ]


def _accounting(plan) -> str:
    how = ACCOUNTANTS[plan.accountant]
    return f"Epsilon was computed with {implementation(plan)} by {how}."


def implementation(plan: Any) -> str:
    """Which code computes a plan's epsilon.

    Args:
        plan: a `dp_ilg.PrivacyPlan`.

    Returns:
        Its name and version.

    Example:
        >>> import dp_ilg
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-6,
        ...     num_examples=60_000, batch_size=600, num_steps=100)
        >>> implementation(plan).startswith("dp_ilg's certified accountant")
        True
    """
    package = accountants.answered_by(plan.event(), plan.accountant)
    known = f"{package} {_version(package)}"
    if package == "dp-ilg" and plan.accountant == "pld":
        return f"dp_ilg's certified accountant ({known})"
    return known


def _noise(plan) -> str:
    if plan.exact_noise:
        return (
            "Noise is drawn by an exact sampler of whole numbers from a cryptographic "
            "generator, and added without rounding, so its law is the one accounted."
        )
    paid = plan.noise_charge
    return (
        "Noise is drawn as whole numbers of a public grid from a table of 96 bits and "
        "added without rounding; its law differs from the normal one by what epsilon "
        f"and delta include: {paid.epsilon:.1g} of epsilon and {paid.delta:.1g} of "
        f"delta, for at most {plan.most_parameters:,} numbers a step."
    )


def _facts(plan, steps: int, epsilon: float, text: str) -> dict[str, Any]:
    least, most = _multipliers(plan, steps)
    relation = unit_of(plan).relations[plan.neighboring_relation]
    return {
        "epsilon": None if math.isinf(epsilon) else epsilon,
        "private": not math.isinf(epsilon),
        "delta": plan.delta,
        "target_epsilon": plan.target_epsilon,
        "unit_of_privacy": unit_of(plan).one,
        "neighboring_relation": plan.neighboring_relation,
        "neighboring_relation_in_words": relation,
        "sampling": _sampling_name(plan),
        "bands": plan.bands,
        "strategy": plan.strategy,
        "sampling_probability": plan.sampling_prob,
        "num_examples": plan.num_examples,
        "expected_batch_size": plan.batch_size,
        "max_batch_size": plan.max_batch_size,
        "num_steps": plan.num_steps,
        "steps": steps,
        "l2_clip_norm": plan.l2_clip_norm,
        "smallest_noise_multiplier": least,
        "largest_noise_multiplier": most,
        "score_budget": plan.score_budget,
        "metric_budget": plan.metric_budget,
        "row_budget": plan.row_budget,
        "prior_releases": plan.prior_releases,
        "most_parameters": plan.most_parameters,
        "exact_noise": plan.exact_noise,
        "noise_epsilon": plan.noise_charge.epsilon,
        "noise_delta": plan.noise_charge.delta,
        "accountant": plan.accountant,
        "amplification_by_sampling": plan.accountant != "zcdp",
        "accountant_implementation": implementation(plan),
        "dp_accounting_version": _version("dp-accounting"),
        "plan_digest": plan.digest(),
        "not_covered": NOT_COVERED,
        "text": text,
    }


def _sampling_name(plan) -> str:
    if plan.bands > 1:
        return "cyclic poisson"
    return "poisson" if plan.max_batch_size is None else "truncated poisson"


def round_up(value: float) -> str:
    """Four significant digits, never smaller than the value.

    Args:
        value: a positive finite number, or 0.

    Returns:
        The number as text.

    Example:
        >>> round_up(1.99842), round_up(2.0), round_up(0.0)
        ('1.999', '2', '0')
    """
    if value == 0:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return f"{math.ceil(value / unit - 1e-9) * unit:.4g}"


def _version(name: str) -> str:
    return importlib.metadata.version(name)
