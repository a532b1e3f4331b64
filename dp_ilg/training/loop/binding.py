"""A run bound to its data: the compiled step, the sampler, and keys for just these."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dp_ilg.noise.exact import ExactNoise
from dp_ilg.sampling.gather import PADDING
from dp_ilg.sampling.poisson import PoissonSampler
from dp_ilg.training.loop.losses import KeyedLoss
from dp_ilg.training.loop.program import Program, build_program
from dp_ilg.training.loop.recipe import Recipe
from dp_ilg.training.loop.rows import Rows
from dp_ilg.training.loop.state import Counted, PrivateState
from dp_ilg.training.mesh_rows import OwnRows, place_rows
from dp_ilg.training.run_secret import RunSecret


class Binding(NamedTuple):
    """What a run needs for its data.

    Attributes:
        program: the compiled step.
        digest: of program, plan and data together: as private as the data.
        data: digest of the data.
        sampler: draws the batches.
        rows: reads them.
        place: puts a batch where the step wants it.
        noise_words: what the keys of the noise are bound by.
        draws: a step -> its noise, where the host draws it; else None.
    """

    program: Program
    digest: str
    data: str
    sampler: PoissonSampler
    rows: Rows
    place: Callable[[Any], Any]
    noise_words: np.ndarray
    draws: Callable[[int], Any] | None


def bind(
    recipe: Recipe, tx: Any, loss: KeyedLoss, state: PrivateState, secret: RunSecret
) -> Callable[[Any], Binding]:
    """Binds a run to data: returns the function that takes them.

    Args:
        recipe: of the run.
        tx: its optimizer.
        loss: of parameters, example and key.
        state: where it stands; only shapes are read.
        secret: of the run.

    Returns:
        Data -> the `Binding`. Its keys follow the secret, the program, the plan and
        the data: another learning rate has other batches and other noise.
    """

    def bound(data: Any) -> Binding:
        _check_processes(jax.process_count())
        rows = Rows(data)
        check_length(rows, recipe.plan.num_examples)
        place = jax.device_put
        if recipe.mesh is not None:
            place = functools.partial(place_rows, recipe.mesh)
        if recipe.random:
            rows.words = np.zeros(2, np.uint32)  # the real ones follow from the program
        empty = np.full(_sampler(recipe, 0).chunk_size, PADDING)
        chunk = place((rows.rows_at(0, empty), empty == PADDING))
        before = state.params, Counted(state.opt_state, state.step)
        program = build_program(recipe, tx, loss, before, chunk)
        of_data = rows.digest()
        whole = _joined(program.digest, of_data, recipe.plan.digest())
        if recipe.random:
            rows.words = secret.words("examples", program=whole)
        return Binding(
            program,
            whole,
            of_data,
            _sampler(recipe, secret.key("sampler", program=whole)),
            rows,
            place,
            secret.words("noise", program=whole),
            _draws(recipe, tx, state, secret, whole),
        )

    return bound


def bound_keys(opt_state: Any, words: np.ndarray) -> Any:
    """An optimizer's state whose keys are bound to a program and its data.

    Args:
        opt_state: before the first step.
        words: two words that follow from secret, program, plan and data.

    Returns:
        The state; every typed key k in it is ``fold_in`` of k and the two words.

    Example:
        >>> found = bound_keys({"key": jax.random.key(0), "step": 0}, np.array([1, 2]))
        >>> by_hand = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 2)
        >>> bool((found["key"] == by_hand).all()), found["step"]
        (True, 0)
    """

    def bound(leaf: Any) -> Any:
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
            return leaf
        for word in words.tolist():
            leaf = jax.random.fold_in(leaf, word)
        return leaf

    return jax.tree.map(bound, opt_state)


def check_length(rows: Rows, wanted: int) -> None:
    """Raises unless the data have the plan's number of examples."""
    if len(rows) != wanted:
        raise ValueError(
            f"The data hold {len(rows):,} examples, but the plan is for {wanted:,}, "
            "and sampling and noise follow that number; make the plan with "
            f"num_examples={len(rows)}, or pass the data it was made for."
        )


def check_unchanged(before: tuple[str, str] | None, now: tuple[str, str]) -> None:
    """Raises if a run goes on with another program, or with other data.

    Args:
        before: digests of program and data that it was begun with, None if it was not.
        now: those it has now.

    Raises:
        ValueError: if they differ.

    Example:
        >>> check_unchanged(("a", "b"), ("a", "c"))
        Traceback (most recent call last):
        ValueError: The data are not those this run was begun with, and the same ...
    """
    if before is None or before == now:
        return
    what = "data are" if before[0] == now[0] else "loss, optimizer or code are"
    raise ValueError(
        f"The {what} not those this run was begun with, and the same noise on other "
        "sums would show their difference; go on with the same, or begin a new run."
    )


def _sampler(recipe: Recipe, key: Any) -> PoissonSampler:
    found = PoissonSampler.for_plan(recipe.plan, key=key, chunk_size=recipe.chunk_size)
    if recipe.mesh is None:
        return found
    return OwnRows(found, 0, 1, devices=recipe.mesh.size)


def _check_processes(count: int) -> None:
    if count > 1:
        raise ValueError(
            f"private_training runs in one process, but there are {count}; use "
            "dp-ilg train, or make_train_step with dp_ilg.training.mesh_rows."
        )


def _joined(*digests: str) -> str:
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _draws(
    recipe: Recipe, tx: Any, state: PrivateState, secret: RunSecret, whole: str
) -> Callable[[int], Any] | None:
    if not recipe.exact:
        return None
    source = ExactNoise(secret=secret.bytes("exact noise", program=whole))
    shapes = jax.eval_shape(lambda params: params, state.params)
    geometry = tx.geometry(state.opt_state)
    geometry = jax.tree.map(np.asarray, geometry)  # the state's own is given away
    return lambda step: source.draws(step, shapes, geometry)
