"""Shared test set-up: shape checks on every annotated function of the package."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("DP_ILG_CACHE", "")  # every epsilon is computed anew

from jaxtyping import install_import_hook

import tests.helpers.typechecker  # noqa: F401  (the hook looks it up by name)

install_import_hook("dp_ilg", "tests.helpers.typechecker.check")
