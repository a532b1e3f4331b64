"""Training runs with Flax: configuration, data, trainer, report, command line."""
