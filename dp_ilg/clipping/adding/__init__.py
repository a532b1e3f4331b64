"""Sums over examples that no other example changes: float64, and what it is wrong by.

Floor 2, inner room: imports `geometry` and below; the engines and `clip` use it.
Enter by `sums.over_examples` and `sum_error.sum_error`.
"""
