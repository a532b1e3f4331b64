"""A private training run: what the front door returns."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.accounting.statement import Statement
from dp_ilg.noise.repeats import next_digest, release_digest
from dp_ilg.training.loop.binding import Binding, bind, bound_keys
from dp_ilg.training.loop.losses import Adapted, adapt, over_views
from dp_ilg.training.loop.lots import Lot, Lots
from dp_ilg.training.loop.recipe import Recipe
from dp_ilg.training.loop.standing import Standing, admit, steps_of
from dp_ilg.training.loop.state import Counted, Origin, PrivateState
from dp_ilg.training.loop.supply import open_ledger, supply_of
from dp_ilg.training.mesh import Shardings, placed, whole
from dp_ilg.training.run_secret import RunSecret

_LOG = logging.getLogger("dp_ilg")
_ASKED: Any = object()  # stands for a ledger that nobody named


class PrivateTraining:
    """A private training loop; `private_training` makes it.

    Attributes:
        plan: the plan of the run.

    Privacy:
        It remembers the state it returned last. A state that was changed, a lot that
        was taken, and a step that would repeat a release with other numbers are
        refused on the host, before anything is computed.

    Example:
        >>> import dp_ilg, jax.numpy as jnp, optax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5,
        ...     num_examples=100, batch_size=10, num_steps=4)
        >>> loss_fn = lambda params, x: jnp.sum(params * x)
        >>> dp_ilg.private_training(loss_fn, optax.sgd(0.1), plan)
        PrivateTraining(4 steps, secret=<hidden: from the operating system>)
    """

    def __init__(self, recipe: Recipe):
        """Checks what was asked for, and draws or derives the secret."""
        recipe.check()
        self._recipe, self.plan = recipe, recipe.plan
        self._secret = RunSecret(recipe.seed)
        if self._secret.fixed:
            _say_that_it_is_for_tests()
        self._tx = recipe.transformation(self._noise_key())
        self._adapted: Adapted | None = None
        self._at: Standing | None = None
        self._binding: Binding | None = None
        self._charged = 0

    def __repr__(self) -> str:
        where = "a fixed seed" if self._secret.fixed else "from the operating system"
        return f"PrivateTraining({self.plan.num_steps} steps, secret=<hidden: {where}>)"

    def init(self, model: Any) -> PrivateState:
        """The state before the first step.

        Args:
            model: the parameters, a tree of floating-point arrays. It is copied, and
                may be used further.

        Returns:
            The `PrivateState`.

        Raises:
            ValueError: once lots were handed out: a second run from the start would
                have the same noise.

        Privacy:
            The model must not depend on the private data, or have a price of its own.
        """
        if self._charged:
            raise ValueError(
                f"This run has handed out {self._charged} lots, and a second state "
                "from the start would be stepped with the same noise; make a new "
                "private_training for a new run."
            )
        self._adapted = adapt(model, self._recipe.loss_fn)
        params = self._adapted.params
        params, inner = jax.tree.map(jnp.copy, (params, self._tx.init(params)))
        state = self._state(params, Counted(inner, jnp.zeros((), jnp.int32)))
        if self._recipe.mesh is not None:
            state = self._on_mesh(state)
        self._at, self._binding = Standing(0, "", state), None
        return state

    def batches(self, data: Any, *, ledger: Any = _ASKED, resume: bool = False) -> Lots:
        """The lots that are left: Poisson samples, charged before they are handed out.

        Args:
            data: the private examples: an array, a dict or tuple of arrays, a list of
                examples, or a `dp_ilg.training.sources.Source`; as many as the plan
                says.
            ledger: a file; each step is written there and synced before its lot is
                handed out. Its folder is made if absent. None keeps no record, and
                then nothing but this process counts the steps.
            resume: whether to go on with a run that has taken steps, here or before.

        Returns:
            An iterator of `Lot`; each goes into `step`, whole and in order.

        Raises:
            TypeError: if no ledger is named.
            ValueError: before `init`, for data of another size or other data than
                before, for a run that has steps without `resume`, and as
                `PrivacyLedger`.
            OSError: if the ledger cannot be written.

        Privacy:
            Who is drawn in a step is a function of (secret, step), independent of all
            else, as the accountant assumes. A lot that is handed out counts.
        """
        at = self._begun("batches")
        if ledger is _ASKED:
            raise TypeError(
                "batches needs ledger=PATH, where each step is charged before it is "
                "released; pass ledger=None to keep no record on disk."
            )
        if (at.step or self._charged) and not resume:
            raise ValueError(
                f"This run stands at step {at.step} of {self.plan.num_steps} and has "
                "handed out lots already; pass resume=True to go on there, or make a "
                "new private_training (one loop takes all steps of the plan, there are "
                "no epochs)."
            )
        binding = self._bound(data)
        at = self._with_trail(at, binding)
        steps = range(at.step, self.plan.num_steps)
        book = None
        if ledger is not None:
            key = self._secret.key("ledger", plan=self.plan.digest())
            book = open_ledger(ledger, self.plan, key, resume)
        supply = supply_of(binding, book, steps, self._recipe.ahead, self._charge)
        return Lots(self, steps, at.trail, supply)

    def step(self, state: PrivateState, lot: Lot) -> PrivateState:
        """One private step: a compiled call that takes the state's buffers over.

        Args:
            state: what `init`, `restore` or `step` returned last.
            lot: the next one of `batches`.

        Returns:
            The state after it; the one given is used up.

        Raises:
            TypeError: for things of another kind, and under ``jit`` or ``scan``.
            ValueError: for a state or lot of another run, a lot taken twice or out of
                order, and a state that was changed.

        Privacy:
            Releases the parameters: the plan's guarantee for one more step.
        """
        admit(self._at, state, lot, self)
        at, binding = self._at, self._binding
        assert at is not None and binding is not None  # a lot has been handed out
        chunks, noise = lot._take()
        before = state.opt_state
        if at.step == 0:
            before = bound_keys(before, binding.noise_words)
        params, after = binding.program.step(
            state.params, Counted(before, state.step), chunks, noise
        )
        state = self._state(params, after)
        self._at = Standing(at.step + 1, next_digest(at.trail), state)
        return state

    def epsilon(self, state: PrivateState) -> float:
        """Epsilon at the plan's delta of all that was released up to a state.

        Args:
            state: of this run.

        Returns:
            The plan's epsilon for the steps the state has taken, or for the lots that
            were handed out, if those are more.

        Raises:
            ValueError: for a state that was stepped already.

        Privacy:
            Public.
        """
        return self.plan.epsilon(self._steps(state))

    def statement(self, state: PrivateState) -> Statement:
        """The guarantee of all that was released up to a state, in words.

        Args:
            state: of this run.

        Returns:
            The `Statement`; ``print`` shows a paragraph.

        Raises:
            ValueError: for a state that was stepped already.

        Privacy:
            Public.
        """
        return _shortened(self.plan, self._steps(state)).statement()

    def _charge(self, step: int) -> None:
        self._charged = max(self._charged, step + 1)

    def _steps(self, state: PrivateState) -> int:
        return max(self._charged, steps_of(self._at, state, self.plan))

    def _begun(self, what: str) -> Standing:
        if self._at is None:
            raise ValueError(
                f"{what} comes after init: the ledger records what each step is "
                "released from; call state = train.init(params) first."
            )
        return self._at

    def _noise_key(self) -> Any:
        return self._secret.key("optimizer", plan=self.plan.digest())

    def _state(self, params: Any, after: Counted) -> PrivateState:
        assert self._adapted is not None
        origin = Origin(self.plan.digest(), self, self._adapted.rebuild)
        return PrivateState(params, after.inner, after.step, origin)

    def _on_mesh(self, state: PrivateState) -> PrivateState:
        before = Counted(state.opt_state, state.step)
        at = Shardings.of(state.params, before, self._recipe.mesh)
        return self._state(*placed((state.params, before), at[:2]))

    def _bound(self, data: Any) -> Binding:
        """The run bound to its data, which must be the same ones every time."""
        at, recipe, adapted = self._at, self._recipe, self._adapted
        assert at is not None and adapted is not None
        loss = over_views(adapted.loss, recipe.views, recipe.augment)
        found = bind(recipe, self._tx, loss, at.state, self._secret)(data)
        if self._binding is not None and found.digest != self._binding.digest:
            raise ValueError(
                "The data are not those this run was begun with, and the same noise on "
                "others would show the difference; pass the same data, or make a new "
                "private_training."
            )
        self._binding = self._binding or found
        return self._binding

    def _with_trail(self, at: Standing, binding: Binding) -> Standing:
        """Where the run stands, with the digest of what its next step is from."""
        if not at.trail:
            local = at.state.params, at.state.opt_state
            if self._recipe.mesh is not None:
                local = whole(local)
            at = at._replace(trail=release_digest(local, binding.digest))
            self._at = at
        return at


def _shortened(plan: PrivacyPlan, steps: int) -> PrivacyPlan:
    """The plan of the first steps alone."""
    left, stages = steps, []
    for count, z in plan.stages:
        taken = min(left, count)
        left -= taken
        stages += [(taken, z)] if taken else []
    if steps == plan.num_steps or not stages:
        return plan
    return dataclasses.replace(plan, num_steps=steps, stages=tuple(stages))


@functools.cache
def _say_that_it_is_for_tests() -> None:
    _LOG.warning(
        "private_training was given a fixed seed, which is for tests: whoever knows or "
        "guesses it can subtract the noise; leave seed out for a run that matters."
    )
