"""Noise that cancels between steps: its strategy, its event, and when it pays.

Floor 1, part of `accounting`, without JAX: imports NumPy, SciPy and `validation`.
Enter by `strategies.optimal`; `cycles` has the event, `choice` the number of bands.
"""
