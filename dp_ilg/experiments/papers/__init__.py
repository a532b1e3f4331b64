"""The tables of two papers, measured here: DP-AdamILG, and Abadi et al. 2016.

Floor 10: imports runs and below.
Enter by `reproduce.REPRODUCTIONS` and the modules it names.
"""
