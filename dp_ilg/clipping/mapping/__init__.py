"""Maps of leaves in the fast engine: they act on factors, not on gradients.

Floor 2, inner room: imports `geometry` and the parts of `bookkeeping`; its engine uses
it. Enter by `placement.placement` (which factor an axis lies in) and `acting.acting`.
"""
