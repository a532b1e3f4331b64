"""Poisson batches: the examples of step t are a function of (key, t) alone.

The accountant charges a step as one Poisson-subsampled Gaussian. That is right only if
every example enters every batch with probability q, independently of all others and of
all other steps; shuffled epochs and batches of fixed size do not do this. A draw has no
fixed size, so it travels as chunks of one compiled size, with a mask for the padding.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, SupportsIndex
from weakref import WeakKeyDictionary

import numpy as np

from dp_ilg import validation
from dp_ilg.sampling import words
from dp_ilg.sampling.batch import Draw, SealedBatch
from dp_ilg.sampling.gather import PADDING
from dp_ilg.sampling.gather import take as take

_BLOCK = 1 << 20  # 64-bit words drawn at once, which bounds memory for any data size


_LAST: "WeakKeyDictionary[PoissonSampler, Draw]" = WeakKeyDictionary()
"""Each sampler's last draw with padding, which lives as long as the sampler."""


class _Fields(NamedTuple):
    indices: np.ndarray
    is_padding_example: np.ndarray


class Chunk(_Fields):
    """One fixed-size part of a step's batch: ``(indices, is_padding_example)``.

    Attributes:
        indices: int64[chunk_size], which examples; -1 for padding, always at the end.
            NumPy reads ``a[-1]`` as the last row, so that ``a[chunk.indices]`` holds
            an example nobody drew: take rows with `take`, or use the mask.
        is_padding_example: bool[chunk_size], true where `indices` is -1.

    Example:
        >>> chunk = Chunk(np.array([4, -1]), np.array([False, True]))
        >>> rows, is_padding = chunk
        >>> rows.tolist(), chunk.take(np.arange(5.0)).examples.tolist()
        ([4, -1], [4.0, 0.0])
    """

    draw: Draw | None = None

    @property
    def is_padding_example(self) -> np.ndarray:
        """The mask; whoever looks at it has not forgotten it."""
        return self[1]

    def __getitem__(self, index: Any) -> Any:
        """A field by its place."""
        if index != 0 and self.draw is not None:
            self.draw.read()
        return tuple.__getitem__(self, index)

    def __iter__(self) -> Iterator[Any]:
        """Both fields, as for ``rows, is_padding = chunk``."""
        if self.draw is not None:
            self.draw.read()
        return tuple.__iter__(self)

    def take(self, data: Any) -> SealedBatch:
        """Gathers the rows of the chunk, sealed with their mask.

        Args:
            data: what `dp_ilg.sampling.gather.take` reads: arrays, a dict or tuple of
                them, or a list of examples.

        Returns:
            A `SealedBatch`, which `dp_ilg.clipped_grad` functions take whole. Rows of
            padding are zeros and do not count.

        Raises:
            ValueError: as `dp_ilg.sampling.gather.take`.
            TypeError: likewise.

        Privacy: these are the rows of the plan's Poisson sample, and none twice.

        Example:
            >>> everybody = PoissonSampler(2, 1.0, key=0, chunk_size=3)
            >>> (chunk,) = everybody.chunks(0)
            >>> examples, is_padding = chunk.take(np.array([5.0, 6.0]))
            >>> examples.tolist(), is_padding.tolist()
            ([5.0, 6.0, 0.0], [False, False, True])
        """
        rows, mask = self
        return SealedBatch(take(data, rows), mask, len(mask))


class PoissonSampler:
    """Draws the batch of any step, in any order, without state.

    A run that stops and resumes must repeat the batch of a step whose noise may have
    been released already (law: keyed by step), so nothing here remembers earlier draws:
    `indices(7)` is the same whether asked for first, last or twice. Example i is drawn
    when word i of NumPy's Philox, keyed by a BLAKE2b digest of key and step, is below
    q * 2**64.

    Attributes:
        num_examples: N, the number of examples in the data.
        sampling_prob: q, the probability of each example in each step.
        num_steps: the number of steps of the plan, or None for no end.
        chunk_size: rows of every chunk.
        max_batch_size: a larger draw is cut to as many examples; None cuts none.
        parts: b; with more than one, each example belongs to one of b parts and step t
            draws from part t mod b, with probability b q (cyclic Poisson sampling).

    Privacy:
        The sampling that a Poisson event of `dp_accounting` describes, under either
        neighbouring relation. It assumes that the key stays secret and that Philox
        looks random; that generator was not built to resist a cryptanalyst. A step
        whose draw fits the default chunk, six deviations above the expected size, has
        the shape of every other; one that does not takes longer by a chunk, which who
        can time it may see (in 2,000 steps of 256 of 60,000: with probability 1e-5).
        With `max_batch_size` who is cut is chosen uniformly at random, which couples
        the examples: that is another event, with another cost
        (`dp_ilg.accounting.truncation`). Examples are dealt to parts by the key, each
        by itself, so that adding or removing one moves no other.

    Example:
        >>> import jax
        >>> sampler = PoissonSampler(1000, 0.01, key=jax.random.key(0), num_steps=50)
        >>> sampler
        PoissonSampler(1000, 0.01, key=<hidden>, num_steps=50, chunk_size=29)
        >>> chunks = sampler.chunks(7)
        >>> len(chunks), chunks[0].indices.shape
        (1, (29,))

    Reference:
        Abadi et al., Deep Learning with Differential Privacy, CCS 2016, section 3.1.
        Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011 (Philox).
    """

    _dealt: np.ndarray | None = None

    def __init__(
        self,
        num_examples: int,
        sampling_prob: float,
        *,
        key: Any,
        num_steps: int | None = None,
        chunk_size: int | None = None,
        max_batch_size: int | None = None,
        parts: int = 1,
    ):
        """Checks the facts and hides the key.

        Args:
            num_examples: N, at least 1.
            sampling_prob: q, above 0 and at most 1.
            key: a typed JAX key, a raw uint32[2] key, or an integer seed of at least 0.
            num_steps: refuse steps from here on; None for no end.
            chunk_size: rows of a chunk; by default q N plus six standard deviations,
                or `max_batch_size`.
            max_batch_size: cut larger draws to this size, at random; None never does.
            parts: b, of which ``b q`` must be at most 1; 1 for plain Poisson sampling.

        Raises:
            ValueError: for a number out of its range, a negative seed included.
            TypeError: for a key that is neither of the three kinds, or a traced one.
        """
        validation.whole("num_examples", num_examples)
        if sampling_prob != 1:
            validation.fraction("sampling_prob", sampling_prob)
        sizes = dict(num_steps=num_steps, chunk_size=chunk_size)
        for name, size in dict(sizes, max_batch_size=max_batch_size).items():
            if size is not None:
                validation.whole(name, size)
        self.max_batch_size = None if max_batch_size is None else int(max_batch_size)
        self.num_examples = int(num_examples)
        self.sampling_prob = float(sampling_prob)
        self.num_steps = None if num_steps is None else int(num_steps)
        self.chunk_size = int(chunk_size or self._usual_chunk_size())
        self._secret = words.key_bytes(key)
        self.parts = words.checked_parts(parts, self)

    @classmethod
    def for_plan(
        cls, plan: Any, *, key: Any, chunk_size: int | None = None
    ) -> "PoissonSampler":
        """Builds the sampler that the plan's accountant assumes (law: one plan).

        Args:
            plan: a `PrivacyPlan`, for its num_examples, sampling_prob, num_steps and,
                if it has them, max_batch_size and bands (as many parts).
            key: as for the constructor.
            chunk_size: as for the constructor.

        Returns:
            The sampler; it refuses steps past the plan.

        Example:
            >>> from types import SimpleNamespace
            >>> plan = SimpleNamespace(num_examples=90, sampling_prob=0.1, num_steps=5)
            >>> PoissonSampler.for_plan(plan, key=3).num_steps
            5
        """
        sizes = dict(num_steps=plan.num_steps, chunk_size=chunk_size)
        sizes["max_batch_size"] = getattr(plan, "max_batch_size", None)
        sizes["parts"] = getattr(plan, "bands", 1)
        return cls(plan.num_examples, plan.sampling_prob, key=key, **sizes)

    def __repr__(self) -> str:
        most = f", max_batch_size={self.max_batch_size}" if self.max_batch_size else ""
        most += f", parts={self.parts}" if self.parts > 1 else ""
        return (
            f"PoissonSampler({self.num_examples}, {self.sampling_prob}, key=<hidden>, "
            f"num_steps={self.num_steps}, chunk_size={self.chunk_size}{most})"
        )

    def indices(self, step: SupportsIndex) -> np.ndarray:
        """Returns the examples of one step.

        Args:
            step: which step, from 0.

        Returns:
            int64[drawn], ascending and distinct; empty when nobody was drawn, which is
            a step like any other.

        Raises:
            ValueError: for a step that is negative, no integer or past the last one.

        Example:
            >>> PoissonSampler(20, 0.2, key=0).indices(3).dtype
            dtype('int64')
            >>> PoissonSampler(20, 1.0, key=0, num_steps=4).indices(4)
            Traceback (most recent call last):
            ValueError: step is 4, but the sampler has 4 steps: stop at step 3.
        """
        step = validation.count("step", step)
        if self.num_steps is not None and step >= self.num_steps:
            raise ValueError(
                f"step is {step}, but the sampler has {self.num_steps} steps: "
                f"stop at step {self.num_steps - 1}."
            )
        bits = words.bits(self._secret, step)
        rate = min(1.0, self.parts * self.sampling_prob)
        everybody = np.arange(self.num_examples)
        drawn = everybody if rate == 1 else self._draw(bits.random_raw, rate)
        if self.parts > 1:
            return drawn[self.part_of(drawn) == step % self.parts]
        return self._cut(drawn, bits)

    def part_of(self, examples: np.ndarray) -> np.ndarray:
        """Returns the part that each example was dealt to.

        Args:
            examples: their numbers, from 0; integers of any shape.

        Returns:
            int64 of that shape, from 0 to ``parts - 1``.

        Example:
            >>> sampler = PoissonSampler(100, 0.1, key=0, parts=4)
            >>> drawn = sampler.indices(6)
            >>> set(sampler.part_of(drawn).tolist())
            {2}
        """
        if self._dealt is None:
            self._dealt = words.dealt(self._secret, self.num_examples, self.parts)
        return self._dealt[examples]

    def chunks(self, step: SupportsIndex) -> list[Chunk]:
        """Returns the examples of one step, cut into chunks of one size.

        A draw is never cut short for its chunks (law: whole batch): what does not fit
        goes into the next one. Sum the clipped gradients of all chunks, then add noise
        once.

        Args:
            step: which step, from 0.

        Returns:
            At least one chunk; all padding when nobody was drawn (law: expected size).

        Raises:
            ValueError: for a step that is negative, no integer or past the last one.

        Example:
            >>> everybody = PoissonSampler(5, 1.0, key=0, chunk_size=3)
            >>> [chunk.indices.tolist() for chunk in everybody.chunks(0)]
            [[0, 1, 2], [3, 4, -1]]
        """
        drawn = self.indices(step)
        count = max(1, math.ceil(len(drawn) / self.chunk_size))
        rows = np.full((count, self.chunk_size), PADDING, np.int64)
        rows.flat[: len(drawn)] = drawn
        chunks = [Chunk(row, row == PADDING) for row in rows]
        _LAST.pop(self, None)
        if rows[-1, -1] == PADDING:
            _LAST[self] = draw = Draw(self.chunk_size)
            for chunk in chunks:
                chunk.draw = draw
        return chunks

    def _usual_chunk_size(self) -> int:
        if self.max_batch_size is not None:
            return min(self.num_examples, self.max_batch_size)
        mean = self.num_examples * self.sampling_prob
        stddev = math.sqrt(mean * (1 - self.sampling_prob))
        return min(self.num_examples, math.ceil(mean + 6 * stddev))

    def _draw(
        self, random_words: Callable[[int], np.ndarray], rate: float
    ) -> np.ndarray:
        threshold = np.uint64(int(rate * 2.0**64))  # exact: a power of 2
        blocks = []
        for start in range(0, self.num_examples, _BLOCK):
            found = random_words(min(_BLOCK, self.num_examples - start))
            blocks.append(np.flatnonzero(found < threshold) + start)
        return np.concatenate(blocks).astype(np.int64)

    def _cut(self, drawn: np.ndarray, bits: np.random.Philox) -> np.ndarray:
        """Keeps those with the smallest of fresh words, one for each that was drawn."""
        most = self.max_batch_size
        if most is None or len(drawn) <= most:
            return drawn
        order = np.argsort(bits.random_raw(len(drawn)), kind="stable")
        return np.sort(drawn[order[:most]])
