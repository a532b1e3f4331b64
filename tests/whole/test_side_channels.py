"""Nothing about a step but its release depends on data: not time, shape, log, file."""

import dataclasses
import json
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from jax import lax

import dp_ilg
from dp_ilg.baselines.table import BASELINES
from dp_ilg.clipping.engine_table import ENGINES
from dp_ilg.experiments.config.schema import read_config
from dp_ilg.experiments.data.datasets import load_dataset
from dp_ilg.experiments.models.networks import build_model
from dp_ilg.experiments.models.sizes import Facts
from dp_ilg.experiments.runs import job, runner
from dp_ilg.experiments.runs.runner import run_training
from dp_ilg.sampling.poisson import PoissonSampler
from dp_ilg.training.checkpoints import read_checkpoint, save_checkpoint
from tests.experiments.runs.test_trainer import tiny
from tests.helpers.compiled import compiled_once  # noqa: F401 - a fixture
from tests.helpers.models import CLIP_MODES, mlp_batch, mlp_loss, mlp_params, plan
from tests.helpers.taint import Finding, findings

METRICS = {"loss": dp_ilg.Metric(lambda loss, aux: loss, high=3.0)}

# Where a predicate is data: nowhere. Predicates that are not, such as `wanted` in
# dp_ilg.noise.normal (is the step within the plan?), do not show up as findings at all.
ALLOWED: set[Finding] = set()


# ------------------------------------------------------------ inside the jitted step


def step_of(tx, grad_fn):
    def step(params, state, batch, mask):
        clipped = grad_fn(
            params, batch, geometry=tx.geometry(state), is_padding_example=mask
        )
        updates, state = tx.update(clipped, state, params)
        return optax.apply_updates(params, updates), state

    return step


def mlp_step(method="dp_adam_ilg", engine="auto", **options):
    chosen = {k: v for k, v in options.items() if k == "clip_mode"}
    row = BASELINES[method]
    spends = row.spends_scores(**chosen)
    falling = {"schedule": dp_ilg.schedules.linear(0.5)}
    metrics = options.get("metrics")
    tx = row(
        1e-2,
        plan(
            score_budget=0.01 if spends else 0.0,
            metric_budget=0.01 if metrics else 0.0,
            **(falling if method == "dp_sgd_decay" else {}),
        ),
        key=jax.random.key(0),
        metrics=metrics,
        **chosen,
    )
    grad_fn = dp_ilg.clipped_grad(
        mlp_loss,
        metrics=metrics,
        l2_clip_norm=1.0,
        clip_mode=row.clip_mode(**chosen),
        engine=engine,
        microbatch_size=options.get("microbatch_size"),
    )
    params = mlp_params()
    return step_of(tx, grad_fn), (params, tx.init(params))


CASES = [
    *[pytest.param({"method": name}, id=name) for name in sorted(BASELINES)],
    *[
        pytest.param({"engine": e, "microbatch_size": 5}, id=f"{e}, micro-batches")
        for e in sorted(ENGINES)
    ],
    *[pytest.param({"clip_mode": mode}, id=mode) for mode in CLIP_MODES],
    pytest.param({"metrics": METRICS}, id="metrics"),
]


@pytest.mark.parametrize("case", CASES)
def test_no_branch_loop_log_or_exception_of_a_step_depends_on_data(case):
    step, public = mlp_step(**case)
    private = (mlp_batch(), jnp.zeros(12, bool))
    assert set(findings(step, public, private)) <= ALLOWED


MODELS = {
    "mlp": (Facts(np.zeros((4, 4, 1), np.float32), 3), {"hidden": (4,)}),
    "cnn": (
        Facts(np.zeros((24, 24, 1), np.float32), 3),
        {"hidden": (4,), "channels": (2, 2)},
    ),
    "embedding": (Facts(np.zeros(5, np.uint16), 2, num_tokens=9), {"embed_dim": 2}),
}


@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("name", MODELS)
def test_neither_do_the_models_of_the_bundled_runs(name, framework):
    facts, options = MODELS[name]
    model = build_model(name, facts, framework=framework, **options)
    tx = dp_ilg.dp_adam_ilg(1e-2, plan(), key=jax.random.key(0))
    grad_fn = dp_ilg.clipped_grad(model.loss_fn, l2_clip_norm=1.0)
    params = model.init(jax.random.key(0))
    shape, dtype = facts.x.shape, facts.x.dtype
    batch = jnp.zeros((6, *shape), dtype), jnp.zeros(6, jnp.int32)
    private = (batch, jnp.zeros(6, bool))
    step = step_of(tx, grad_fn)
    assert set(findings(step, (params, tx.init(params)), private)) <= ALLOWED


def leaky_branch(w, x):
    return lax.cond(x.sum() > 0, lambda: w, lambda: -w)


def leaky_loop(w, x):
    return lax.while_loop(lambda c: c[0].sum() < 9, lambda c: (c[0] + 1, c[1]), (x, w))


def leaky_late_loop(w, x):
    """The predicate becomes private only after the first round."""
    body = lambda c: (c[1].sum(), c[1] + x.sum())  # noqa: E731
    return lax.while_loop(lambda c: c[0] < 9, body, (w.sum(), w))


def leaky_log(w, x):
    jax.debug.print("{}", x)
    return w


def leaky_callback(w, x):
    kind = jax.ShapeDtypeStruct((), jnp.float32)
    return w * jax.pure_callback(lambda v: np.float32(0), kind, x)


def leaky_scan(w, x):
    return lax.scan(lambda c, row: (leaky_branch(c, row), None), w, x[None])


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (leaky_branch, "branch"),
        (leaky_loop, "loop"),
        (leaky_late_loop, "loop"),
        (leaky_log, "effect"),
        (leaky_callback, "effect"),
        (leaky_scan, "branch"),
        (lambda w, x: jax.jit(leaky_branch)(w, x), "branch"),
        (lambda w, x: jax.vmap(lambda r: leaky_loop(w, r))(x[None]), "loop"),
        (lambda w, x: jax.checkpoint(leaky_branch)(w, x), "branch"),
        (lambda w, x: jax.grad(lambda w: leaky_branch(w, x).sum())(w), "branch"),
    ],
)
def test_the_walk_finds_what_it_is_there_to_find(fn, kind):
    found = findings(fn, (jnp.ones(3),), (jnp.ones(3),))
    assert kind in {finding.kind for finding in found}


@pytest.mark.parametrize("fn", [leaky_branch, leaky_loop, leaky_late_loop, leaky_scan])
def test_public_values_may_steer(fn):
    assert not findings(lambda w, x: (fn(w, w), x), (jnp.ones(3),), (jnp.ones(3),))


def test_different_data_run_one_and_the_same_compiled_program():
    """Also for rows of NaN, none at all, and nothing but padding."""
    step, (params, state) = mlp_step()
    jitted: Any = jax.jit(step)
    (x, y), none = mlp_batch(), jnp.zeros(12, bool)
    batches = [
        ((x, y), none),
        ((x * 1e30, y), none),
        ((x * jnp.nan, y), none.at[3].set(True)),
        ((jnp.zeros_like(x), jnp.zeros_like(y)), ~none),
    ]
    texts = {jitted.lower(params, state, *b).as_text() for b in batches}
    assert len(texts) == 1
    for batch in batches:
        found, _ = jitted(params, state, *batch)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert jitted._cache_size() == 1


# --------------------------------------------------------------- size of a draw


def overflow(num_examples, sampling_prob, chunk_size):
    """Probability that a draw does not fit."""
    return float(scipy.stats.binom.sf(chunk_size, num_examples, sampling_prob))


PLANS = [(1437, 256, 200), (60_000, 256, 2000), (25_000, 1024, 300), (1000, 10, 1000)]


@pytest.mark.parametrize(("num_examples", "batch_size", "num_steps"), PLANS)
def test_every_step_has_one_size_but_with_negligible_probability(
    num_examples, batch_size, num_steps
):
    """A second chunk takes longer: it tells that the draw was large."""
    sampler = PoissonSampler(num_examples, batch_size / num_examples, key=0)
    one = overflow(num_examples, batch_size / num_examples, sampler.chunk_size)
    assert num_steps * one < 1e-3
    sizes = {tuple(c.indices.shape for c in sampler.chunks(t)) for t in range(300)}
    assert sizes == {((sampler.chunk_size,),)}
    drawn = {len(sampler.indices(t)) for t in range(300)}
    assert len(drawn) > 10  # the draws themselves do vary


@pytest.mark.parametrize(
    "path", sorted(Path("configs").glob("*.toml")), ids=lambda p: p.stem
)
def test_so_have_the_bundled_configurations(path):
    privacy = read_config(path).privacy
    mean = privacy.batch_size  # a Poisson law: the worst case over the size of data
    size = math.ceil(mean + 6 * math.sqrt(mean))
    assert privacy.num_steps * scipy.stats.poisson.sf(size, mean) < 1e-4


# ------------------------------------------------------------------- the run folder

CANARY, LABEL = 0.73104287, 7
VALUES = [0.90210345, 0.11873401, 0.55501234]
PATTERN = np.array(VALUES, np.float32)


def canaries():
    """The bytes and words in which a value could be lying about."""
    found = []
    for value in (CANARY, *VALUES):
        single = np.float32(value)
        for packed in (struct.pack("<f", single), struct.pack(">f", single)):
            found.append(packed)
        found += [struct.pack("<d", float(single)), struct.pack("<d", value)]
        found.append(np.float64(value / 16).tobytes())
        found += [f"{value:.6f}"[:7].encode(), f"{float(single)!r}"[:8].encode()]
    return found + [PATTERN.tobytes()]


def traces(folder):
    """Files of a folder that hold a canary, packed ones unpacked."""
    found = set()
    for path in sorted(folder.rglob("*")):
        contents = [path.read_bytes()] if path.is_file() else []
        if path.name == "checkpoints":
            _, leaves, facts = read_checkpoint(path)
            contents += [leaf.tobytes() for leaf in leaves.values()]
            contents += [np.float64(x).tobytes() for x in leaves.values() if x.size]
            contents.append(json.dumps(facts).encode())
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        for content in contents:
            if any(canary in content for canary in canaries()):
                found.add(path.name)
    return found


@pytest.fixture
def planted(monkeypatch):
    """Every training example is the canary, so that each batch holds it."""
    real = job.load_data

    def load(*args):
        data = real(*args)
        x_train, y_train = np.array(data.x_train), np.array(data.y_train)
        x_train[:] = CANARY
        x_train[:, 0, :3, 0] = PATTERN
        y_train[:] = LABEL
        return dataclasses.replace(data, x_train=x_train, y_train=y_train)

    monkeypatch.setattr(job, "load_data", load)
    monkeypatch.setattr(runner, "write_report", lambda path: path)


def test_no_file_of_a_run_holds_a_trace_of_an_example(planted, tmp_path):
    config = tiny(privacy__num_steps=6, run__eval_every=2)
    summary = run_training(config, tmp_path / "run")
    assert traces(tmp_path / "run") == set()
    assert not summary["unprotected_train_loss_shown"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    known = {"step", "epsilon", "test_accuracy", "seconds", "noise_multiplier"}
    assert all(set(json.loads(line)) == known | {"layers"} for line in lines)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    files = {"config.toml", "plan.json", "ledger.jsonl", "metrics.jsonl"}
    assert names == files | {"summary.json", "checkpoints"}


def test_the_search_finds_a_canary_wherever_it_lies(tmp_path):
    row = np.full((2, 9), CANARY, np.float32)
    places = {
        "raw.bin": row.tobytes(),
        "double.bin": row.astype(np.float64).tobytes(),
        "text.json": json.dumps({"loss": CANARY}).encode(),
        "row.bin": b"head" + PATTERN.tobytes() + b"tail",
    }
    for name, content in places.items():
        (tmp_path / name).write_bytes(content)
    np.savez_compressed(tmp_path / "packed.npz", row=row)
    save_checkpoint(tmp_path / "checkpoints", 1, {"row": jnp.asarray(row)}, {})
    assert traces(tmp_path) >= {*places, "packed.npz", "checkpoints"}


def test_the_training_loss_lies_there_only_if_asked_for_and_named_so(planted, tmp_path):
    config = tiny(
        privacy__num_steps=2, run__eval_every=1, run__unprotected_train_loss=True
    )
    run_training(config, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    shown = [name for line in lines for name in json.loads(line) if "loss" in name]
    assert shown == ["unprotected_train_loss"] * 2


def test_nothing_of_the_data_decides_the_shape_of_a_model(tmp_path):
    """Classes and tokens are constants of the data set, not the largest one drawn."""
    pixels, words = np.zeros((4, 28, 28), np.uint8), np.zeros((4, 9), np.uint16)
    for name, x in (("mnist", pixels), ("imdb", words)):
        y, path = np.zeros(4, np.uint8), tmp_path / f"{name}.npz"
        np.savez(path, x_train=x, x_test=x, y_train=y, y_test=y)
    mnist, imdb = (load_dataset(name, tmp_path) for name in ("mnist", "imdb"))
    assert (mnist.num_classes, imdb.num_classes, imdb.num_tokens) == (10, 2, 10_000)
