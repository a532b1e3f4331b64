"""Rows of a table that examples look up: which they are, and the loss of a few.

Floor 2, inner room: imports `bookkeeping`, `adding` and below.
Enter by `tables.find_tables`, `traced.compact_loss` and `counts.count_rows`.
"""
