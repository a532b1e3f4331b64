"""Lower bounds on epsilon and delta, and an audit of anybody's training step.

Floor 1: imports `base` and `validation` only.
Enter by `audit_step` (a step against its plan), `epsilon_lower_bound` (any scores),
`canary_report` (of one run, with curve and intervals), `gaussian_lower_bound` (normal
ones) and `delta_lower_bound` (what an accountant's claim is checked with).
"""

from dp_ilg.auditing.bounds import (
    EpsilonLowerBound,
    epsilon_lower_bound,
    gaussian_lower_bound,
)
from dp_ilg.auditing.canary_scores import CanaryReport, canary_report
from dp_ilg.auditing.losses import delta_lower_bound
from dp_ilg.auditing.step_audit import StepAudit, audit_step

__all__ = [
    "CanaryReport",
    "EpsilonLowerBound",
    "StepAudit",
    "audit_step",
    "canary_report",
    "delta_lower_bound",
    "epsilon_lower_bound",
    "gaussian_lower_bound",
]
