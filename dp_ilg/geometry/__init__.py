"""Groups of parameters, their weights, and the norm in which examples are clipped.

Floor 1: imports `base` and `validation` only.
Enter by `geometry.Geometry`, `layers.blocks` and its kin, `rules.RULES` (importance to
weights) and `maps.AxisMaps` (one linear map a leaf).
"""
