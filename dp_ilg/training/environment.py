"""What besides key, data and plan decides the bits of a step.

A step that is taken twice must release the same bits twice (law: keyed by step).
Another version of the code, of XLA, or another processor may round a sum otherwise, and
two releases with one noise and two roundings give their difference away.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import jax

_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_disable_jit",
)
_DEVICE_COUNT = "--xla_force_host_platform_device_count"
_PACKAGE = Path(__file__).parents[1]


def environment(layout: str = "one device") -> dict[str, str]:
    """Names and versions of everything that may change a rounding.

    Args:
        layout: how devices and processes share the work.

    Returns:
        What it is to what it is called here: the digest of dp_ilg's source code,
        versions of the packages that compute, devices, processor, JAX's settings.

    Example:
        >>> sorted(environment())[:3]
        ['devices', 'dp_ilg source', 'flax']
    """
    settings = {name: str(getattr(jax.config, name)) for name in _SETTINGS}
    settings["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "")
    found = {name: _version(name) for name in _PACKAGES}
    return found | {
        "dp_ilg source": _source_digest(),
        "devices": _devices(),
        "layout": layout,
        "processor": _processor(),
        "settings": ", ".join(f"{k}={v}" for k, v in settings.items()),
    }


def check_repeatable(
    saved: Mapping[str, str] | None, step: int, layout: str = "one device"
) -> None:
    """Refuses to repeat a step where its bits may come out otherwise.

    Args:
        saved: what `environment` returned where the step was taken first.
        step: the step to be repeated.
        layout: as for `environment`.

    Raises:
        ValueError: naming what differs.

    Privacy:
        Only for a step that may have been released. Steps that are not on file can be
        taken anywhere: they are drawn with noise nobody has seen.

    Example:
        >>> check_repeatable(environment(), 3)
        >>> check_repeatable(environment() | {"jax": "0.1"}, 3)
        Traceback (most recent call last):
        ValueError: Step 3 may have been released already and would be repeated with \
another jax (0.1 then, ...
    """
    here = environment(layout)
    for name, value in here.items():
        before = (saved or {}).get(name)
        if before != value:
            raise ValueError(
                f"Step {step} may have been released already and would be repeated "
                f"with another {name} ({before} then, {value} now), which may round "
                "otherwise under the same noise; resume with what it was begun with."
            )


def code_digest() -> str:
    """A digest of what may make a step of one configuration come out otherwise.

    Returns:
        16 hexadecimal digits: of dp_ilg's source code, the packages that compute, JAX's
        settings, and the kinds of device and processor. How many devices share a step
        is left out, so that a seed gives the same run on one and on many.

    Example:
        >>> code_digest() == code_digest()
        True
    """
    facts = environment()
    facts["devices"] = ", ".join(sorted({d.device_kind for d in jax.devices()}))
    facts["processor"] = facts["processor"].partition(" of ")[2]
    flags = facts["settings"].replace("=--", "= --").split()
    facts["settings"] = " ".join(f for f in flags if _DEVICE_COUNT not in f)
    text = json.dumps(sorted(facts.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _source_digest() -> str:
    """A digest of this package's code, as it was when it was first asked for."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(_PACKAGE)).encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _devices() -> str:
    kinds = [device.device_kind for device in jax.devices()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


@functools.cache
def _processor() -> str:
    """The processor's name and how many cores may be used: sums follow both."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    name = names[0].strip() if names else platform.processor() or platform.machine()
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return f"{count or os.cpu_count()} cores of {name}"
