"""Feeds: the chunks of a step, gathered while the step before them runs.

Which examples a step has is a function of (key, step), so they can be fetched before
their step begins, by a thread, and a run with the thread, without it or resumed in the
middle sees the same batches to the bit. At most `ahead` chunks wait at any time, which
bounds memory whatever the batch size.
"""

import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from dp_ilg import validation
from dp_ilg.sampling.gather import take
from dp_ilg.sampling.poisson import Chunk, PoissonSampler
from dp_ilg.training.memory_limits import ran_out

Batch = tuple[Any, Any]  # (examples, is_padding_example)
_POLL_SECONDS = 0.1  # how long a thread whose reader is gone takes to notice


class FeedError(ValueError):
    """The rows of a step could not be read.

    Privacy:
        Which examples a step draws is secret, and an error of a loader may name them or
        quote their content. It is dropped: step and kind of error are all that is told.

    Example:
        >>> issubclass(FeedError, ValueError)
        True
    """


class StepChunks(Sequence):
    """The chunks of one step: `len` is known at once, rows come as they are asked for.

    They are handed out in order and only the last one is kept, so a step of many
    chunks takes the memory of one. Going through several a second time is refused.

    Example:
        >>> chunks = StepChunks(2, iter(["one", "two"]))
        >>> len(chunks), chunks[0], list(chunks)
        (2, 'one', ['one', 'two'])
    """

    def __init__(self, count: int, chunks: Iterator[Any]):
        """Takes the number of chunks and where they come from."""
        self._count, self._left = count, chunks
        self._at, self._chunk = -1, None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int) or not 0 <= index < self._count:
            raise IndexError(f"Chunk {index} of {self._count} is not there.")
        if index < self._at:  # an IndexError would end a loop without a word
            raise FeedError(
                f"Chunk {index} of {self._count} was read and is gone, since the "
                "chunks of a step are read once; make a list of them to read it twice."
            )
        while self._at < index:
            self._at, self._chunk = self._at + 1, next(self._left)
        return self._chunk


class Feed:
    """Hands the trainer the chunks of steps `first`, `first` + 1 and so on.

    Use it as a context manager: leaving it ends the thread.

    Attributes:
        waited: seconds the reader has spent waiting for rows so far.

    Privacy:
        Rows are fetched for steps that may never be taken; nothing of them leaves but
        through `chunks`. When rows come from a disk or a network, whoever watches that
        sees which are read.

    Example:
        >>> import numpy as np
        >>> sampler = PoissonSampler(6, 0.5, key=0, num_steps=4)
        >>> with Feed(np.arange(6.0), sampler, ahead=2) as feed:
        ...     for step in range(4):
        ...         for rows, is_padding in feed.chunks(step):
        ...             assert rows.shape == is_padding.shape
    """

    def __init__(
        self,
        source: Any,
        sampler: PoissonSampler,
        *,
        first: int = 0,
        ahead: int = 2,
        place: Callable[[Batch], Batch] = jax.device_put,
    ):
        """Starts the thread, unless `ahead` is 0.

        Args:
            source: what `dp_ilg.sampling.gather.take` reads, or an object with
                ``rows(indices)`` (`dp_ilg.training.sources.Source`), or with
                ``rows_at(step, indices)`` where rows depend on the step too.
            sampler: says which rows a step has; it needs a number of steps.
            first: the step to begin with.
            ahead: chunks that may wait; 0 fetches when asked, without a thread.
            place: puts a batch where the step wants it, in the thread.
        """
        validation.whole("ahead", ahead, 0)
        self.waited = 0.0
        fetch = _Fetch(source, sampler, place)
        steps = range(first, sampler.num_steps or 0)
        self._items = (item for step in steps for item in fetch(step))
        self._over = threading.Event()
        self._thread = None
        if ahead:
            items, self._ready = self._items, queue.Queue(ahead)
            self._items = iter(self._ready.get, None)
            self._thread = threading.Thread(
                target=self._work, args=(items,), daemon=True
            )
            self._thread.start()

    def chunks(self, step: int) -> StepChunks:
        """The chunks of one step; the first has been read when this returns.

        Args:
            step: `first`, then one after the other.

        Returns:
            (examples, is_padding_example) of every chunk.

        Raises:
            FeedError: if rows could not be read, or a step is asked for out of turn.
            MemoryError: if they do not fit into memory.

        Example:
            >>> sampler = PoissonSampler(3, 1.0, key=0, num_steps=1)
            >>> with Feed([1.0, 2.0, 3.0], sampler) as feed:
            ...     feed.chunks(0)[0][0].tolist()
            [1.0, 2.0, 3.0]
        """
        count, chunk = self._next(step, 0)
        rest = (self._next(step, place)[1] for place in range(1, count))
        return StepChunks(count, itertools.chain([chunk], rest))

    def close(self) -> None:
        """Ends the thread; closing twice is harmless."""
        self._over.set()
        if self._thread is not None:
            self._thread.join(10.0)  # a loader that hangs must not hold the process

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()

    def _next(self, step: int, place: int) -> tuple[int, Batch]:
        """Returns how many chunks the step has, and this one of them."""
        began = time.perf_counter()
        item = next(self._items, None)
        self.waited += time.perf_counter() - began
        if isinstance(item, FeedError | MemoryError):
            raise item
        if item is None or item[0] != (step, place):
            raise FeedError(
                f"Chunk {place} of step {step} is not next; ask for every chunk of "
                "every step, in order."
            )
        return item[1:]

    def _work(self, items: Iterator[Any]) -> None:
        """Fills the queue until the reader is gone; None is the last item."""
        for item in itertools.chain(items, [None]):
            while not self._over.is_set():
                try:
                    self._ready.put(item, timeout=_POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if self._over.is_set():
                return


class _Fetch(NamedTuple):
    """Reads a step: (step, place), number of chunks, chunk; or an error and no more.

    Nothing of what went wrong is kept but its kind.
    """

    source: Any
    sampler: PoissonSampler
    place: Callable[[Batch], Batch]

    def __call__(self, step: int) -> Iterator[Any]:
        try:
            chunks = self.sampler.chunks(step)
            for place, chunk in enumerate(chunks):
                yield (step, place), len(chunks), self._read(step, chunk)
        except Exception as error:
            if ran_out(error):
                yield MemoryError(f"The rows of step {step} do not fit into memory.")
                return
            yield FeedError(
                f"The rows of step {step} could not be read ({type(error).__name__}); "
                "check the data as a whole, since which rows these were is secret."
            )

    def _read(self, step: int, chunk: Chunk) -> Batch:
        at_step = getattr(self.source, "rows_at", None)
        read = getattr(self.source, "rows", None)
        if at_step is not None:
            rows = at_step(step, chunk.indices)
        else:
            rows = read(chunk.indices) if read else take(self.source, chunk.indices)
        return self.place((rows, chunk.is_padding_example))
