"""How long training waits for its rows, by source, with and without reading ahead.

    python benchmarks/speed/input.py
    python benchmarks/speed/input.py --toy --out /tmp/input.jsonl

Every run takes the same private steps on the same rows from a feed, as the trainer
does, and records the share of its time in which the loop waited for rows. Sources:
memory; a folder of shards whose pages are dropped from the system's cache first; a
list that decodes every row in Python; grain and datasets, where they are installed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dp_ilg
from dp_ilg.experiments.data.shards import open_shards, write_shards
from dp_ilg.training.feeds import Feed
from dp_ilg.training.sources import GatheredSource
from dp_ilg.training.step import make_train_step

sys.path.insert(0, str(Path(__file__).parents[1]))
import step_records as records  # noqa: E402
from common import RESULTS, machine  # noqa: E402

LINES = RESULTS / "input.jsonl"
SIDE, HIDDEN = 28, 256


def images(count: int) -> dict[str, np.ndarray]:
    """Random pixels and labels."""
    dice = np.random.default_rng(0)
    x = dice.integers(0, 256, (count, SIDE, SIDE), np.uint8)
    return {"x": x, "y": dice.integers(0, 10, count, np.int32)}


def ready(rows: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A batch as the loss takes it."""
    x = np.asarray(rows["x"], np.float32).reshape(len(rows["y"]), -1) / 255
    return x, np.asarray(rows["y"], np.int32)


def in_memory(data: dict[str, np.ndarray], folder: Path) -> Any:
    """Arrays."""
    return data


def in_shards(data: dict[str, np.ndarray], folder: Path) -> Any:
    """A folder of mapped files, none of it in memory."""
    if not folder.exists():
        write_shards(data, folder, rows_per_shard=max(1, len(data["y"]) // 8))
    for path in folder.glob("*.npy"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return open_shards(folder)


class Decoded:
    """A list of rows that each take some Python to be read."""

    def __init__(self, data: dict[str, np.ndarray]):
        """Keeps the arrays."""
        self.data = data

    def __len__(self) -> int:
        return len(self.data["y"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: array[index].copy() for name, array in self.data.items()}


def in_python(data: dict[str, np.ndarray], folder: Path) -> Any:
    """Row by row."""
    return Decoded(data)


def in_grain(data: dict[str, np.ndarray], folder: Path) -> Any:
    """A MapDataset over the rows."""
    import grain  # pyright: ignore[reportMissingImports]

    return grain.MapDataset.source(Decoded(data)).map(lambda row: row)


def in_datasets(data: dict[str, np.ndarray], folder: Path) -> Any:
    """A table of Arrow."""
    import datasets  # pyright: ignore[reportMissingImports]

    features = {
        "x": datasets.Array2D((SIDE, SIDE), "uint8"),
        "y": datasets.Value("int32"),
    }
    table = datasets.Dataset.from_dict(data, features=datasets.Features(features))
    return table.with_format("numpy")


SOURCES: dict[str, Callable[[dict[str, np.ndarray], Path], Any]] = {
    "memory": in_memory,
    "shards": in_shards,
    "python": in_python,
    "grain": in_grain,
    "datasets": in_datasets,
}


def loop(source: Any, plan: dp_ilg.PrivacyPlan, ahead: int) -> dict[str, float]:
    """Takes all steps of the plan; the first one, which compiles, is not counted."""
    params = {
        "a": jnp.zeros((SIDE * SIDE, HIDDEN)) + 0.01,
        "b": jnp.zeros((HIDDEN, 10)) + 0.01,
    }
    tx = dp_ilg.dp_adam_ilg(1e-3, plan, key=jax.random.key(0))

    def loss_fn(params: Any, example: Any) -> Any:
        logits = jnp.tanh(example[0] @ params["a"]) @ params["b"]
        return jax.nn.logsumexp(logits) - logits[example[1]]

    grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=plan.l2_clip_norm)
    step, state = make_train_step(grad_fn, tx), tx.init(params)
    sampler = dp_ilg.PoissonSampler.for_plan(plan, key=1)
    began = waited = 0.0
    with Feed(source, sampler, ahead=ahead) as feed:
        for t in range(plan.num_steps):
            if t == 1:
                began, waited = time.perf_counter(), feed.waited
            params, state = step(params, state, feed.chunks(t))
            jax.block_until_ready(params)
        seconds = time.perf_counter() - began
        waited = feed.waited - waited
    return {
        "step_ms": 1e3 * seconds / (plan.num_steps - 1),
        "waited_ms": 1e3 * waited / (plan.num_steps - 1),
        "waited_share": waited / seconds,
    }


def main() -> None:
    """Measures every source that is there, with and without a thread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=LINES)
    parser.add_argument("--toy", action="store_true", help="a few tiny steps")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=31)
    parser.add_argument("--sources", nargs="*", default=[*SOURCES], choices=[*SOURCES])
    args = parser.parse_args()
    if args.toy:
        args.rows, args.batch_size, args.steps = 200, 16, 3
    plan = dp_ilg.plan_privacy(
        noise_multiplier=1.0,
        delta=1e-6,
        num_examples=args.rows,
        batch_size=args.batch_size,
        num_steps=args.steps,
    )
    data, about = images(args.rows), machine() | records.run_facts()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.sources:
            for ahead in (0, 2):
                try:
                    rows = SOURCES[name](data, Path(folder) / "shards")
                except ImportError as error:
                    print(f"{name}: not installed ({error.name})")
                    break
                source = GatheredSource(rows, ready)
                found = {"source": name, "ahead": ahead, "toy": args.toy}
                found |= {"rows": args.rows, "batch_size": args.batch_size}
                found |= loop(source, plan, ahead) | {"load": os.getloadavg()[0]}
                records.append(args.out, found | about)
                keys = ("step_ms", "waited_ms", "waited_share")
                print(name, ahead, json.dumps({k: round(found[k], 4) for k in keys}))


if __name__ == "__main__":
    main()
