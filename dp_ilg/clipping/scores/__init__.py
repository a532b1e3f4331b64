"""Scores of one example: how important each group is, as a vector of norm at most 1.

Floor 2, inner room: imports `geometry` and below; `clip` uses it.
Enter by `table.SCORES`, `table.Score` and `statistics.Statistics`.
"""
