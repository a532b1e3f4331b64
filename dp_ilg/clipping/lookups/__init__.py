"""Rows of a table that examples look up: which, how many read each, and the loss of few.

Floor 2, inner room: imports `bookkeeping`, `adding` and below.
Enter by `tables.find_tables`, `traced.compact_loss` and `counts.count_rows`.
"""
