"""What all benchmarks write beside their numbers, and where results are."""

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import jax

    names = ("jax", "optax", "numpy", "dp-accounting")
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            models = [x.split(":")[1].strip() for x in lines if "model name" in x]
        return f"{len(models)} x {models[0]}"
    except (OSError, IndexError):
        return platform.processor()


def commit() -> str:
    """The checked-out commit, or an empty string outside git."""
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def finished(path: Path) -> list[dict[str, Any]]:
    """The records that are there."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]
