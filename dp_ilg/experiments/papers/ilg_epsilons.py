"""Table 2 of the DP-AdamILG paper: the epsilons it claims, to the last digit.

Nothing is trained here: an epsilon follows from the epochs that a method took to reach
the target accuracy, which the paper prints beside it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from dp_ilg.baselines.claims import (
    SETTINGS,
    PublishedSettings,
    claimed_epsilon,
    claimed_noise_multipliers,
    claimed_rho,
    decayed,
)
from dp_ilg.experiments.papers.reproduce import ReproduceOptions

_ADADP_NOISE = 8.0
# method -> the noise multipliers of its first epochs
METHODS: dict[str, Callable[[PublishedSettings, int], np.ndarray]] = {
    "DP-AdamILG": lambda s, epochs: claimed_noise_multipliers(s)[:epochs],
    "ADADP": lambda s, epochs: np.full(epochs, _ADADP_NOISE),
    "DP-SGD(decay)": lambda s, epochs: decayed(s.noise_multiplier, s.decay, epochs),
}

# data set -> target accuracy in percent, then (claimed epsilon, epochs) by method
PRINTED: dict[str, tuple[float, dict[str, tuple[str, int]]]] = {
    name: (target, dict(zip(METHODS, cells, strict=True)))
    for name, target, *cells in [
        ("mnist", 96.5, ("2.238", 12), ("3.703", 33), ("6.885", 39)),
        ("fashion_mnist", 85.5, ("1.948", 10), ("2.172", 12), ("7.091", 40)),
        ("svhn", 90.2, ("1.862", 5), ("5.299", 64), ("9.227", 89)),
        ("cifar10", 65.2, ("2.220", 7), ("4.051", 39), ("8.705", 81)),
        ("cifar100", 23.5, ("2.382", 8), ("3.938", 37), ("8.305", 75)),
    ]
}


def table2(options: ReproduceOptions) -> dict[str, Any]:
    """Computes the 15 claimed epsilons.

    Args:
        options: only its parts, the data sets, matter.

    Returns:
        Title, notes, rows with the printed and the computed number, and how many
        agree to the last printed digit.

    Raises:
        ValueError: for a file to keep runs in: there are none.

    Privacy: these are claims. For DP-AdamILG as published there is no guarantee.

    Example:
        >>> found = table2(ReproduceOptions())
        >>> len(found["rows"]), found["agreeing"]
        (15, 15)

    Reference: Li et al. 2024, Table 2.
    """
    if options.out is not None:
        raise ValueError(
            f"--out is {options.out}, but table2 trains nothing that could be kept; "
            "leave it out."
        )
    rows = [
        _row(name, target, method, *cell)
        for name, (target, cells) in PRINTED.items()
        for method, cell in cells.items()
        if name in (options.only or PRINTED)
    ]
    return {
        "title": "Li et al. 2024, Table 2: claimed epsilon to reach a test accuracy",
        "notes": [
            "Claimed: zCDP, one charge of 1/(2 sigma^2) an epoch, delta 1e-5; epochs "
            "are the paper's, nothing was trained. DP-AdamILG as published has NO "
            "privacy guarantee (see dp-ilg audit published)."
        ],
        "rows": rows,
        "agreeing": sum(row["agrees"] for row in rows),
    }


def _row(
    name: str, target: float, method: str, printed: str, epochs: int
) -> dict[str, Any]:
    settings = SETTINGS[name]
    rho = claimed_rho(METHODS[method](settings, epochs))
    found = f"{claimed_epsilon(rho, settings.delta):.3f}"
    return {
        "data_set": name,
        "target": target,
        "method": method,
        "epochs": epochs,
        "claimed_epsilon_printed": printed,
        "claimed_epsilon_computed": found,
        "agrees": found == printed,
    }
