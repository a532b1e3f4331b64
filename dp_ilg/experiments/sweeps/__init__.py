"""Comparisons: tasks x methods x epsilons x seeds, tuned equally and reported.

Floor 11: imports runs, papers and below.
Enter by `sweep.Sweep`, `compare.compare`, `statistics` and `layer_study`.
"""
