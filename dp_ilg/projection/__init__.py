"""Principal directions of private data, released once and charged to the plan.

Floor 3: imports `noise` and below.
Enter by `pca.private_pca` and `factor_pca.private_factor_pca` (feature maps).
"""
