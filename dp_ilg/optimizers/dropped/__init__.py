"""Floor 3: what an optimizer does with groups that a step dropped, which is nothing.

May import the ground floors, clipping and noise, and its neighbours in `optimizers`.
Enter by `adam.scale_by_adam_of_kept` (Adam whose groups count their own steps) and
`still.hold_still` (any other transformation).
"""
