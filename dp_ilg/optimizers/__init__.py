"""Chains of the verbs, layer importance, and what takes steps with a release.

Floor 3: imports `clipping`, `noise` and below.
Enter by `chains.chain`, `chains.dp_adam_ilg`, `importance.score_layer_importance`,
`adam`, `balance` and `averaging`.
"""
