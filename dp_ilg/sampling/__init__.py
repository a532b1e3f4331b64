"""Which examples a step sees: Poisson batches as a function of key and step.

Floor 1: imports `base` and `validation` only.
Enter by `poisson.PoissonSampler` and `gather.take`, which reads its rows.
"""
