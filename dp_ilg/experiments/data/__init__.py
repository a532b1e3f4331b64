"""Data sets and fixed features of the bundled runs, and shards of any size.

Floor 8: imports `experiments.config` and below.
Enter by `datasets.load_dataset`, `features.FEATURES`, `shards.write_shards`,
`folders.load_folder` and `holdout`; `container.Dataset` is what they give.
"""
