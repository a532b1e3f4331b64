"""The certified accountant: epsilon at every delta and size, rounded up by proof.

Floor 1, part of `accounting`, without JAX: imports its `kinds`, NumPy and SciPy.
Enter by `accountant.epsilon`; `contour` has the sum and why it cannot be too small,
`moments` the losses of a step, `runs` those of a run.
"""
