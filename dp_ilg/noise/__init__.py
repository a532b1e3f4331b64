"""Gaussian noise in the geometry of the clip, drawn once a step.

Floor 2: imports `geometry`, `accounting` and below.
Enter by `add_noise.add_importance_noise`, `normal.normal_steps` and
`secure.SecureNoise`.
"""
