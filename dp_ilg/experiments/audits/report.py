"""The audit of a trainer as tables, one JSON object and a plot.

Two kinds of evidence: attacks bound epsilon from below and are compared with the
claim; checks look at each promise the proof rests on, and find small faults that no
attack with a thousand runs could.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dp_ilg import validation
from dp_ilg.auditing.bounds import (
    EpsilonLowerBound,
    epsilon_lower_bound,
    gaussian_lower_bound,
)
from dp_ilg.experiments.audits import last_bits, promises, reuse, whole_run
from dp_ilg.experiments.audits import noise as noise_checks
from dp_ilg.experiments.audits import sampler as sampler_checks
from dp_ilg.experiments.audits.canaries import Attack, attacks
from dp_ilg.experiments.audits.checks import Finding
from dp_ilg.experiments.audits.noise import Noise
from dp_ilg.experiments.audits.one_run import one_run
from dp_ilg.experiments.audits.residuals import Observer, observe
from dp_ilg.experiments.audits.sampler import Draws
from dp_ilg.experiments.audits.subject import AuditedTrainer

_CHOOSING = 0.2  # of all runs; the threshold is chosen on them
_NO_JAX_PRIVACY = (
    "The attack with many canaries in one run was left out: its statistic is that of "
    'jax-privacy, which is not installed; pip install "dp_ilg[audit]".'
)
_SIGNIFICANCE = 0.05
Told = Callable[[str], Any]


@dataclass(frozen=True)
class TrainerAuditOptions:
    """What an audit of a trainer may be told.

    Attributes:
        runs: of each kind: with each canary, and without any.
        canaries: of the single run with many.
        seed: of initial parameters, canaries, batches and noise.

    Raises:
        ValueError: for fewer than 50 runs or canaries.

    Example:
        >>> TrainerAuditOptions(runs=3)
        Traceback (most recent call last):
        ValueError: trials is 3, but must be a whole number of at least 50.
    """

    runs: int = 200
    canaries: int = 1000
    seed: int = 0

    def __post_init__(self):
        validation.whole("trials", self.runs, 50)
        validation.whole("canaries", self.canaries, 50)
        validation.whole("seed", self.seed, 0)


@dataclass(frozen=True)
class Evidence:
    """What the checks look at, gathered at most once each."""

    observer: Observer
    noise: Noise
    draws: Draws
    seed: int


def _on(part: str, check: Callable[..., Finding]) -> Callable[[Evidence], Finding]:
    return lambda evidence: check(getattr(evidence, part))


def _step(check: Callable[..., Finding]) -> Callable[[Evidence], Finding]:
    return lambda evidence: check(evidence.observer, evidence.seed)


# name -> evidence -> finding
CHECKS: dict[str, Callable[[Evidence], Finding]] = {
    "noise of the gradient": _on("noise", noise_checks.gradient_noise),
    "noise of the score": _on("noise", noise_checks.score_noise),
    "noise of the metrics": _on("noise", noise_checks.metric_noise),
    "noise against the charge": _on("noise", noise_checks.charge),
    "independence of the noise": _on("noise", noise_checks.independence),
    "tail of the noise": _step(last_bits.tail),
    "inclusion frequency": _on("draws", sampler_checks.inclusion),
    "batch size": _on("draws", sampler_checks.batch_size),
    "independence of batches": _on("draws", sampler_checks.steps_apart),
    "turns of the parts": _on("draws", sampler_checks.turns),
    "repeated batches": _on("draws", sampler_checks.repeated),
    "clipped sum": _step(promises.exact_sum),
    "sensitivity": _step(promises.sensitivity),
    "repeated terms": _step(last_bits.repeated_terms),
    "rows apart": _step(last_bits.rows_apart),
    "any order": _step(last_bits.any_order),
    "absent examples": _step(promises.absent),
    "geometry of past releases": _step(promises.past_releases),
    "expected batch size": _step(promises.expected_size),
    "end of the plan": _step(whole_run.end_of_plan),
    "claimed epsilon": _step(last_bits.claimed_epsilon),
    "resumed run": _step(whole_run.resumed),
    "one release a state": _step(reuse.one_release_a_state),
    "one key a plan": _step(reuse.one_key_a_plan),
}


def gather(trainer: AuditedTrainer, seed: int) -> Evidence:
    """What the checks of a trainer need; each part is made when first asked for.

    Args:
        trainer: the trainer.
        seed: of batches and noise.

    Returns:
        The evidence.
    """
    observer = observe(trainer)
    return Evidence(observer, Noise(observer, seed), Draws(trainer, seed), seed)


def audit_trainer(
    trainer: AuditedTrainer,
    options: TrainerAuditOptions,
    told: Told = lambda line: None,
) -> dict[str, Any]:
    """Checks every promise of a trainer and attacks it with every canary.

    Args:
        trainer: the trainer.
        options: how many runs, and the seed.
        told: called with a line of progress now and then.

    Returns:
        ``rows`` (attacks: bound, claim, trials, confidence), ``checks``, ``claim``,
        ``verdict`` ("refuted" if any bound exceeds the claim or a check fails, else
        "not refuted"), ``notes`` and ``plan``.

    Privacy: a bound below the claim proves nothing; a bound above it, or a failed
        check, refutes the claim for this program, at the confidence stated.

    Reference: Nasr et al. 2023, "Tight auditing of differentially private machine
        learning" (gradient canaries); Steinke et al. 2023 (one run).
    """
    evidence = gather(trainer, options.seed)
    checks = []
    for name, check in CHECKS.items():
        checks.append({"check": name} | asdict(check(evidence)))
        told(f"{name}: {'holds' if checks[-1]['holds'] else 'FAILS'}")
    claim = trainer.plan.epsilon()
    found = attacks(evidence.observer, options.runs, options.seed, told)
    rows = [_row(attack, trainer.plan.delta, claim) for attack in found]
    rows += _one_run_rows(evidence.observer, options, claim)
    fine = all(c["holds"] for c in checks)
    fine &= all(row["verdict"] == "not refuted" for row in rows)
    return {
        "rows": rows,
        "checks": checks,
        "claim": claim,
        "verdict": "not refuted" if fine else "refuted",
        "plan": _run_shape(trainer),
        "notes": _notes(trainer, claim),
    }


def _run_shape(trainer: AuditedTrainer) -> dict[str, Any]:
    """What an audit says of the runs it made, for its notes and records."""
    plan = trainer.plan
    facts = asdict(plan)
    names = ("num_examples", "batch_size", "num_steps", "score_budget", "delta")
    names += ("metric_budget",) if plan.metric_budget else ()
    return {name: facts[name] for name in names} | {
        "noise_multipliers": [z for _, z in plan.stages],
        "parameters": sum(np.size(p) for p in jax.tree.leaves(trainer.params)),
    }


def bound_by_trials(
    inside: np.ndarray, outside: np.ndarray, delta: float
) -> dict[str, Any]:
    """A lower bound on epsilon from runs with and without a canary.

    Args:
        inside: scores with it.
        outside: scores without.
        delta: of the claim.

    Returns:
        The bound, what it would be were the scores normal, the rates and the number of
        tested trials.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> found = bound_by_trials(rng.normal(3, 1, 99), rng.normal(0, 1, 99), 1e-5)
        >>> found["lower_bound"] > 0.5, found["trials"]
        (True, 158)
    """
    found = epsilon_lower_bound(
        inside,
        outside,
        delta=delta,
        significance=_SIGNIFICANCE,
        choosing_fraction=_CHOOSING,
    )
    gaussian = gaussian_lower_bound(
        inside, outside, delta=delta, significance=_SIGNIFICANCE
    )
    return {
        "lower_bound": _theirs(inside, outside, delta, found),
        "if_gaussian": gaussian,
        "trials": found.in_trials + found.out_trials,
        "true_positive_rate": found.true_positive_rate,
        "false_positive_rate": found.false_positive_rate,
    }


def _theirs(inside: Any, outside: Any, delta: float, found: EpsilonLowerBound) -> float:
    """The same test by jax-privacy's statistics, or ours where it is not installed."""
    if not importlib.util.find_spec("jax_privacy"):
        return found.epsilon
    from jax_privacy import auditing as theirs

    sign = 1 if found.higher_is_in else -1
    tested = (inside[-found.in_trials :], outside[-found.out_trials :])
    auditor = theirs.CanaryScoreAuditor(*(sign * np.asarray(s) for s in tested))
    return float(
        auditor.epsilon_clopper_pearson(
            _SIGNIFICANCE,
            delta,
            one_sided=False,
            threshold_strategy=theirs.Explicit(sign * found.threshold),
        )
    )


def _row(attack: Attack, delta: float, claim: float) -> dict[str, Any]:
    found = bound_by_trials(attack.inside, attack.outside, delta)
    return _judged(
        {"canary": attack.canary, "adversary": attack.adversary}, found, claim
    )


def _judged(facts: dict, found: dict, claim: float) -> dict[str, Any]:
    refuted = found["lower_bound"] > claim
    rest = {"claim": claim, "confidence": 1 - _SIGNIFICANCE}
    verdict = {"verdict": "refuted" if refuted else "not refuted"}
    return facts | found | rest | verdict


def _one_run_rows(
    observer: Observer, options: TrainerAuditOptions, claim: float
) -> list[dict[str, Any]]:
    """One run with many canaries; its statistic is jax-privacy's."""
    if not importlib.util.find_spec("jax_privacy"):
        return []
    from jax_privacy import auditing as theirs

    scores = one_run(observer, options.canaries, options.seed)
    auditor = theirs.CanaryScoreAuditor(scores.inside, scores.outside)
    delta = observer.trainer.plan.delta
    bound = auditor.epsilon_one_run(_SIGNIFICANCE, delta)
    gaussian = auditor.epsilon_one_run_fdp(_SIGNIFICANCE, delta)
    found = {
        "lower_bound": float(bound),
        "if_gaussian": float(gaussian),
        "trials": len(scores.inside) + len(scores.outside),
        "true_positive_rate": None,
        "false_positive_rate": None,
    }
    facts = {"canary": "many, in one run", "adversary": "releases"}
    return [_judged(facts, found, claim)]


def _notes(trainer: AuditedTrainer, claim: float) -> list[str]:
    plan = trainer.plan
    missing = not importlib.util.find_spec("jax_privacy")
    return [_NO_JAX_PRIVACY] * missing + [
        f"The run's own sampler, clip, chain and noise around {plan.num_examples} "
        f"examples, {plan.num_steps} steps at sampling probability "
        f"{plan.sampling_prob:.4g}; the claim, epsilon {claim:.3f} at delta "
        f"{plan.delta:g} ({plan.neighboring_relation}), is that of the plan cut to "
        "them.",
        "Who sees releases sees those of every step, and knows the other examples and "
        "who of them was drawn; who sees the model sees the last one alone. Bounds are "
        "Clopper-Pearson's on both rates, the threshold chosen on other runs (a "
        "fifth); if Gaussian: were the scores normal.",
        "A bound below the claim proves nothing; the guarantee rests on the proof, and "
        "the checks look at its premises. All checks together fail for a sound trainer "
        "about once in 100,000 audits.",
    ]


def write_plot(found: dict[str, Any], path: Path) -> None:
    """Draws the bounds beside the claim.

    Args:
        found: what `audit_trainer` returned.
        path: an SVG file.

    Raises:
        OSError: if it cannot be written.
    """
    from dp_ilg.experiments.audits.plot import bounds_figure
    from dp_ilg.experiments.reports.svg import save_figure

    save_figure(bounds_figure(found["rows"], found["claim"]), path)
