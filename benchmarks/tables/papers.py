"""Tables of what two papers report, measured or computed again."""

from typing import Any

import dp_ilg
from dp_ilg.accounting import composition
from tables.lines import Lines, group, markdown, percent, spread

# Test accuracy in percent as Li et al. 2024 print it in their Table 3.
_PRINTED = {
    "mnist": ("MNIST", "97.95"),
    "fashion_mnist": ("Fashion-MNIST", "88.05"),
    "cifar10": ("CIFAR-10", "83.60"),
}
_ACCOUNTANTS = {"Renyi divergences": "rdp", "loss distributions": "pld"}


def abadi(lines: Lines) -> str:
    """Abadi et al. 2016, MNIST."""
    rows = []
    for own in group(lines("abadi"), "row").values():
        first = own[0]
        epsilon, pca = first["setting"]["epsilon"], first["epsilon_of_pca"]
        found = percent(own)
        rows.append(
            [
                f"{epsilon:g}",
                f"{pca:.2f}",
                f"{first['setting']['reported']:.0f}",
                spread(found.values()),
            ]
        )
    head = ["epsilon", "of which the PCA alone", "paper, test %", "ours, test %"]
    return markdown(head, rows)


def abadi_accounting(lines: Lines) -> str:
    """The paper's example of accounting in five ways: computed, not measured."""
    facts: dict[str, Any] = dict(noise_multiplier=4.0, num_steps=10_000, delta=1e-5)
    by_theorem = {
        "moments, as the paper": composition.moments_epsilon,
        "strong composition, as the paper": composition.claimed_strong_composition,
        "strong composition that is valid": composition.strong_composition,
    }
    found = {words: of(sampling_prob=0.01, **facts) for words, of in by_theorem.items()}
    for words, accountant in _ACCOUNTANTS.items():
        plan = dp_ilg.plan_privacy(
            num_examples=60_000, batch_size=600, accountant=accountant, **facts
        )
        found[words] = plan.epsilon()
    return markdown(
        ["rate 0.01, noise multiplier 4, 10,000 steps, delta 1e-5", "epsilon"],
        [[words, f"{epsilon:.2f}"] for words, epsilon in found.items()],
    )


_PUBLISHED = (
    "test %",
    "epochs",
    "paper",
    "noise as printed, **no guarantee**",
    "noise / B, **no guarantee**",
    "guaranteed",
    "epsilon",
)


def published(lines: Lines) -> str:
    """DP-AdamILG as printed, and with a guarantee."""
    rows = []
    for row, own in group(lines("table3"), "row").items():
        words, printed = _PRINTED[row]
        by_method = group(own, "method")
        epochs = own[0]["epochs"]
        guaranteed = by_method["with guarantee"]
        cells = [
            spread(percent(by_method[m]).values()) if m in by_method else "not run"
            for m in ("published, printed", "published, divided")
        ]
        rows.append(
            [
                words,
                f"{epochs:.3g}",
                printed,
                *cells,
                spread(percent(guaranteed).values()),
                f"{guaranteed[0]['epsilon']:.2f}",
            ]
        )
    return markdown(_PUBLISHED, rows)


_ATTACK = (
    "mechanism",
    "score of the attack",
    "epsilon claimed",
    "epsilon guaranteed",
    "lower bound found, 95 % confidence",
    "claim",
)


def attack(lines: Lines) -> str:
    """The audit of one release of the published method."""
    named = {
        "published, printed": "as published, noise as printed",
        "published, divided": "as published, noise divided by B",
        "dp_adam_ilg": "`dp_adam_ilg`",
    }
    rows = []
    for r in lines("audit_published"):
        claimed, guaranteed = r["claimed_epsilon"], r["guaranteed_epsilon"]
        rows.append(
            [
                named[r["mechanism"]],
                r["score"],
                f"{claimed:.3f}" if claimed else "-",
                f"{guaranteed:.3f}" if guaranteed else "none",
                f"{r['lower_bound_on_epsilon']:.2f}",
                r["verdict"],
            ]
        )
    return markdown(_ATTACK, rows)
