"""Feeds: the same batches with a thread or without, in bounded memory, no leaks."""

import threading
import time

import jax
import numpy as np
import pytest

from dp_ilg.sampling.gather import take
from dp_ilg.sampling.poisson import PoissonSampler
from dp_ilg.training.feeds import Feed, FeedError, StepChunks
from dp_ilg.training.memory_limits import OutOfMemory, memory_advice

N, STEPS = 40, 6
X = np.arange(N * 3, dtype=np.float32).reshape(N, 3)
Y = np.arange(N, dtype=np.int32)


def sampler(chunk_size=None, steps=STEPS):
    return PoissonSampler(N, 0.3, key=7, num_steps=steps, chunk_size=chunk_size)


def batches(feed, first=0):
    """Every chunk of every step, as NumPy arrays."""
    return [
        [jax.tree.map(np.asarray, chunk) for chunk in feed.chunks(step)]
        for step in range(first, STEPS)
    ]


def equal(one, other):
    flat, rest = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(flat) == len(rest) and all(map(np.array_equal, flat, rest))


class Counting:
    def __init__(self):
        self.reads, self.threads = 0, set()

    def __len__(self):
        return N

    def rows(self, indices):
        self.reads += 1
        self.threads.add(threading.current_thread())
        return take((X, Y), indices)


@pytest.mark.parametrize("ahead", [0, 1, 3])
@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("first", [0, 4])
def test_a_thread_changes_no_batch_and_a_resumed_feed_repeats_them(
    ahead, chunk_size, first
):
    draws = sampler(chunk_size)
    expected = [
        [(take((X, Y), c.indices), c.is_padding_example) for c in draws.chunks(step)]
        for step in range(first, STEPS)
    ]
    with Feed((X, Y), draws, first=first, ahead=ahead) as feed:
        assert equal(batches(feed, first), expected)
    assert feed.waited > 0


def test_the_thread_reads_ahead_no_further_than_told():
    source = Counting()
    with Feed(source, sampler(4), ahead=2) as feed:
        deadline = time.monotonic() + 10
        while source.reads < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert source.reads == 3  # two that wait and the one in hand
        assert threading.current_thread() not in source.threads
        feed.chunks(0)
    assert not any(thread.is_alive() for thread in source.threads)


def test_a_step_of_many_chunks_holds_one_of_them():
    made = []

    def chunks():
        for value in range(5):
            made.append(value)
            yield value

    step = StepChunks(5, chunks())
    assert len(step) == 5 and step[0] == 0 and made == [0]
    seen = []
    for value in step:
        seen.append(value)
        assert made == seen
    for again in (lambda: step[0], lambda: list(step)):  # not an empty list
        with pytest.raises(FeedError, match="make a list of them to read it twice"):
            again()
    with pytest.raises(IndexError):
        step[5]


class Broken(Counting):
    def rows(self, indices):
        if self.reads == 2:
            raise ValueError(f"row {indices[0]} holds the secret 4711")
        return super().rows(indices)


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_error_of_the_loader_ends_the_run_and_names_no_row(ahead):
    with Feed(Broken(), sampler(), ahead=ahead) as feed:
        for step in range(2):
            feed.chunks(step)
        with pytest.raises(FeedError, match="step 2 could not be read") as caught:
            feed.chunks(2)
    told = str(caught.value)
    assert "4711" not in told and "(ValueError)" in told
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    drawn = sampler().indices(2)[0]
    assert f"row {drawn}" not in told


class Full(Counting):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def rows(self, indices):
        raise self.error


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 4711 rows"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 4711 bytes"),
    ],
    ids=["python", "xla"],
)
def test_rows_that_do_not_fit_into_memory_reach_the_advice(error, ahead):
    with Feed(Full(error), sampler(), ahead=ahead) as feed:
        with pytest.raises(OutOfMemory, match="--run.chunk-size") as caught:
            with memory_advice(lambda: 8):
                feed.chunks(0)
    found = caught.value.__cause__
    assert isinstance(found, MemoryError) and "4711" not in str(found)
    assert found.__cause__ is None and found.__context__ is None


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("steps", [[1], [0, 2], [0, 0]])
def test_steps_come_in_order(ahead, steps):
    *before, wrong = steps
    with Feed(X, sampler(), ahead=ahead) as feed:
        for step in before:
            feed.chunks(step)
        with pytest.raises(FeedError, match="in order"):
            feed.chunks(wrong)


def test_no_batch_is_mistaken_for_another_if_chunks_are_left_behind():
    with Feed(X, sampler(2), ahead=1) as feed:
        feed.chunks(0)
        with pytest.raises(FeedError, match="in order"):
            feed.chunks(1)


@pytest.mark.parametrize("ahead", [0, 2])
def test_there_is_nothing_past_the_plan(ahead):
    with Feed(X, sampler(steps=1), ahead=ahead) as feed:
        feed.chunks(0)
        with pytest.raises(FeedError):
            feed.chunks(1)


def test_a_feed_that_is_left_in_the_middle_ends_its_thread():
    source = Counting()
    with pytest.raises(KeyboardInterrupt):
        with Feed(source, sampler(), ahead=1) as feed:
            feed.chunks(0)
            raise KeyboardInterrupt
    assert not any(thread.is_alive() for thread in source.threads)


def test_batches_are_on_the_device_before_the_step_asks():
    with Feed((X, Y), sampler()) as feed:
        (rows, labels), mask = feed.chunks(0)[0]
    assert all(isinstance(a, jax.Array) for a in (rows, labels, mask))
    with jax.transfer_guard("disallow"):
        jax.jit(lambda a, b: (a[0].sum(), b.sum()))((rows, labels), mask)
