"""What a run may cost and what it has cost: plan, schedules, accountants, ledger.

Floor 1, without JAX: imports `base`, `validation`, dp-accounting, NumPy and SciPy.
Enter by `calibration.plan_privacy`, `plan.PrivacyPlan`, `schedules`,
`ledger.PrivacyLedger`, `filters.PrivacyFilter`, and `epsilon` for an event of your own.
"""

from dp_ilg.accounting.accountants import (
    ACCOUNTANTS,
    NEIGHBORING_RELATIONS,
    effective_noise_multiplier,
    epsilon,
)

__all__ = [
    "ACCOUNTANTS",
    "NEIGHBORING_RELATIONS",
    "effective_noise_multiplier",
    "epsilon",
]
