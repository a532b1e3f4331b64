"""Facts about private data, released once and charged: directions, numbers.

Floor 3: imports `noise` and below.
Enter by `pca.private_pca` and `factor_pca.private_factor_pca` (feature maps), and
`numbers` (moments, counts, quantiles, accuracy).
"""
