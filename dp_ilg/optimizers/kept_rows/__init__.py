"""Rows of an embedding kept by a noisy count: all of a step happens on these alone.

Floor 3, inner room: imports `clipping`, `noise` and `optimizers`.
Enter by `keep.keep_rows`; `release.released_rows` is the charged choice, and
`compact.narrowed` the optimizer's state for the rows that were chosen.
"""
