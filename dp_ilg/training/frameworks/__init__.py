"""Models of any framework as parameters and a pure loss of one example.

Floor 5: extras (Flax, Equinox) are imported inside functions only.
Enter by `adapt.adapt`, `optimizers.optimizer_of` and `keys.example_key`.
"""
