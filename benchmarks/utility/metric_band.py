"""Released metrics beside the true ones: how often is the truth within the band?

    python benchmarks/utility/metric_band.py --data-dir ../shared/data
    python benchmarks/utility/metric_band.py --toy

Private runs release the mean loss and accuracy of their training examples at every
step. Here the true means over all of them, at the same parameters, are computed beside
it, **without privacy**, to count how often the band of 95 % holds them. At the settings
that README and guide speak of: z = 1, an expected batch of 2,048, 1 % for metrics.
"""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

import dp_ilg
from dp_ilg.experiments.data.datasets import load_dataset
from dp_ilg.experiments.papers.reproduce import machine

DEVIATIONS, LEVEL = 1.96, 1e-3
SMOOTH_STEPS = 25
METRICS = {
    "accuracy": dp_ilg.Metric(lambda loss, right: right),
    "loss": dp_ilg.Metric(lambda loss, right: loss, high=4.6),
}


class Scene(NamedTuple):
    """Images of which a network of one hidden layer learns the classes."""

    x: Any
    y: Any
    batch_size: int
    num_steps: int
    hidden: int


def scene(data_dir: Path | None, toy: bool) -> Scene:
    """MNIST at full size, or the bundled digits for a few steps."""
    data = load_dataset("digits" if toy else "mnist", data_dir)
    x = np.asarray(data.x_train, np.float32).reshape(len(data.y_train), -1)
    sizes = (64, 30, 8) if toy else (2048, 150, 16)
    return Scene(x, np.asarray(data.y_train), *sizes)


def plan_of(job: Scene) -> dp_ilg.PrivacyPlan:
    """A multiplier of 1, and 1 % of each step for the metrics."""
    return dp_ilg.plan_privacy(
        noise_multiplier=1.0,
        delta=1e-6,
        num_examples=len(job.y),
        batch_size=job.batch_size,
        num_steps=job.num_steps,
        metric_budget=0.01,
    )


def initial(job: Scene, key: Any) -> Any:
    """Small random weights."""
    k1, k2 = jax.random.split(key)
    width = job.x.shape[1]
    return {
        "hidden": jax.random.normal(k1, (width, job.hidden)) / np.sqrt(width),
        "head": jax.random.normal(k2, (job.hidden, 10)) / np.sqrt(job.hidden),
        "bias": jnp.zeros(10),
    }


def loss_fn(params: Any, example: Any) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of one image, and whether the guess is right."""
    x, y = example
    logits = jnp.tanh(x @ params["hidden"]) @ params["head"] + params["bias"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return loss, logits.argmax() == y


def true_means(params: Any, x: Any, y: Any) -> dict[str, jax.Array]:
    """The means over all training examples: NOT private."""
    loss, right = jax.vmap(loss_fn, (None, 0))(params, (x, y))
    return {"accuracy": right.mean(), "loss": loss.clip(0, 4.6).mean()}


def run(job: Scene, plan: dp_ilg.PrivacyPlan, seed: int) -> list[dict[str, Any]]:
    """One private run: for every step what was released, and the truth."""
    keys = jax.random.split(jax.random.key(seed), 3)
    tx = dp_ilg.dp_adam_ilg(0.01, plan, key=keys[0], metrics=METRICS)
    grad_fn = dp_ilg.clipped_grad(
        loss_fn, l2_clip_norm=plan.l2_clip_norm, has_aux=True, metrics=METRICS
    )
    sampler = dp_ilg.PoissonSampler.for_plan(plan, key=keys[1])

    @jax.jit
    def step(params: Any, state: Any, batch: Any, mask: Any) -> Any:
        geometry = tx.geometry(state)
        clipped = grad_fn(params, batch, geometry=geometry, is_padding_example=mask)
        updates, state = tx.update(clipped, state, params)
        return optax.apply_updates(params, updates), state, tx.metrics(state)

    params, truth = initial(job, keys[2]), jax.jit(true_means)
    state, everybody, lines = tx.init(params), (jnp.asarray(job.x), job.y), []
    for t in range(plan.num_steps):
        true = truth(params, *everybody)
        rows = np.concatenate([chunk.indices for chunk in sampler.chunks(t)])
        batch = job.x[rows], job.y[rows]
        params, state, released = step(params, state, batch, rows < 0)
        if t % 50 == 49:
            print(f"seed {seed}: {t + 1} steps", flush=True)
        for name, found in released.items():
            numbers = {k: float(v) for k, v in found._asdict().items()}
            lines.append({"step": t, "metric": name, "true": float(true[name])})
            lines[-1] |= numbers
    return with_smoothed_truth(lines)


def with_smoothed_truth(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the same running average of the true means."""
    decay = (SMOOTH_STEPS - 1) / (SMOOTH_STEPS + 1)
    for name in METRICS:
        average = 0.0
        for line in (line for line in lines if line["metric"] == name):
            average = decay * average + (1 - decay) * line["true"]
            line["true_smoothed"] = average / (1 - decay ** (line["step"] + 1))
    return lines


def counted(runs: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """How often the truth was within the band, by metric."""
    found = []
    for name in METRICS:
        own = [line for lines in runs for line in lines if line["metric"] == name]
        column = lambda key, own=own: np.array([line[key] for line in own])  # noqa: E731
        gap = np.abs(column("value") - column("true"))
        smooth = np.abs(column("smoothed") - column("true_smoothed"))
        inside = gap < DEVIATIONS * column("stderr")
        count, expected = len(own), 2 * stats.norm.cdf(DEVIATIONS) - 1
        found.append(
            {
                "metric": name,
                "steps": count,
                "inside": float(inside.mean()),
                "least": float(stats.binom.ppf(LEVEL, count, expected) / count),
                "smoothed_inside": float(
                    (smooth < DEVIATIONS * column("smoothed_stderr")).mean()
                ),
                "stderr": float(column("stderr")[-1]),
                "smoothed_stderr": float(own[-1]["smoothed_stderr"]),
                "rms_error": float(np.sqrt(np.mean(gap**2))),
            }
        )
    return found


def main(argv: list[str] | None = None) -> list[dict]:
    """Reads the command line and prints one line a metric."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, help="append the records as JSON lines")
    parser.add_argument("--toy", action="store_true", help="digits, few steps, one run")
    args = parser.parse_args(argv)
    job = scene(args.data_dir, args.toy)
    plan = plan_of(job)
    runs = [run(job, plan, seed) for seed in range(1 if args.toy else args.seeds)]
    about = {
        "epsilon": plan.epsilon(),
        "delta": plan.delta,
        "batch_size": plan.batch_size,
        "num_examples": plan.num_examples,
        "metric_budget": plan.metric_budget,
        "noise_stderr": noise_alone(plan),
        "level": LEVEL,
        **machine(),
    }
    records = [{"kind": "count", **row, **about} for row in counted(runs)]
    for row in records:
        print(
            f"{row['metric']}: {100 * row['inside']:.1f} % of {row['steps']} true means"
            f" inside the band of 95 % (at least {100 * row['least']:.1f} % expected), "
            f"{100 * row['smoothed_inside']:.1f} % of the averages; standard error "
            f"{row['stderr']:.4f}, smoothed {row['smoothed_stderr']:.4f}",
            flush=True,
        )
    records += [{"kind": "curve", **line} for line in runs[0]]
    if args.out:
        with args.out.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    return records


def noise_alone(plan: dp_ilg.PrivacyPlan) -> float:
    """The standard error that noise gives a metric in [0, 1], without the draw's."""
    tau = float(plan.metric_noise_multipliers[0])
    return tau * len(METRICS) ** 0.5 / 2 / plan.batch_size


if __name__ == "__main__":
    main()
