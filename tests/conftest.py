"""Shared test set-up: shape checks on every function, and compiling that is cheap.

Most of a test's time is XLA's. So programs are compiled without its costly passes, kept
on disk for the other workers and the next run, and dropped from memory when they are
many.
`pytest --optimized` compiles as users do; CI runs the laws and the noise that way.
"""

import ctypes
import gc
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # of the workers: theirs are not kept
os.environ.setdefault("DP_ILG_CACHE", "")  # every epsilon is computed anew
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402  (reads the environment)
from jaxtyping import install_import_hook  # noqa: E402

import tests.helpers.typechecker  # noqa: E402, F401  (the hook looks it up by name)

install_import_hook("dp_ilg", "tests.helpers.typechecker.check")


def pytest_addoption(parser):
    parser.addoption(
        "--optimized", action="store_true", help="compile as users do (slower)"
    )


def pytest_configure(config):
    """XLA reads its flags when it is first used, which is after this."""
    if not config.getoption("--optimized"):
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK])


MOST_RESIDENT = 3 << 28
"""Bytes from which a worker drops its compiled programs at the end of a file."""


def resident():
    """Bytes of this process in memory; more than any bound where nobody says so."""
    if sys.platform != "linux":
        return sys.maxsize
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


@pytest.fixture(scope="module", autouse=True)
def memory_within_bounds():
    """Gives the memory of compiled programs back to the system when they are many."""
    yield
    if resident() > MOST_RESIDENT:
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)


SLOW = ROOT / "tests" / "slow.txt"


def slow_tests():
    """Node ids of the slow tier that is kept as a list, with measured seconds."""
    lines = [x for x in SLOW.read_text().splitlines() if x and x[0] != "#"]
    return {name: float(took) for took, name in (x.split(" ", 1) for x in lines)}


def pytest_collection_modifyitems(config, items):
    """Marks what the list names; a name that no test has any more is an error."""
    listed = slow_tests()
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
    if len(items) > 3000:  # the whole suite
        gone = set(listed) - {item.nodeid for item in items}
        if gone:
            raise pytest.UsageError(f"{SLOW} names no test: {', '.join(sorted(gone))}.")


@pytest.fixture(autouse=True)
def _no_draw_of_another_test():
    """Forgets draws that an earlier test left alive, whose masks nobody has read."""
    from dp_ilg.sampling.batch import UNREAD

    UNREAD.clear()
