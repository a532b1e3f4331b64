"""Keys of examples: of the key, the step and the row, and of nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dp_ilg.training.frameworks.keys import example_key, example_keys, row_words

ROWS = np.array([0, 1, 7, 2**32 - 1, 2**32, 2**32 + 7, 2**62, -1])


def words(keys):
    return np.asarray(jax.random.key_data(keys))


def test_a_loop_with_explicit_keys_has_the_same():
    key = jax.random.key(3)
    found = jax.jit(example_keys)(key, jnp.int32(5), row_words(ROWS))
    for row, got in zip(ROWS.tolist(), words(found), strict=True):
        high, low = (row % 2**64) >> 32, row % 2**32
        at_step = jax.random.fold_in(key, 5)
        own = jax.random.fold_in(jax.random.fold_in(at_step, high), low)
        np.testing.assert_array_equal(words(own), got)


def test_keys_differ_by_row_step_and_key_and_not_by_place():
    key = jax.random.key(3)
    cases = [(key, 0), (key, 1), (jax.random.key(4), 0)]
    found = [words(example_keys(k, t, row_words(ROWS))) for k, t in cases]
    assert len(np.unique(np.concatenate(found), axis=0)) == 3 * len(ROWS)
    order = np.random.default_rng(0).permutation(len(ROWS))
    moved = words(example_keys(key, 0, row_words(ROWS[order])))
    np.testing.assert_array_equal(moved, found[0][order])


def test_small_numbers_are_words_too():
    key = jax.random.key(0)
    for row in (7, jnp.int32(7), np.uint32(7)):
        assert example_key(key, 2, row) == example_key(key, 2, row_words([7])[0])
    np.testing.assert_array_equal(
        words(example_keys(key, 2, jnp.arange(3))),
        words(example_keys(key, 2, row_words(range(3)))),
    )
    with pytest.raises(TypeError, match="whole numbers"):
        row_words([0.5])
