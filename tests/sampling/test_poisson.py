"""The sampler's distribution, its freedom from state, its chunks, and `take`."""

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_ilg.sampling import poisson, words
from dp_ilg.sampling.gather import take
from dp_ilg.sampling.poisson import PoissonSampler

# Every statistical test below has this level: with a fresh key it would fail once in
# ten thousand runs. The keys are fixed, so it fails never or always.
LEVEL = 1e-4
N, Q, STEPS = 400, 0.1, 4000


# ---------------------------------------------------------------- distribution


def _inclusions(draw) -> np.ndarray:
    """Returns bool[steps, examples], who was drawn when."""
    table = np.zeros((STEPS, N), bool)
    for step in range(STEPS):
        table[step, draw(step)] = True
    return table


def _p_frequency(table):
    """Each example is drawn q T times; one degree of freedom an example."""
    counts = table.sum(axis=0)
    squares = (counts - STEPS * Q) ** 2 / (STEPS * Q * (1 - Q))
    return scipy.stats.chi2.sf(squares.sum(), N)


def _p_total(table):
    """The draws of all examples in all steps are q N T, up to their deviation."""
    total = scipy.stats.norm(N * STEPS * Q, np.sqrt(N * STEPS * Q * (1 - Q)))
    return 2 * min(total.cdf(table.sum()), total.sf(table.sum()))


def _p_pairs(table):
    """Products of two examples' centred inclusions have mean 0, over all pairs."""
    centred = (table - Q).astype(np.float32) / (Q * (1 - Q)) ** 0.5
    products = centred.T @ centred / STEPS**0.5
    upper = products[np.triu_indices(N, 1)]
    return scipy.stats.chi2.sf((upper.astype(np.float64) ** 2).sum(), len(upper))


def _p_steps(table):
    """So have products of an example's inclusions in steps 1 to 10 apart."""
    centred = (table - Q) / (Q * (1 - Q)) ** 0.5
    squares = [
        (centred[lag:] * centred[:-lag]).sum() ** 2 / centred[lag:].size
        for lag in range(1, 11)
    ]
    return scipy.stats.chi2.sf(sum(squares), len(squares))


def _p_sizes(table):
    """Batch sizes follow Binomial(N, q): chi-square over bins of at least 20 steps."""
    law = scipy.stats.binom(N, Q)
    edges = np.unique(law.ppf(np.linspace(0, 1, 31)[1:-1])).astype(int)
    expected = np.diff(np.concatenate([[0], law.cdf(edges), [1]])) * STEPS
    assert expected.min() > 20
    bins = np.searchsorted(edges, table.sum(axis=1))
    observed = np.bincount(bins, minlength=len(expected))
    return scipy.stats.chisquare(observed, expected).pvalue


CHECKS = {
    "frequency": _p_frequency,
    "total": _p_total,
    "pairs": _p_pairs,
    "steps": _p_steps,
    "sizes": _p_sizes,
}


def _fixed_size(step):
    rng = np.random.default_rng((1, step))
    return rng.choice(N, int(Q * N), replace=False)


def _shuffled(step):
    per_epoch = round(1 / Q)
    order = np.random.default_rng((2, step // per_epoch)).permutation(N)
    return np.split(order, per_epoch)[step % per_epoch]


def _wrong_rate(factor):
    return PoissonSampler(N, factor * Q, key=5).indices


def _favourites(step):
    """Twenty examples are drawn a fifth more often, twenty others a fifth less."""
    rng = np.random.default_rng((3, step))
    rates = Q * np.repeat([1.2, 0.8, 1], [20, 20, N - 40])
    return np.flatnonzero(rng.random(N) < rates)


def _twins(step):
    """Examples 0 and 1 always come together."""
    drawn = set(PoissonSampler(N, Q, key=6).indices(step)) - {1}
    return sorted(drawn | ({1} if 0 in drawn else set()))


# sampler -> (its draw, the checks that must reject it)
IMPOSTORS = {
    "fixed size": (_fixed_size, {"sizes"}),
    "shuffled epochs": (_shuffled, {"sizes", "steps"}),
    "3 % too often": (_wrong_rate(1.03), {"total", "sizes"}),
    "3 % too rarely": (_wrong_rate(0.97), {"total", "sizes"}),
    "some favoured": (_favourites, {"frequency"}),
    "two together": (_twins, {"pairs"}),
    "same batch twice": (
        lambda step: PoissonSampler(N, Q, key=7).indices(step // 2),
        {"steps"},
    ),
}


@pytest.fixture(scope="module", params=[0, "jax key"])
def table(request):
    key = jax.random.key(20) if request.param else 11
    return _inclusions(PoissonSampler(N, Q, key=key).indices)


@pytest.mark.parametrize("check", CHECKS)
def test_draws_are_poisson(table, check):
    assert CHECKS[check](table) > LEVEL


@pytest.mark.parametrize("name", IMPOSTORS)
def test_checks_reject_what_is_not_poisson(name):
    draw, must_reject = IMPOSTORS[name]
    table = _inclusions(draw)
    rejected = {check for check, p in CHECKS.items() if p(table) < LEVEL}
    assert must_reject <= rejected


@pytest.mark.slow
def test_p_values_over_many_keys_are_uniform():
    """64 keys: the p-values of each check are uniform (Kolmogorov-Smirnov, 1e-4)."""
    tables = (_inclusions(PoissonSampler(N, Q, key=k).indices) for k in range(64))
    rows = [[check(table) for check in CHECKS.values()] for table in tables]
    for column in np.transpose(rows):
        assert scipy.stats.kstest(column, "uniform").pvalue > LEVEL


def test_rate_is_exact_to_the_last_bit():
    """An example is drawn for exactly the words below q * 2**64."""
    given_words = np.array([0, 2**62 - 1, 2**62, 2**64 - 1], np.uint64)
    sampler = PoissonSampler(4, 0.25, key=0)
    assert sampler._draw(lambda count: given_words[:count], 0.25).tolist() == [0, 1]


# ------------------------------------------------------------ keyed by step: no state


def test_law_3_keyed_by_step():
    """Step 7 is the same first, last, twice and in another process's sampler."""
    first = PoissonSampler(N, Q, key=jax.random.key(3)).indices(7)
    other = PoissonSampler(N, Q, key=jax.random.key(3))
    for step in (100, 3, 7, 0):
        other.indices(step)
    assert np.array_equal(first, other.indices(7))
    assert np.array_equal(first, other.indices(7))
    assert not np.array_equal(first, other.indices(8))


def test_drawing_changes_nothing_in_the_sampler_or_in_numpy():
    sampler = PoissonSampler(N, Q, key=3)
    before, global_before = (
        dict(vars(sampler)),
        np.random.get_state(legacy=False)["state"]["key"],
    )
    sampler.chunks(5)
    assert vars(sampler) == before
    assert np.array_equal(
        np.random.get_state(legacy=False)["state"]["key"], global_before
    )


def test_draws_are_pinned_so_that_a_newer_version_can_resume():
    assert PoissonSampler(30, 0.2, key=0).indices(3).tolist() == [9, 15, 16, 17, 22, 28]
    key = jax.random.key(0)
    assert PoissonSampler(30, 0.2, key=key).indices(3).tolist() == [1, 10, 17, 19, 28]


def test_block_size_does_not_matter(monkeypatch):
    whole = PoissonSampler(N, Q, key=3).indices(1)
    monkeypatch.setattr(poisson, "_BLOCK", 7)
    assert np.array_equal(whole, PoissonSampler(N, Q, key=3).indices(1))


def test_raw_and_typed_keys_agree_and_unlike_keys_do_not():
    typed = PoissonSampler(N, Q, key=jax.random.key(3)).indices(0)
    raw = PoissonSampler(N, Q, key=jax.random.PRNGKey(3)).indices(0)
    assert np.array_equal(typed, raw)
    keys = [3, 30, 2**70, jax.random.key(4), jax.random.key(3, impl="rbg")]
    keys.append(jax.random.fold_in(jax.random.key(3), 0))
    draws = {PoissonSampler(N, Q, key=k).indices(0).tobytes() for k in keys}
    assert len(draws | {typed.tobytes()}) == len(keys) + 1


def test_bits_are_not_those_of_jax_or_of_a_plain_philox():
    """The same key's noise, and a plain generator's stream, are other numbers."""
    mine = words.bits(words.key_bytes(jax.random.key(3)), 0).random_raw(100)
    jaxs = np.asarray(jax.random.bits(jax.random.key(3), (200,), np.uint32))
    plain = np.random.Philox(key=[0, 3]).random_raw(100)
    assert not set(mine.view(np.uint32)) & set(jaxs)
    assert not set(mine) & set(plain)


def test_law_9_key_is_never_shown():
    seed = 123456789
    sampler = PoissonSampler(N, Q, key=seed, num_steps=3)
    with pytest.raises(ValueError) as caught:
        sampler.indices(3)
    for text in (repr(sampler), str(sampler), f"{sampler}", str(caught.value)):
        assert str(seed) not in text and f"{seed:x}" not in text
    with pytest.raises(ValueError) as caught:
        PoissonSampler(N, Q, key=-seed)
    assert str(seed) not in str(caught.value)


def test_law_9_key_is_required():
    with pytest.raises(TypeError):
        PoissonSampler(N, Q)  # pyright: ignore[reportCallIssue]


# ------------------------------------------------------------------- chunks


@settings(max_examples=150, deadline=None)
@given(
    num_examples=st.integers(1, 300),
    sampling_prob=st.floats(0, 1, exclude_min=True),
    step=st.integers(0, 2**40),
    chunk_size=st.none() | st.integers(1, 50),
    seed=st.integers(0, 2**80),
)
def test_law_8_whole_batch(num_examples, sampling_prob, step, chunk_size, seed):
    """Chunks joined are the draw, whatever their size; none is cut, none is lost."""
    sampler = PoissonSampler(
        num_examples, sampling_prob, key=seed, chunk_size=chunk_size
    )
    drawn = sampler.indices(step)
    assert drawn.dtype == np.int64
    assert (np.diff(drawn) > 0).all() and set(drawn) <= set(range(num_examples))
    chunks = sampler.chunks(step)
    assert len(chunks) == max(1, -(-len(drawn) // sampler.chunk_size))
    for chunk in chunks:
        assert chunk.indices.shape == (sampler.chunk_size,)
        assert chunk.indices.dtype == np.int64
        assert np.array_equal(chunk.is_padding_example, chunk.indices == -1)
    joined = np.concatenate([chunk.indices for chunk in chunks])
    assert np.array_equal(joined[: len(drawn)], drawn)
    assert (joined[len(drawn) :] == -1).all()


def test_law_5_empty_draw_is_a_step():
    sampler = PoissonSampler(10, 1e-12, key=0, chunk_size=4)
    assert sampler.indices(0).shape == (0,)
    (chunk,) = sampler.chunks(0)
    assert chunk.is_padding_example.all() and len(chunk.indices) == 4
    batch = take({"x": np.ones((10, 3)), "y": np.ones(10, int)}, chunk.indices)
    assert batch["x"].shape == (4, 3) and not batch["x"].any()


def test_usual_chunk_holds_six_deviations_and_never_more_than_the_data():
    sampler = PoissonSampler(60_000, 1024 / 60_000, key=0)
    assert sampler.chunk_size == np.ceil(1024 + 6 * np.sqrt(1024 * (1 - 1024 / 6e4)))
    assert all(len(sampler.chunks(step)) == 1 for step in range(50))
    assert PoissonSampler(5, 0.9, key=0).chunk_size == 5
    assert PoissonSampler(5, 1e-9, key=0).chunk_size == 1


class _Plan(NamedTuple):
    num_examples: int
    sampling_prob: float
    num_steps: int


def test_law_6_one_plan():
    sampler = PoissonSampler.for_plan(_Plan(50, 0.2, 3), key=1, chunk_size=7)
    twin = PoissonSampler(50, 0.2, key=1, num_steps=3, chunk_size=7)
    assert repr(sampler) == repr(twin)
    assert np.array_equal(sampler.indices(2), twin.indices(2))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("step", [3, 4, 10**9, -1, 1.0, None, True])
def test_law_7_never_past_the_plan(step):
    sampler = PoissonSampler(N, Q, key=0, num_steps=3)
    for method in (sampler.indices, sampler.chunks):
        with pytest.raises((ValueError, TypeError)):
            method(step)
    assert len(sampler.chunks(2)) == 1


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, np.nan, np.inf])
def test_bad_rate_is_refused(rate):
    with pytest.raises(ValueError, match="sampling_prob"):
        PoissonSampler(N, rate, key=0)


@pytest.mark.parametrize("field", ["num_examples", "num_steps", "chunk_size"])
@pytest.mark.parametrize("value", [0, -2])
def test_bad_counts_are_refused(field, value):
    counts: dict[str, Any] = {"num_examples": N, field: value}
    with pytest.raises(ValueError, match=field):
        PoissonSampler(**counts, sampling_prob=Q, key=0)


@pytest.mark.parametrize(
    "key", [None, "0", 0.0, True, np.zeros(2, np.uint32), jnp.zeros(2), -1]
)
def test_bad_keys_are_refused(key):
    with pytest.raises((TypeError, ValueError), match="key"):
        PoissonSampler(N, Q, key=key)


def test_many_keys_or_a_traced_key_are_refused():
    with pytest.raises(TypeError, match="key"):
        PoissonSampler(N, Q, key=jax.random.split(jax.random.key(0)))
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda key: PoissonSampler(N, Q, key=key).indices(0))(jax.random.key(0))


# --------------------------------------------------------------------- take


class _Examples:
    """A source of the Grain kind: len, and one example at an int."""

    def __init__(self, examples):
        self._examples = examples

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, index):
        assert type(index) is int
        return self._examples[index]


class _Columns(_Examples):
    """A source of the `datasets` kind: also many examples at a list of ints."""

    def __getitems__(self, indices):
        assert isinstance(indices, list)
        return [self[index] for index in indices]

    def __getitem__(self, index):
        return super().__getitem__(index)


class _Sorted:
    """An on-disk array of the HDF5 kind, which takes only ascending indices."""

    def __init__(self, array):
        self._array, self.shape, self.dtype = array, array.shape, array.dtype

    def __len__(self):
        return len(self._array)

    def __getitem__(self, indices):
        assert (np.diff(indices) > 0).all() and min(indices) >= 0
        return self._array[indices]


X = np.arange(24, dtype=np.float32).reshape(6, 2, 2)
Y = np.arange(6, dtype=np.int32) + 10
EXAMPLES = [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)]


def _memory_map(tmp_path):
    np.save(tmp_path / "x.npy", X)
    return {"x": np.load(tmp_path / "x.npy", mmap_mode="r"), "y": Y}


SOURCES = {
    "arrays": lambda _: {"x": X, "y": Y},
    "memory map": _memory_map,
    "jax": lambda _: {"x": jnp.asarray(X), "y": jnp.asarray(Y)},
    "sorted": lambda _: {"x": _Sorted(X), "y": _Sorted(Y)},
    "list": lambda _: EXAMPLES,
    "grain": lambda _: _Examples(EXAMPLES),
    "datasets": lambda _: _Columns(EXAMPLES),
    "columns of lists": lambda _: {"x": list(X), "y": list(Y)},
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("indices", [[1, 4, -1], [0], [-1, -1]])
def test_take_gives_the_same_batch_from_any_source(name, indices, tmp_path):
    batch = take(SOURCES[name](tmp_path), np.array(indices))
    drawn = np.array(indices) >= 0
    assert batch["x"].dtype == np.float32 and batch["y"].dtype == np.int32
    assert batch["x"].shape == (len(indices), 2, 2)
    assert np.array_equal(batch["x"][drawn], X[np.array(indices)[drawn]])
    assert np.array_equal(batch["y"][drawn], Y[np.array(indices)[drawn]])
    assert not batch["x"][~drawn].any() and not batch["y"][~drawn].any()


def test_take_keeps_the_structure():
    pair = collections.namedtuple("pair", "x y")
    batch = take(pair({"a": X}, (Y, Y)), [2])
    assert isinstance(batch, pair) and isinstance(batch.y, tuple)
    assert batch.x["a"].shape == (1, 2, 2)
    batch = take([pair(1.0, [1, 2]), pair(2.0, [3, 4])], [1, -1])
    assert isinstance(batch, pair) and batch.y.tolist() == [[3, 4], [0, 0]]


def test_take_does_not_hand_out_views_of_the_data():
    data = X.copy()
    take(data, [0, 1])[:] = -1
    assert np.array_equal(data, X)


def test_every_example_arrives_over_the_chunks_of_a_step():
    sampler = PoissonSampler(6, 1.0, key=0, chunk_size=4)
    rows = [take(Y, chunk.indices) for chunk in sampler.chunks(0)]
    assert np.concatenate(rows).tolist() == [*Y, 0, 0]


class _Frame:
    """What pandas looks like from here: an indexer by label."""

    iloc = shape = dtype = ()

    def __len__(self):
        return 3


@pytest.mark.parametrize(
    ("source", "indices", "words"),
    [
        (np.zeros((0, 3)), [-1], "no examples"),
        ([], [-1], "no examples"),
        ({}, [-1], "no examples"),
        ({"x": X, "y": Y[:5]}, [0], "5 and 6 examples"),
        (X, [6], "index 6 is outside a source of 6"),
        (X, [-2], "index -2"),
        ([[1, 2], [1]], [0, 1], "shapes"),
        (7, [0], "int"),
        (iter([1]), [0], "list_iterator"),
        (_Frame(), [0], "to_numpy"),
        (X, [0.5], "integers"),
        (X, [[0]], "integers"),
        (X, [True], "integers"),
    ],
)
def test_take_refuses_in_one_sentence(source, indices, words):
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        take(source, indices)
    assert str(caught.value).endswith(".") and ". " not in str(caught.value)


def test_take_from_grain_itself():
    grain = pytest.importorskip("grain", reason="grain is not installed")
    source = grain.MapDataset.source(EXAMPLES)
    assert take(source, [3, -1])["y"].tolist() == [13, 0]


def test_take_from_datasets_itself():
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    table = pytest.importorskip("pyarrow").table({"x": X.tolist(), "y": Y.tolist()})
    source = datasets.Dataset(table, fingerprint="of-a-test")
    batch = take(source, [3, -1])
    assert batch["y"].tolist() == [13, 0] and batch["x"].shape == (2, 2, 2)
