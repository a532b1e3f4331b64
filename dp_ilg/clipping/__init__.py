"""Clipped gradients of a batch: clip modes, lots, and the engines that find norms.

Floor 2: imports `geometry` and below; the fast engine is in `bookkeeping`.
Enter by `clipped_grad.clipped_grad`, `clip.clip_per_example`, `lots.clipped_lot`,
`clip_schedule.clip_by_schedule` and `engine_table.ENGINES`.
"""
