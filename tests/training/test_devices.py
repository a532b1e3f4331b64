"""On many devices: the run of one device, its noise to the bit, and what is sent."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.device_program import GROUPS, PARAMS

NUMBERS = sum(x.size for x in PARAMS.values())
KEPT_WHOLE = PARAMS["d"].size  # no axis of it can be cut
ROUNDING = 1e-6  # largest difference of parameters after three steps of 0.01


def on_eight_devices(*args):
    flags = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.device_program", *args],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
            "JAX_PLATFORMS": "cpu",
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def check(got):
    assert got["devices"] == 8
    assert got["moved"] > 0.01
    assert max(got["apart"].values()) < ROUNDING, got["apart"]
    assert got["correlated"]["apart"] < ROUNDING
    assert got["correlated"]["cut"] == [True, True, True, False]
    assert got["correlated"]["rows"] == 2
    for shards, noise in got["noise"].items():
        assert all(noise["same"]), f"noise differs on {shards} shards"
        cut = int(shards) > 1
        assert noise["cut"] == [cut, cut, cut, False]
        assert noise["collectives"] == {}, "noise travels between devices"
        assert bool(noise["whole"]) != cut, "a device draws what is not its own"


def check_volume(got, engine):
    """Two numbers a gradient, where ordinary training sends one, plus the scores."""
    assert got["ordinary"] == {"all-reduce": NUMBERS}
    assert got[f"replicated {engine}"] == {"all-reduce": 2 * NUMBERS + GROUPS}
    pieces = (NUMBERS - KEPT_WHOLE) // 8
    assert got[f"cut {engine}"] == {
        "all-gather": NUMBERS - KEPT_WHOLE,
        "reduce-scatter": 2 * pieces,
        "all-reduce": 2 * KEPT_WHOLE + GROUPS,
    }


def test_eight_devices_give_the_one_device_run():
    got = on_eight_devices("--quick")
    check(got)
    check_volume(got, "vmap")


@pytest.mark.slow
def test_every_mesh_and_engine_gives_the_one_device_run():
    got = on_eight_devices()
    assert len(got["apart"]) == 12
    check(got)
    for engine in ("vmap", "bookkeeping"):
        check_volume(got, engine)
        pieces = (NUMBERS - KEPT_WHOLE) // 4  # added up over two replicas
        assert got[f"both {engine}"]["all-reduce"] == 2 * (pieces + KEPT_WHOLE) + GROUPS
