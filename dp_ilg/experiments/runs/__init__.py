"""A run from a configuration to a finished folder, on one host or on many.

Floor 9: imports data, models, reports and below.
Enter by `runner.run_training`, `job.build_job`, `trainer.train` and `folder`.
"""
