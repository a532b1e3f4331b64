"""Other published private optimizers as rows of a table, and the published claims.

Floor 4: imports `optimizers` and below. `published` has no privacy guarantee.
Enter by `BASELINES`, `baseline(name)`, `plain`, `adaptive` and `published`.
"""

from dp_ilg.baselines.table import BASELINES, Baseline, baseline

__all__ = ["BASELINES", "Baseline", "baseline"]
