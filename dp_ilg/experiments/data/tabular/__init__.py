"""Tables of categories, numbers and ratings, by public lists and formats only.

Floor 8, inside `experiments.data`: imports its readers of files and `container`.
Enter by `tables.LOADERS`; `adult`, `flights`, `movielens` and `insteval` read a file
each, and `ratings` makes data sets of those who rate and what is rated.
"""
