"""Networks of the bundled runs, in Flax linen and in Flax NNX.

Floor 8: imports `experiments.config` and below.
Enter by `networks.MODELS` and `sizes.SIZES`.
"""
