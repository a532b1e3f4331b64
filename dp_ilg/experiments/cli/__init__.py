"""The command `dp-ilg`.

Floor 12: imports everything below.
Enter by `start.main`, which hands over to `main.main`; each command is a function of
a module here.
"""
