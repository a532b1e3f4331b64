"""Shared test set-up: shape checks on every annotated function of the package."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook("dp_ilg", "beartype.beartype")
