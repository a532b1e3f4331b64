"""What is paid beside composition: the distance of the noise's law to a Gaussian's.

Floor 1, without JAX: imports `validation` only.
Enter by `noise_law.charge`.
"""
