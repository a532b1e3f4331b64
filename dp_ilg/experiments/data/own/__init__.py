"""Data of the user's own: a file, a folder or a function, and features by a function.

Floor 8: imports `config` and `data`.
Enter by `named.load_named` and `features.outside_features`.
"""
