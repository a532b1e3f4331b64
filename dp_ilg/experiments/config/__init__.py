"""What one training run is: dataclasses read from TOML, strictly, and written back.

Floor 7: imports `training` and below.
Enter by `schema.Config`, `schema.read_config` and `fields.from_mapping`.
"""
