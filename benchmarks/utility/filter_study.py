"""Whether a budget spent by what was released beats one that is fixed beforehand.

    python benchmarks/utility/filter_study.py --data-dir ../shared/data
    python benchmarks/utility/filter_study.py --toy
    python benchmarks/utility/filter_study.py --table

A run is trained in stages of equal length. "fixed" calibrates one plan by privacy loss
distributions; the others share the same epsilon through a `dp_ilg.PrivacyFilter`, in
equal parts or in parts that follow the signal-to-noise ratio of the released gradients
of the stage before, to some power: below 0 a stage with less signal gets more. Every
finished run is one JSON line and is not run again. Seeds are published: measurements,
no protection.
"""

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parents[1]))
import dp_ilg  # noqa: E402
from common import RESULTS, ROOT, commit, finished, machine  # noqa: E402
from dp_ilg.clipping.clip import as_clip_mode  # noqa: E402
from dp_ilg.experiments.config.schema import Config, read_config  # noqa: E402
from dp_ilg.experiments.runs.job import Job, build_job  # noqa: E402
from dp_ilg.experiments.runs.keys import run_keys  # noqa: E402
from dp_ilg.experiments.runs.recipe import layering  # noqa: E402
from dp_ilg.sampling.poisson import PoissonSampler  # noqa: E402

LINES = RESULTS / "filter_study.jsonl"
# name -> power of the last stage's signal-to-noise ratio; None: one plan, no filter
MODES: dict[str, float | None] = {
    "fixed": None,
    "filter, equal parts": 0.0,
    "filter, more where the signal is weak": -0.5,
    "filter, more where the signal is strong": 0.5,
}
MOST = 2.0  # a stage weighs at most so many times, at least one so manieth of, others


def released_ratio(total: Any, squares: float, count: int) -> float:
    """Signal over noise of a step, from the releases of a stage alone.

    Independent noise adds to the mean square of single releases, but not to products
    of two of them, whose mean estimates the squared signal.
    """
    length = float(sum(jnp.vdot(x, x) for x in jax.tree.leaves(total)))
    signal = max((length - squares) / (count * (count - 1)), 0.0)
    return signal / max(squares / count - signal, 1e-30)


def stage_plans(job: Job, mode: str, count: int) -> Callable[[int, list], Any]:
    """(stage, ratios of the stages before) -> the plan of the stage."""
    plan, power = job.plan, MODES[mode]
    steps = plan.num_steps // count
    if power is None:
        z = float(plan.noise_multipliers[0])
        one = dataclasses.replace(plan, num_steps=steps, stages=((steps, z),))
        return lambda stage, ratios: one
    budget = dp_ilg.PrivacyFilter(plan.target_epsilon, plan)
    facts = {
        name: getattr(plan, name)
        for name in ("batch_size", "score_budget", "l2_clip_norm", "max_batch_size")
    }
    assert not plan.prior_releases, "no stage is charged for them"

    def choose(stage: int, ratios: list[float]) -> Any:
        weight = 1.0  # of this stage, where every later one has 1
        if ratios:
            change = (max(ratios[-1], 1e-6) / max(ratios[0], 1e-6)) ** power
            weight = min(max(change, 1 / MOST), MOST)
        part = budget.left / budget.budget * weight / (weight + count - stage - 1)
        chosen = budget.stage(part, num_steps=steps, **facts)
        budget.admit(chosen)
        return chosen

    return choose


def train(job: Job, mode: str, count: int, seed: int) -> dict[str, Any]:
    """One run: its accuracy, and the noise and ratio of every stage."""
    config, keys = job.config, run_keys(job, seed)
    params = average = job.model.init(keys.params)
    adam = optax.adam(config.optimizer.learning_rate)
    moments = adam.init(params)
    choose, ratios, noises = stage_plans(job, mode, count), [], []
    for stage in range(count):
        plan = choose(stage, ratios)
        noises.append(float(plan.noise_multipliers[0]))
        tx = release_chain(config, plan, jax.random.fold_in(keys.optimizer, stage))
        sampler_key = jax.random.fold_in(keys.sampler, stage)
        sampler = PoissonSampler(plan.num_examples, plan.sampling_prob, key=sampler_key)
        state, first = tx.init(params), stage * plan.num_steps
        total, squares = jax.tree.map(jnp.zeros_like, params), 0.0
        step = stage_step(job, tx, adam)
        for t in range(plan.num_steps):
            for number, (indices, mask) in enumerate(sampler.chunks(t)):
                assert number == 0, "a draw beyond the padded size"
                batch = tuple(np.asarray(part)[indices] for part in job.rows())
                carried = (params, average, state, moments, total)
                carried, square = step(carried, batch, mask, first + t)
                params, average, state, moments, total = carried
                squares += float(square)
        ratios.append(released_ratio(total, squares, plan.num_steps))
    right = np.asarray(jax.jit(job.model.predict)(average, job.data.x_test))
    accuracy = float(np.mean(right == job.data.y_test))
    return {"test_accuracy": accuracy, "noise": noises, "ratios": ratios}


def release_chain(config: Config, plan: Any, key: Any) -> Any:
    """What makes a release of per-example gradients; Adam stands behind it."""
    one, two = jax.random.split(key)
    rule, mode = config.optimizer.importance, as_clip_mode(config.privacy.clip_mode)
    return dp_ilg.chain(
        dp_ilg.clip_per_example(plan.l2_clip_norm, clip_mode=mode),
        dp_ilg.score_layer_importance(
            rule, plan, key=one, layers=layering(config.optimizer)
        ),
        dp_ilg.add_importance_noise(plan, key=two),
    )


def stage_step(job: Job, tx: Any, adam: Any) -> Callable:
    """One compiled step: release, Adam, average of iterates, sums for the ratio."""

    @jax.jit
    def step(carried: Any, batch: Any, mask: Any, t: Any) -> tuple[Any, Any]:
        params, average, state, moments, total = carried
        clipped = job.grad_fn(
            params, batch, geometry=tx.geometry(state), is_padding_example=mask
        )
        release, state = tx.update(clipped, state, params)
        updates, moments = adam.update(release, moments, params)
        params = optax.apply_updates(params, updates)
        kept = jnp.minimum(job.config.optimizer.average, (1 + t) / (10 + t))
        average = jax.tree.map(lambda a, p: kept * (a - p) + p, average, params)
        total = jax.tree.map(jnp.add, total, release)
        square = sum(jnp.vdot(x, x) for x in jax.tree.leaves(release))
        return (params, average, state, moments, total), square

    return step


def table(records: list[dict[str, Any]]) -> str:
    """Every mode against the first, paired by seed, as Markdown."""
    base = {r["seed"]: r["test_accuracy"] for r in records if r["mode"] == "fixed"}
    out = ["| budget | seeds | test % | against fixed | noise of the stages, seed 0 |"]
    out.append("|---|---|---|---|---|")
    for mode in MODES:
        own = [r for r in records if r["mode"] == mode]
        if not own:
            continue
        got = [100 * r["test_accuracy"] for r in own]
        gaps = [100 * (r["test_accuracy"] - base[r["seed"]]) for r in own]
        spread = statistics.stdev(got) if len(got) > 1 else math.nan
        noise = ", ".join(f"{z:.2f}" for z in own[0]["noise"])
        out.append(
            f"| {mode} | {len(own)} | {statistics.mean(got):.2f} ± {spread:.2f} | "
            f"{statistics.mean(gaps):+.2f} | {noise} |"
        )
    return "\n".join(out)


def main() -> None:
    """Runs what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="imdb_embedding")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--stages", type=int, default=5)
    parser.add_argument("--data-dir")
    parser.add_argument("--toy", action="store_true", help="few steps, kept apart")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    path = LINES
    changes: dict[str, Any] = dict(epsilon=1.0, batch_size=1024, num_steps=300)
    if args.toy:
        path = Path(tempfile.mkdtemp()) / "filter_study.jsonl"
        args.config, args.seeds, args.stages = "digits", 1, 2
        changes = dict(epsilon=1.0, batch_size=64, num_steps=6)
    known = {(r["mode"], r["seed"]) for r in finished(path)}
    if not args.table:
        config = read_config(ROOT / "configs" / f"{args.config}.toml")
        privacy = dataclasses.replace(config.privacy, **changes)
        rate = {} if args.toy else {"learning_rate": 0.02}
        optimizer = dataclasses.replace(config.optimizer, **rate)
        config = dataclasses.replace(config, privacy=privacy, optimizer=optimizer)
        job = build_job(config, Path(args.data_dir) if args.data_dir else None)
        for seed in range(args.seeds):
            for mode in MODES:
                if (mode, seed) in known:
                    continue
                began = time.perf_counter()
                record = {"config": args.config, "mode": mode, "seed": seed} | changes
                record |= train(job, mode, args.stages, seed)
                seconds = round(time.perf_counter() - began, 1)
                record |= machine() | {"seconds": seconds, "commit": commit()}
                record["command"] = "python benchmarks/utility/filter_study.py"
                with path.open("a") as file:
                    print(json.dumps(record), file=file)
    print(table(finished(path)))


if __name__ == "__main__":
    main()
