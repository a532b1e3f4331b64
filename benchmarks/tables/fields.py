"""What every field of a configuration means: as `dp-ilg train --help` says it."""

from dp_ilg.experiments.config.meanings import MEANINGS

__all__ = ["MEANINGS"]
