"""Geometry from what is public: priors over entries, probes by synthetic batches.

Floor 3, as `optimizers`: imports `clipping`, `noise` and below.
Enter by `prior.Prior`, `probe.Probe`, and their links `prior.set_prior` and
`link.probe_importance`.
"""
