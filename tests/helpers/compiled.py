"""A fixture: runs of one configuration share what XLA compiled; the bits are equal."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

_FOLDER, _SHORTEST = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    before = jax.config.values[_FOLDER], jax.config.values[_SHORTEST]
    jax.config.update(_FOLDER, str(tmp_path_factory.mktemp("compiled")))
    jax.config.update(_SHORTEST, 0.0)
    compilation_cache.reset_cache()
    yield
    jax.config.update(_FOLDER, before[0])
    jax.config.update(_SHORTEST, before[1])
    compilation_cache.reset_cache()
