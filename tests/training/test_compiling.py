"""Steps compiled ahead of time and kept, and nothing of a step on the host."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import dp_ilg
from dp_ilg.training.compiling import shapes_of, use_compile_cache
from dp_ilg.training.feeds import Feed
from dp_ilg.training.step import make_train_step

PLAN = dp_ilg.plan_privacy(
    noise_multiplier=1.0,
    delta=1e-5,
    num_examples=60,
    batch_size=12,
    num_steps=6,
    accountant="rdp",
)
X = np.random.default_rng(0).standard_normal((60, 3)).astype(np.float32)


def loss_fn(params, example):
    return jnp.square(jnp.tanh(params["w"] @ example) - 1).sum()


def tools():
    tx = dp_ilg.dp_adam_ilg(1e-2, PLAN, key=jax.random.key(0))
    grad_fn = dp_ilg.clipped_grad(loss_fn, l2_clip_norm=PLAN.l2_clip_norm)
    params = {"w": jnp.ones((2, 3))}
    return grad_fn, tx, params, tx.init(params)


def whole_step(grad_fn, tx):
    def step(params, state, batch, mask):
        geometry = tx.geometry(state)
        total = grad_fn(params, batch, geometry=geometry, is_padding_example=mask)
        updates, state = tx.update(total, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def test_a_step_compiled_from_shapes_takes_the_steps_of_the_trainer():
    grad_fn, tx, params, state = tools()
    sampler = dp_ilg.PoissonSampler.for_plan(PLAN, key=1)
    mask = jax.ShapeDtypeStruct((sampler.chunk_size,), bool)
    rows = shapes_of(X, rows=sampler.chunk_size)
    lowered = whole_step(grad_fn, tx).lower(
        shapes_of(params), shapes_of(state), rows, mask
    )
    call = lowered.compile()
    known_step = make_train_step(grad_fn, tx)
    known, known_state = jax.tree.map(jnp.copy, (params, state))
    with Feed(X, sampler) as feed:
        for t in range(PLAN.num_steps):
            batch, mask = feed.chunks(t)[0]
            params, state = call(params, state, batch, mask)
            known, known_state = known_step(known, known_state, [(batch, mask)])
    assert np.array_equal(params["w"], known["w"])


def test_nothing_of_a_step_goes_to_the_host_or_comes_from_it():
    grad_fn, tx, params, state = tools()
    step = make_train_step(grad_fn, tx)
    sampler = dp_ilg.PoissonSampler.for_plan(PLAN, key=1)
    with Feed(X, sampler) as feed:
        params, state = step(params, state, feed.chunks(0))  # compiles
        for t in range(1, 4):
            chunks = feed.chunks(t)
            with jax.transfer_guard("disallow"):
                params, state = step(params, state, chunks)


def test_the_guard_finds_a_row_that_the_step_would_have_to_fetch():
    doubled = jax.jit(lambda x: 2 * x)
    doubled(X)
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="[Dd]isallowed host-to-device"):
            doubled(X)


SECOND = """
import sys
import jax, jax.numpy as jnp
from dp_ilg.training import compiling
compiling._LEAST_SECONDS = 0.0
compiling.use_compile_cache(sys.argv[1])
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
f = jax.jit(lambda x: jnp.linalg.qr(jnp.sin(x) @ x)[0].sum())
f(jnp.ones((30, 30))).block_until_ready()
print(sum("cache_hits" in name for name in hits))
"""


def test_a_second_process_reads_what_the_first_compiled(tmp_path):
    folder = tmp_path / "programs"
    hits = []
    for _ in range(2):
        out = subprocess.run(
            [sys.executable, "-c", SECOND, str(folder)],
            capture_output=True,
            text=True,
            check=True,
        )
        hits.append(int(out.stdout))
    assert hits[0] == 0 and hits[1] > 0
    assert folder.stat().st_mode & 0o077 == 0


def test_no_folder_changes_nothing():
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore
    use_compile_cache(None)
    assert jax.config.jax_compilation_cache_dir == before  # pyright: ignore
