"""Parts of a run from outside the package: which there are, and which code they are.

Floor 9: imports `config`, `data`, `models` and the library.
Enter by `parts.check_parts` and `parts.sources`.
"""
