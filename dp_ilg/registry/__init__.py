"""Parts from outside the package, by name: a rule, a method, a data set and others.

Floor 0: imports the standard library only, so that every room can ask it.
Enter by `lookup.resolve`, `lookup.table` and `source.load`.
"""
