"""A run folder, read back: one page, its figures, and the look of every figure.

Floor 8: reads files, and imports nothing of how a run is made.
Enter by `page.write_report`, `record.read_run` and `svg`.
"""
