"""Tables of rules, free sources, thresholds and the error bar of a single run."""

import statistics

from tables.lines import (
    Lines,
    accuracies,
    gap,
    group,
    markdown,
    percent,
    spread,
    with_interval,
)

_TASKS = {
    "compare_rules_digits": ("digits, MLP", "uniform"),
    "compare_rules_mnist": ("MNIST, MLP", "dp_adam"),
}


def rules(lines: Lines) -> str:
    """Rules, dropped groups, adaptive thresholds and Muon, equally tuned."""
    rows = []
    for file, (task, reference) in _TASKS.items():
        found = accuracies(lines(file))
        for (method, epsilon), of in found.items():
            base = found[reference, epsilon]
            difference = "base" if of is base else with_interval(gap(of, base))
            shown = [task, f"{epsilon:g}", f"`{method}`", spread(of.values())]
            rows.append([*shown, difference])
    head = ["task", "epsilon", "method", "test %", "difference, 95 % interval"]
    return markdown(head, rows)


def free_sources(lines: Lines) -> str:
    """Sources of importance that cost nothing beside charged scores, on the digits."""
    found = accuracies(lines("compare_digits_sources"))
    rows = []
    for (method, epsilon), of in found.items():
        base = found["uniform", epsilon]
        difference = "base" if of is base else with_interval(gap(of, base))
        rows.append([method, spread(of.values()), difference])
    return markdown(["method", "test %", "difference, 95 % interval"], rows)


def error_bar(lines: Lines) -> str:
    """The spread of one run's last iterates beside that over seeds."""
    rows = []
    for epsilon, of in group(lines("error_bar"), "epsilon").items():
        bars = [100 * r["iterates"]["std"] for r in of]
        rows.append(
            [
                f"{epsilon:g}",
                spread(percent(of).values()),
                f"{statistics.mean(bars):.2f} ({min(bars):.2f} to {max(bars):.2f})",
            ]
        )
    head = ["epsilon", "over seeds, %", "bar of one run, points"]
    return markdown(head, rows)
