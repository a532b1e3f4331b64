"""What a guarantee means, in words and in what an attacker can guess.

Floor 1: imports plans and accountants of `dp_ilg.accounting`; no JAX.
Enter by `statement.describe` and `membership.right_guesses`.
"""
