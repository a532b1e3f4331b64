"""What a loss must not be, found in its arguments and in its program.

Floor 2: part of `clipping`; `purity.check_loss` calls what is here.
Enter by `advice.check_arguments` and `row_statistics.refuse_row_statistics`.
"""
