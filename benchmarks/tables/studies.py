"""Tables that ask what each part of the method is worth."""

from collections.abc import Mapping

from tables.lines import (
    Lines,
    accuracies,
    finals,
    gap,
    group,
    markdown,
    or_tie,
    percent,
    significant,
    spread,
    with_interval,
)

SHIPPED = "dp_adam_ilg as shipped"
_CHANGES = {  # method of the sweep -> words, in the order they are shown
    "dp_adam": "rule `uniform`, no bands: DP-Adam",
    "rule paper": "rule `paper`",
    "rule equal_snr": "rule `equal_snr`",
    "leaves, no bands": "single leaves as groups, no bands",
    "modules, no bands": "modules as groups, no bands",
    "32 bands": "32 bands instead of 8",
    "scores cost 2 %": "scores cost 2 % of the budget instead of 0.5 %",
    "scores cost 5 %": "scores cost 5 % of the budget instead of 0.5 %",
    "importance from released gradients": "importance from released gradients",
    "Adam balanced by coherence": '`adam="balanced"`',
    "dp_adam, balanced by coherence": 'DP-Adam with `adam="balanced"`',
    "noise falls to half": "noise falls to half over the run",
    "rate falls to zero": "learning rate falls to zero over the run",
    "noise and rate fall": "both fall",
    "second moment corrected for noise": "second moment corrected for noise",
    "no average of iterates": "no average of iterates",
    "clip joint, not normalised": '`clip_mode="joint"` instead of `"normalize"`',
    "clip per layer": '`clip_mode="per_layer"`',
    "batches of 4,096": "batches of 4,096 instead of 1,024",
}
TASKS = {  # task of the layer study -> words
    "digits": "Digits, MLP",
    "mnist_cnn": "MNIST, tanh CNN",
    "fashion_scattering": "Fashion-MNIST on scattering, bands",
    "mnist_scattering": "MNIST on scattering, bands",
    "cifar10_cnn": "CIFAR-10, CNN",
    "cifar10_scattering": "CIFAR-10 on scattering, bands",
    "flights_mlp": "Flights, embedded categories",
    "text_lm": "Next words, bands",
    "imdb_embedding": "IMDB, embedding in bands",
    "imdb_transformer": "IMDB, transformer in bands",
}


def questions(lines: Lines) -> str:
    """One change at a time on IMDB."""
    found = accuracies(lines("compare_questions_imdb"))
    (epsilon,) = {epsilon for _, epsilon in found}
    own = found[SHIPPED, epsilon]
    unknown = {method for method, _ in found} - {SHIPPED, *_CHANGES}
    if unknown:
        raise ValueError(f"Words are missing for {sorted(unknown)}.")
    rows = [["as shipped, plain Adam", spread(own.values()), "base"]]
    for method, words in _CHANGES.items():
        of = found[method, epsilon]
        rows.append([words, spread(of.values()), or_tie(gap(of, own))])
    return markdown(
        [f"IMDB, epsilon {epsilon:g}: change", "test %", "difference, 95 % interval"],
        rows,
    )


def exponents(lines: Lines) -> str:
    """Other powers of importance and size."""
    runs = group(
        [r | {"powers": tuple(r["powers"])} for r in lines("exponents")], "powers"
    )
    found = {powers: percent(of, "accuracy") for powers, of in runs.items()}
    base = found[0.5, 0.25]
    named = {
        (0.0, 0.0): "`uniform`",
        (0.5, 0.25): "`min_noise_energy`",
        (1.0, 0.5): "`equal_snr`",
        (0.5, 0.0): "`sqrt_share`",
    }
    rows = []
    for (p, q), of in found.items():
        difference = "base" if of is base else with_interval(gap(of, base))
        words = named.get((p, q), "")
        rows.append([f"{p:g}", f"{q:g}", words, spread(of.values()), difference])
    head = ["p", "q", "rule", "test %", "difference, 95 % interval"]
    return markdown(head, rows)


def _at_best_rate(records: list) -> tuple:
    """The rate that was best on the seed for tuning, and the accuracy of the others."""
    tuning = 100
    tried = [r for r in records if r["seed"] == tuning]
    rate = max(tried, key=lambda r: r["accuracy"])["learning_rate"]
    tested = [r for r in records if r["seed"] != tuning and r["learning_rate"] == rate]
    return rate, percent(tested, "accuracy")


def scores(lines: Lines) -> str:
    """What of an example is scored, against uniform weights, equally tuned."""
    rows = []
    for task, records in group(lines("scores"), "task").items():
        base: dict = {}
        for row, of in group(records, "row").items():
            rate, found = _at_best_rate(of)
            if not found:  # only tuned so far
                continue
            base = base or found
            own = row == "uniform"
            difference = "base" if own else with_interval(gap(found, base))
            words = "none: uniform weights" if own else f"`{row}`"
            rows.append([task, words, f"{rate:g}", spread(found.values()), difference])
    head = ["task", "score", "rate", "test %", "difference, 95 % interval"]
    return markdown(head, rows)


def filters(lines: Lines) -> str:
    """A budget spent by what was released, against one fixed beforehand."""
    runs = group(lines("filter_study"), "mode")
    fixed = percent(runs["fixed"])
    rows = []
    for mode, of in runs.items():
        found = percent(of)
        difference = "base" if mode == "fixed" else with_interval(gap(found, fixed))
        noise = [significant(z) for z in of[0]["noise"]]
        rows.append([mode, spread(found.values()), difference, ", ".join(noise)])
    return markdown(
        [
            "budget",
            "test %",
            "difference, 95 % interval",
            "noise multipliers of the stages, first seed",
        ],
        rows,
    )


def filter_noise(lines: Lines) -> str:
    """The noise that one Renyi order costs before any choice is made."""
    runs = group(lines("filter_study"), "mode")
    fixed, equal = (runs[m][0]["noise"][0] for m in ("fixed", "filter, equal parts"))
    first = runs["fixed"][0]
    job = (
        f"{first['batch_size']:,} of 25,000 examples, {first['num_steps']} steps, "
        f"epsilon {first['epsilon']:g}"
    )
    rows = [[job, f"{fixed:.3f}", f"{equal:.3f}", f"{100 * (equal / fixed - 1):.1f} %"]]
    return markdown(
        ["job", "noise multiplier, fixed plan", "filter, equal stages", "more noise"],
        rows,
    )


_LAYERS = (
    "task",
    "after steps",
    "groups",
    "noise energy, of `uniform`'s",
    "signal / noise of a step, `uniform`",
    "the same, `min_noise_energy`",
)


def layers(lines: Lines) -> str:
    """Noise energy and signal to noise after a few private steps."""
    last = {record["task"]: record for record in lines("layer_study")}
    unknown = last.keys() - TASKS
    if unknown:
        raise ValueError(f"Words are missing for {sorted(unknown)}.")
    rows = []
    for task, words in TASKS.items():
        record = last[task]
        rows.append(
            [
                words,
                str(record["step"]),
                str(len(record["layers"])),
                f"{record['noise_energy_ratio']:.2f}",
                f"{_signal_to_noise(record, 'uniform'):.2f}",
                f"{_signal_to_noise(record, 'min_noise_energy'):.2f}",
            ]
        )
    rows.sort(key=lambda row: -float(row[3]))
    return markdown(_LAYERS, rows)


def _signal_to_noise(record: Mapping, rule: str) -> float:
    """Length of the whole signal over that of the whole noise."""
    own = [layer[rule] for layer in record["layers"]]
    signal, noise = (sum(of[k] ** 2 for of in own) for k in ("signal", "noise"))
    return (signal / noise) ** 0.5


_SETTINGS = (
    "task",
    "epsilon",
    "expected batch",
    "steps",
    "epochs",
    "learning rate",
    "clip",
    "scores",
)


def settings(lines: Lines) -> str:
    """What was chosen on held-out examples, task by task."""
    rows = []
    for file, words in _SWEPT.items():
        for (method, epsilon), runs in sorted(
            finals(lines(file)).items(), key=lambda item: (item[0][1], item[0][0])
        ):
            if method != _SHOWN.get(file, "dp_adam_ilg"):
                continue
            config = runs[0]["config"]
            privacy, optimizer = config["privacy"], config["optimizer"]
            examples = runs[0]["num_examples"]
            clip = f"`{privacy['clip_mode']}`, {privacy['l2_clip_norm']:g}"
            rows.append(
                [
                    words,
                    f"{epsilon:g}",
                    f"{privacy['batch_size']:,} of {examples:,}",
                    f"{privacy['num_steps']:,}",
                    f"{privacy['batch_size'] * privacy['num_steps'] / examples:.0f}",
                    f"{optimizer['learning_rate']:g}",
                    clip,
                    f"{100 * privacy['score_budget']:g} %",
                ]
            )
    return markdown(_SETTINGS, rows)


def step_count(lines: Lines) -> str:
    """Cells that were run on test data with several numbers of steps."""
    rows = []
    for file, words in _SWEPT.items():
        runs = [r for r in lines(file) if r.get("phase") == "final"]
        for (method, epsilon), own in group(runs, "method", "epsilon").items():
            by_steps = group(own, "steps")
            if len(by_steps) < 2 or method not in ("dp_adam", "dp_adam_ilg"):
                continue
            found = {n: percent(of, "accuracy") for n, of in sorted(by_steps.items())}
            few, many = list(found)[0], list(found)[-1]
            rows.append(
                [
                    words,
                    f"{epsilon:g}",
                    "DP-Adam" if method == "dp_adam" else "`min_noise_energy`",
                    f"{few:,}: {spread(found[few].values())}",
                    f"{many:,}: {spread(found[many].values())}",
                    or_tie(gap(found[many], found[few])),
                ]
            )
    head = ["task", "epsilon", "method", "steps: test %", "more steps: test %"]
    return markdown([*head, "difference, 95 % interval"], rows)


def clip_norm(lines: Lines) -> str:
    """Held-out accuracy by clip norm, at the best learning rate of each."""
    rows = []
    for file, words in {"compare_adult": "Adult", "compare_digits": "Digits"}.items():
        runs = [
            r
            for r in lines(file)
            if r.get("phase") == "tuning" and r["parameter"] == "privacy.l2_clip_norm"
        ]
        for (method, epsilon), own in group(runs, "method", "epsilon").items():
            if method not in _CLIPPED:
                continue
            best = {
                norm: max(100 * r["accuracy"] for r in of)
                for norm, of in sorted(group(own, "value").items())
            }
            rows.append(
                [words, f"{epsilon:g}", _CLIPPED[method]]
                + [f"{best[norm]:.2f}" for norm in (0.3, 1.0)]
            )
    head = ["task", "epsilon", "method", "clip norm 0.3: %", "clip norm 1: %"]
    return markdown(head, rows)


_CLIPPED = {
    "dp_adam": "DP-Adam",
    "dp_adam_ilg": "`min_noise_energy`",
    "dp_adam_ilg, min_noise_energy": "`min_noise_energy`",
}
_SHOWN = {
    "compare_imdb": "dp_adam_ilg, 8 bands, balanced",
    "compare_imdb_transformer": "dp_adam_ilg, 8 bands",
    "compare_text_lm": "dp_adam_ilg, leaves",
}
_SWEPT = {
    "compare_imdb": "IMDB, embedding in bands",
    "compare_imdb_transformer": "IMDB, transformer in bands",
    "compare_flights": "Flights",
    "compare_mnist_scattering": "MNIST on scattering",
    "compare_fashion_scattering": "Fashion-MNIST on scattering",
    "compare_cifar_scattering": "CIFAR-10 on scattering",
    "compare_mnist_cnn": "MNIST, CNN",
    "compare_fashion_cnn": "Fashion-MNIST, CNN",
    "compare_cifar_cnn": "CIFAR-10, CNN",
    "compare_adult": "Adult",
    "compare_text_lm": "Next words",
}
