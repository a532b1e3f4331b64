"""Tables of noise that cancels between steps."""

from tables.lines import (
    Lines,
    Record,
    accuracies,
    gap,
    group,
    markdown,
    spread,
    with_interval,
)

SWEEPS = {
    "compare_mnist_bands": "MNIST, tanh CNN, 400 steps",
}
ALONE, BANDS = "dp_sgd", "dp_sgd, bands"


def _of(lines: Lines, kind: str) -> list[Record]:
    return [r for r in lines("correlated") if r["kind"] == kind]


def noise(lines: Lines) -> str:
    """What a number of bands leaves of the noise of the sums, by epsilon."""
    rows = []
    for bands, own in group(_of(lines, "expected"), "bands").items():
        cells = sorted(own, key=lambda r: r["epsilon"])
        left = [f"{r['relative']:.2f}" for r in cells]
        rows.append([str(bands), *left, *(f"{r['one_step']:.2f}" for r in cells[-1:])])
    epsilons = sorted({r["epsilon"] for r in _of(lines, "expected")})
    head = ["bands", *(f"sums, epsilon {e:g}" for e in epsilons)]
    return markdown([*head, f"one release, epsilon {epsilons[-1]:g}"], rows)


def weights(lines: Lines) -> str:
    """What moving weights leave, in the group where it is most."""
    rows = []
    for decay, own in group(_of(lines, "weights"), "ema_decay").items():
        by = {r["frozen_after"]: r for r in own}
        cells = [f"{by[k]['worst_group']:.2f}" for k in (None, 50, 20)]
        change = f"{100 * own[0]['mean_log_change']:.1f}"
        rows.append([f"{decay:g}", change, *cells])
    still = _of(lines, "weights")[0]["still"]
    rows.append(["weights that never move", "0", *[f"{still:.2f}"] * 3])
    head = ["decay", "change a step, %", "noise of the sums", "frozen after 50 steps"]
    return markdown([*head, "frozen after 20"], rows)


def seconds(lines: Lines) -> str:
    """The time of a step, and the memory of the noise."""
    rows = [
        [
            str(r["bands"]),
            f"{r['median_ms']:.1f}",
            f"{r['ratio']:.2f}",
            f"{r['memory_bytes'] / 2**20:.1f}",
        ]
        for r in _of(lines, "time")
    ]
    known = _of(lines, "time")[0]
    what = f"MLP, {known['parameters']:,} parameters, batch {known['batch']}: bands"
    head = ["ms a step", "of a step without", "memory of the noise, MiB"]
    return markdown([what, *head], rows)


def accuracy(lines: Lines) -> str:
    """SGD with momentum on independent and on correlated noise."""
    rows = []
    for name, task in SWEEPS.items():
        found = accuracies(lines(name))
        for epsilon in sorted({e for _, e in found}):
            pair = [found[method, epsilon] for method in (ALONE, BANDS)]
            rows.append(
                [
                    task,
                    f"{epsilon:g}",
                    *(spread(by_seed.values()) for by_seed in pair),
                    with_interval(gap(pair[1], pair[0])),
                ]
            )
    head = ["task", "epsilon", "independent noise", "bands", "difference"]
    return markdown(head, rows)
