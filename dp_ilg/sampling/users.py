"""Batches of users: who owns which examples, and a few of each in a step.

A plan with ``unit="user"`` draws users as another draws examples. Of each user that was
drawn at most k examples are taken, chosen by the key; their mean gradient is clipped
once: a user moves the sum by the clip norm, with however many examples.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dp_ilg import validation
from dp_ilg.sampling import words
from dp_ilg.sampling.batch import SealedBatch
from dp_ilg.sampling.gather import PADDING, length, take
from dp_ilg.sampling.poisson import Chunk

_MISSING = ("", "nan", "none", "null", "<na>", "nat")
_FEW = b"few of a user"  # separates these words from those that draw users


class UserTable:
    """Which examples belong to which user.

    Attributes:
        num_users: how many there are: the plan's `num_examples`.
        num_examples: how many examples they have together.

    Privacy:
        Users that come and go change the numbers of the others, and not which of their
        examples are taken: that is drawn from words of the user's own place. Who has
        how many examples is private, and shapes say nothing of it.

    Example:
        >>> table = UserTable(["ann", "bob", "ann", "ann"])
        >>> table.num_users, table.examples_of(0).tolist()
        (2, [0, 2, 3])
    """

    def __init__(self, ids: Any):
        """Reads the owner of every example.

        Args:
            ids: one id an example, in the examples' order: all integers, or all words.

        Raises:
            ValueError: for no ids, more than one axis, mixed kinds, or ids that are
                missing (NaN, None, masked, empty words, or words that missing ones turn
                into, such as "nan").
        """
        found = _checked_ids(ids)
        _, owner = np.unique(found, return_inverse=True)
        self._order = np.argsort(owner, kind="stable")
        self._start = np.concatenate([[0], np.cumsum(np.bincount(owner))])
        self.num_examples = len(found)
        self.num_users = len(self._start) - 1

    def __repr__(self) -> str:
        return f"UserTable(num_users={self.num_users})"

    def examples_of(self, user: int) -> np.ndarray:
        """Returns the examples of one user.

        Args:
            user: its number, from 0, in the order of sorted ids.

        Returns:
            int64[examples], ascending.
        """
        return np.sort(self._order[self._start[user] : self._start[user + 1]])

    def check_plan(self, plan: Any, *, examples_asked: bool = False) -> None:
        """Raises unless a plan protects these users.

        Args:
            plan: a `dp_ilg.PrivacyPlan`.
            examples_asked: True to take a plan that protects single examples although
                users have several.

        Raises:
            ValueError: for a plan at the level of examples where a user has several,
                and for another number of users.
        """
        several = self.num_users < self.num_examples and not examples_asked
        if plan.unit != "user" and several:
            raise ValueError(
                f"The plan protects single examples, but {self.num_examples:,} "
                f"examples belong to {self.num_users:,} users, who are protected less; "
                f'plan with unit="user" and num_examples={self.num_users}, or pass '
                "examples_asked=True."
            )
        if plan.unit == "user" and plan.num_examples != self.num_users:
            raise ValueError(
                f"The plan is for {plan.num_examples:,} users, but the ids name "
                f"{self.num_users:,}; plan with num_examples={self.num_users}."
            )

    def rows(self, chunk: Any, *, per_user: int, step: int, key: Any) -> np.ndarray:
        """Returns which examples of each drawn user take part.

        Args:
            chunk: of a `dp_ilg.PoissonSampler` over users.
            per_user: k, the most of one user in a step.
            step: of the chunk.
            key: as of the sampler; a function of (key, step, user) chooses.

        Returns:
            int64[users, k]: examples, -1 where a user has fewer, or is padding.

        Raises:
            ValueError: for a k or step out of range.
        """
        validation.whole("per_user", per_user)
        step = validation.count("step", step)
        secret = words.key_bytes(key) + _FEW
        found = np.full((len(chunk.indices), int(per_user)), PADDING, np.int64)
        for row, user in zip(found, chunk.indices, strict=True):
            if user != PADDING:
                own = self.examples_of(int(user))
                bits = words.bits(secret + int(user).to_bytes(8, "little"), step)
                chosen = own[np.argsort(bits.random_raw(len(own)), kind="stable")]
                row[: min(per_user, len(own))] = chosen[:per_user]
        return found

    def views(self, data: Any, *, per_user: int, key: Any) -> UserViews:
        """Makes a data set of users, for ``private_training(...).batches``.

        Args:
            data: an example for each id, as for `take`.
            per_user: k; a user with more is represented by k of them, chosen by the
                key once for the whole run.
            key: of that choice alone; not the sampler's.

        Returns:
            An object with one pair ``(views, is_there)`` a user.

        Raises:
            ValueError: for data of another length than the ids.
        """
        self._check(data)
        return UserViews(self, data, per_user, key)

    def take(
        self, data: Any, chunk: Any, *, per_user: int, step: int, key: Any
    ) -> SealedBatch:
        """Gathers the examples of a chunk of users, sealed with its mask.

        Args:
            data: what `dp_ilg.sampling.gather.take` reads, an example for each id.
            chunk: as in `rows`.
            per_user: as in `rows`.
            step: as in `rows`.
            key: as in `rows`.

        Returns:
            A `SealedBatch` whose examples are pairs ``(views, is_there)``: the
            examples ``[users, k, ...]``, zeros where there is none, and bool
            ``[users, k]``. `mean_over_user` makes a loss of one user of them.

        Raises:
            ValueError: for data of another length than the ids, and as `rows`.

        Privacy: one row is one user: what is clipped is the whole row.

        Example:
            >>> from dp_ilg.sampling.poisson import PoissonSampler
            >>> table = UserTable([7, 7, 9])
            >>> (chunk,) = PoissonSampler(2, 1.0, key=0, chunk_size=2).chunks(0)
            >>> batch = table.take(np.arange(3.0), chunk, per_user=2, step=0, key=1)
            >>> (views, is_there), is_padding = batch
            >>> is_there.tolist()
            [[True, True], [True, False]]
        """
        self._check(data)
        rows = self.rows(chunk, per_user=per_user, step=step, key=key)
        flat = take(data, rows.ravel())
        views = _folded(flat, rows.shape)
        pair = views, rows != PADDING
        return SealedBatch(pair, chunk.is_padding_example, len(rows))

    def _check(self, data: Any) -> None:
        if length(data) != self.num_examples:
            raise ValueError(
                f"data holds {length(data):,} examples, but there are "
                f"{self.num_examples:,} ids; give one id an example."
            )


class UserViews:
    """A user's few examples by the user's number: what `UserTable.views` returns."""

    def __init__(self, table: UserTable, data: Any, per_user: int, key: Any):
        """Takes what the table was given."""
        self._table, self._data = table, data
        self._facts: dict[str, Any] = dict(per_user=per_user, step=0, key=key)

    def __len__(self) -> int:
        return self._table.num_users

    def __getitem__(self, user: int) -> Any:
        return self.__getitems__([user])[0]

    def __getitems__(self, users: list[int]) -> list[Any]:
        """The pairs of several users."""
        found = np.asarray(users, np.int64)
        chunk = Chunk(found, np.zeros(len(found), bool))
        (views, is_there), _ = self._table.take(self._data, chunk, **self._facts)
        pick = lambda i: jax.tree.map(lambda x: x[i], views)  # noqa: E731
        return [(pick(i), is_there[i]) for i in range(len(found))]


def mean_over_user(loss_fn: Any) -> Any:
    """The loss of one user: the mean over the examples that are there.

    Args:
        loss_fn: ``(params, example) -> scalar`` of one example.

    Returns:
        ``(params, (views, is_there)) -> scalar``, for `dp_ilg.clipped_grad`. A user
        without examples has the loss 0 and no gradient.

    Privacy: its gradient is the user's mean gradient, which is clipped once.

    Example:
        >>> import jax.numpy as jnp
        >>> loss = mean_over_user(lambda p, x: p * x)
        >>> views, there = jnp.array([2.0, 4.0, 0.0]), jnp.array([True, True, False])
        >>> float(loss(jnp.float32(1.0), (views, there)))
        3.0
    """

    def mean(params: Any, user: Any) -> Any:
        views, is_there = user
        one = jnp.argmax(
            is_there
        )  # stands for the absent, whose zeros may have no loss
        filled = lambda x: jnp.where(_like(is_there, x), x, x[one])  # noqa: E731
        views = jax.tree.map(filled, views)
        losses = jax.vmap(loss_fn, (None, 0))(params, views)
        kept = jnp.where(is_there, losses, 0)
        return jnp.sum(kept) / jnp.maximum(jnp.sum(is_there), 1)

    return mean


def _like(mask: Any, x: Any) -> Any:
    return jnp.reshape(mask, (-1, *[1] * (jnp.ndim(x) - 1)))


def _checked_ids(ids: Any) -> np.ndarray:
    """The ids, before NumPy makes words of what is missing."""
    missing = bool(np.ma.is_masked(ids))
    found = np.asarray(ids, object)
    if found.ndim != 1 or not found.size:
        raise ValueError(
            f"ids has the shape {found.shape}, but must hold one id an example."
        )
    kinds = {_kind(one) for one in found.tolist()}
    if missing or len(kinds) != 1 or "" in kinds:
        raise ValueError(
            "ids must be all integers or all words, none of them missing (NaN, None, "
            "empty or masked), but are not; give examples without a user one id each."
        )
    return np.array(found.tolist())


def _kind(one: Any) -> str:
    """Whether an id is a number or a word; empty for what stands for none."""
    if isinstance(one, bool):
        return ""
    if isinstance(one, int | np.integer):
        return "number"
    if isinstance(one, bytes):
        one = one.decode("latin-1")
    is_word = isinstance(one, str) and one.strip().lower() not in _MISSING
    return "word" if is_word else ""


def _folded(tree: Any, shape: tuple[int, int]) -> Any:
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[1:]), tree)
