"""A private training run: what the front door returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dp_ilg.accounting.statements.statement import Statement
from dp_ilg.geometry.geometry import Geometry
from dp_ilg.noise.repeats import next_digest
from dp_ilg.training.frameworks.adapt import adapt
from dp_ilg.training.loop import saving
from dp_ilg.training.loop.audited import audited_step
from dp_ilg.training.loop.binding import bound_keys
from dp_ilg.training.loop.checking import Check, checked
from dp_ilg.training.loop.core import RunCore
from dp_ilg.training.loop.lots import Lots
from dp_ilg.training.loop.program import told_of_memory
from dp_ilg.training.loop.standing import Standing, admit
from dp_ilg.training.loop.state import Counted, Origin, PrivateState
from dp_ilg.training.loop.supply import open_ledger, supply_of

_ASKED: Any = object()  # stands for a ledger that nobody named


class PrivateTraining(RunCore):
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

    def init(self, model: Any, *, wrt: Any = None) -> PrivateState:
        """The state before the first step.

        Args:
            model: a tree of parameters (linen, Haiku), a linen ``TrainState``, an
                ``nnx.Module``, ``(nnx.Module, nnx.Optimizer)`` or an Equinox module.
                It is copied, and may be used further.
            wrt: what of it is trained: an NNX filter, or a filter of
                ``equinox.partition``; None for the usual.

        Returns:
            The `PrivateState`.

        Raises:
            ValueError: once lots were handed out: a second run from the start would
                have the same noise; for a model that mixes examples; and for an
                optimizer that cannot stand behind the noise.
            TypeError: for parameters that are no floating-point arrays.

        Privacy:
            The model must not depend on the private data, or have a price of its own.
        """
        saving.register_with_flax()
        if self._charged:
            raise ValueError(
                f"This run has handed out {self._charged} lots, and a second state "
                "from the start would be stepped with the same noise; make a new "
                "private_training for a new run."
            )
        self._adapted = adapt(model, self._recipe.loss_fn, wrt=wrt)
        self._tx = self._recipe.transformation(
            self._noise_key(), model, self._adapted.loss
        )
        self._origin = Origin(self.plan.digest(), self, self._adapted.rebuild)
        params = self._adapted.params
        params, inner = jax.tree.map(jnp.copy, (params, self._tx.init(params)))
        state = self._state(params, Counted(inner, jnp.zeros((), jnp.int32)))
        if self._recipe.mesh is not None:
            state = self._on_mesh(state)
        self._at, self._binding = Standing.of(0, "", state), None
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
            book = open_ledger(ledger, self.plan, key, at.step if resume else None)
        supply = supply_of(binding, book, steps, self._recipe.ahead, self._charge)
        return Lots(self, steps, at.trail, supply)

    def step(self, state: Any, lot: Any) -> PrivateState:
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
            OutOfMemory: naming what to ask for.

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
        given = state.params, Counted(before, state.step), chunks, noise
        with told_of_memory(binding.program):
            params, after = binding.program.step(*given)
        state = self._state(params, after)
        self._at = Standing.of(at.step + 1, next_digest(at.trail), state)
        return state

    def auditable(self, model: Any) -> tuple[Any, Any]:
        """Its step as a plain function and a state with public keys, for audits.

        ``dp_ilg.auditing.audit_step(train, model, example, plan)`` asks for them.

        Args:
            model: as `init` takes it; the run itself stays where it is.

        Returns:
            ``step(state, batch, is_padding_example) -> state``, and the first state.

        Raises:
            ValueError: for a run with exact noise, and as `init`.

        Privacy:
            Never on private data: whoever reads this code knows the keys.
        """
        return audited_step(self._recipe, model)

    def save(self, folder: Any, state: PrivateState) -> Path:
        """Writes the state a run stands at, whole or not at all, as Orbax does.

        Args:
            folder: of the saved states, made with mode 0700 if absent; the newest two
                are kept.
            state: what `step`, `init` or `restore` returned last.

        Returns:
            The folder of this state, named by its step.

        Raises:
            ValueError: for any other state.
            OSError: if it cannot be written.

        Privacy:
            It holds the run's secret: files have mode 0600. Whoever reads them can
            subtract the noise; publish parameters instead.
        """
        step, tree, place = self._saved(state)
        return saving.save(folder, step, tree, place)

    def restore(self, folder: Any) -> PrivateState:
        """The newest saved state, to go on with; `init` comes first, for the shapes.

        Go on with ``batches(data, ledger=..., resume=True)``: steps that the ledger
        has already are repeated bit for bit, and charged once.

        Args:
            folder: given to `save`.

        Returns:
            The state, with the bits it was saved with.

        Raises:
            ValueError: for a folder without states, a damaged one, and one of another
                plan, model or key. Another loss, optimizer or data are found by
                `batches`.

        Privacy:
            The saved secret takes the place of this run's own.
        """
        at = self._begun("restore")
        return self._went_on(*saving.load(folder, at.state))

    def epsilon(self, state: PrivateState) -> float:
        """Epsilon at the plan's delta of all that was released up to a state.

        Args:
            state: of this run.

        Returns:
            The plan's epsilon for the steps the state has taken, or for the lots that
            were handed out, if those are more.

        Raises:
            TypeError: for what is no state.
            ValueError: for a state that was stepped already, or of another run.

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
            TypeError: for what is no state.
            ValueError: for a state that was stepped already, or of another run.

        Privacy:
            Public.
        """
        return self.plan.statement(self._steps(state))

    def explain(self, model: Any, batch: Any) -> Any:
        """Which path the engine takes for every leaf, why, and what it costs.

        Args:
            model: as for `init`, or a `PrivateState`.
            batch: examples with a leading axis; only shapes and dtypes are read.

        Returns:
            An `Explanation`; ``print`` shows a table.

        Raises:
            ValueError: as `dp_ilg.clipped_grad`.

        Privacy:
            Shapes alone are read.
        """
        grad_fn, params, rows = self._sample(model, batch)
        return grad_fn.explain(params, rows, self._recipe.layers)

    def check(self, model: Any, batch: Any, *, public: bool = False) -> Check:
        """One table before training: layers, costs, noise, and what is wrong.

        Args:
            model: as for `init`, or a `PrivateState`.
            batch: examples with a leading axis; only shapes and dtypes are read,
                unless `public`.
            public: whether the batch is public: then the signal of each layer is that
                of its gradients, instead of the most it can be.

        Returns:
            A `Check`; ``print`` shows the table.

        Raises:
            ValueError: as `dp_ilg.clipped_grad`.

        Privacy:
            Nothing is released or charged, so `public` must never be said of private
            rows: signals are computed without noise.
        """
        grad_fn, params, rows = self._sample(model, batch)
        layers, found = self._recipe.layers, None
        if public:
            rows = jax.tree.map(jnp.asarray, rows)
            geometry = Geometry.uniform(params, layers)
            found = jax.jit(lambda p, b: grad_fn(p, b, geometry=geometry))(params, rows)
        silent = self._silent(model)
        return checked(grad_fn, params, rows, self.plan, layers, found, silent)

    def metrics(self, state: PrivateState) -> dict[str, Any]:
        """The metrics released so far, smoothed over steps, with their error.

        Args:
            state: of this run.

        Returns:
            Name -> `dp_ilg.Released`; empty without ``metrics=``.

        Raises:
            TypeError: for what is no state.
            ValueError: before `init`, and for a state of another run.

        Privacy:
            Released, and charged to the plan; they may be logged and published.
        """
        self._begun("metrics")
        self._own("metrics", state)
        return self._tx.metrics(state.opt_state) if self._tx.metrics else {}
