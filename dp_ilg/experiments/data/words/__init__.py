"""Texts as bags of their words, each word scaled by what its rank alone says.

Floor 8: imports `config` and `data`.
Enter by `scaled.SCALED_WORDS` and `scaled.log_rank`.
"""
