"""What a private run knows of itself, on the host."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any, NoReturn

import numpy as np

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.clipping.batches import batch_length
from dp_ilg.noise.repeats import release_digest
from dp_ilg.optimizers.sources import silent_in
from dp_ilg.training.frameworks.adapt import Adapted, adapt
from dp_ilg.training.loop import saving
from dp_ilg.training.loop.binding import Binding, bind, check_unchanged
from dp_ilg.training.loop.losses import KeyedLoss, over_views
from dp_ilg.training.loop.program import clipped_of
from dp_ilg.training.loop.recipe import Recipe
from dp_ilg.training.loop.rows import Rows, row_words
from dp_ilg.training.loop.standing import Standing, check_current, steps_of
from dp_ilg.training.loop.state import Counted, Origin, PrivateState
from dp_ilg.training.mesh import Shardings, placed, whole
from dp_ilg.training.run_secret import RunSecret

_LOG = logging.getLogger("dp_ilg")


class RunCore:
    """Secret, place and binding of a run; `PrivateTraining` is its public face.

    Attributes:
        plan: the plan of the run.
    """

    plan: PrivacyPlan

    def __init__(self, recipe: Recipe):
        """Checks what was asked for, and draws or derives the secret."""
        recipe.check()
        self._recipe, self.plan = recipe, recipe.plan
        self._secret = RunSecret(recipe.seed)
        if self._secret.fixed:
            _say_that_it_is_for_tests()
        self._tx: Any = None
        self._adapted: Adapted | None = None
        self._origin: Origin | None = None
        self._at: Standing | None = None
        self._binding: Binding | None = None
        self._begun_with: tuple[str, str] | None = None  # digests of program and data
        self._charged = 0

    def __repr__(self) -> str:
        where = "a fixed seed" if self._secret.fixed else "from the operating system"
        return f"PrivateTraining({self.plan.num_steps} steps, secret=<hidden: {where}>)"

    def __deepcopy__(self, memo: Any) -> Any:
        return self  # a second one would step with the same noise

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "A private run and its states hold the keys of the noise and are not "
            "pickled; use train.save, or flax.serialization.to_bytes(state)."
        )

    def _saved(self, state: PrivateState) -> tuple[int, Any, saving.Place]:
        """What is saved of the state the run stands at."""
        at = self._begun("save")
        check_current(at, state)
        tree = saving.tree_of(state)
        if self._recipe.mesh is not None:
            tree = whole(tree)
        digests = self._begun_with or ("", "")
        secret = self._secret.hex(), self._secret.fixed
        place = saving.Place(self.plan.digest(), *digests, at.trail, *secret)
        return at.step, tree, place

    def _went_on(self, step: int, tree: Any, place: saving.Place) -> PrivateState:
        """Goes on from what was saved."""
        self._secret = saving.check_secret(place, self._secret, self._charged)
        params, inner, count = tree
        state = self._state(params, Counted(inner, count))
        if self._recipe.mesh is not None:
            state = self._on_mesh(state)
        self._begun_with = (place.program, place.data) if place.program else None
        self._at, self._binding = Standing.of(step, place.trail, state), None
        return state

    def _charge(self, step: int) -> None:
        self._charged = max(self._charged, step + 1)

    def _steps(self, state: PrivateState) -> int:
        self._own("epsilon", state)
        return max(self._charged, steps_of(self._at, state, self.plan))

    def _own(self, what: str, state: Any) -> None:
        """Raises for what is no state of this run."""
        if not isinstance(state, PrivateState):
            raise TypeError(
                f"state is {type(state).__name__}, but must be what init, restore or "
                "step returned."
            )
        if state.origin.run is not self:
            raise ValueError(
                f"The state is of another run (its plan is {state.origin.plan}), of "
                f"which this one cannot tell the {what}; ask the run that made it."
            )

    def _begun(self, what: str) -> Standing:
        if self._at is None:
            raise ValueError(
                f"{what} comes after init; call state = train.init(params) first."
            )
        return self._at

    def _noise_key(self) -> Any:
        return self._secret.key("optimizer", plan=self.plan.digest())

    def _state(self, params: Any, after: Counted) -> PrivateState:
        assert self._origin is not None
        return PrivateState(params, after.inner, after.step, self._origin)

    def _on_mesh(self, state: PrivateState) -> PrivateState:
        before = Counted(state.opt_state, state.step)
        at = Shardings.of(state.params, before, self._recipe.mesh)
        return self._state(*placed((state.params, before), at[:2]))

    def _bound(self, data: Any) -> Binding:
        """The run bound to its data, which must be the same ones every time."""
        at, adapted = self._at, self._adapted
        assert at is not None and adapted is not None
        if self._binding is not None:
            program = self._binding.program.digest
            check_unchanged(self._begun_with, (program, Rows(data).digest()))
            return self._binding
        recipe, loss = self._of_one_example(adapted)
        found = bind(recipe, self._tx, loss, at.state, self._secret)(data)
        digests = found.program.digest, found.data
        check_unchanged(self._begun_with, digests)
        self._begun_with, self._binding = digests, found
        return found

    def _of_one_example(self, adapted: Adapted) -> tuple[Recipe, KeyedLoss]:
        """The recipe that knows whether the loss is random, and that loss."""
        random = adapted.random or self._recipe.augment is not None
        recipe = dataclasses.replace(self._recipe, random=random)
        return recipe, over_views(adapted.loss, recipe.views, recipe.augment)

    def _sample(self, model: Any, batch: Any) -> tuple[Any, Any, Any]:
        """The clipped gradient, parameters and batch that a step would have."""
        if isinstance(model, PrivateState):
            model = model.model
        adapted = adapt(model, self._recipe.loss_fn)
        recipe, loss = self._of_one_example(adapted)
        grad_fn = clipped_of(recipe, loss)
        if recipe.random:
            numbers = np.arange(batch_length(batch))
            batch = batch, row_words(np.zeros(2, np.uint32), 0, numbers)
        return grad_fn, adapted.params, batch

    def _silent(self, model: Any) -> list[str]:
        """Layers that get no gradient from the probe, where the source is one."""
        if self._recipe._makes_it_private():
            return []
        if isinstance(model, PrivateState):
            model = model.model
        adapted = adapt(model, self._recipe.loss_fn)
        source = self._recipe.source_with(adapted.loss)
        return silent_in(source, adapted.params, self._recipe.layers)

    def _with_trail(self, at: Standing, binding: Binding) -> Standing:
        """Where the run stands, with the digest of what its next step is from."""
        if not at.trail:
            local = at.state.params, at.state.opt_state
            if self._recipe.mesh is not None:
                local = whole(local)
            at = at._replace(trail=release_digest(local, binding.digest))
            self._at = at
        return at


@functools.cache
def _say_that_it_is_for_tests() -> None:
    _LOG.warning(
        "private_training was given a fixed seed, which is for tests: whoever knows or "
        "guesses it can subtract the noise; leave seed out for a run that matters."
    )
