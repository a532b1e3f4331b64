"""What a private run is asked for: checked at the door, once."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import PrivateTransformation
from dp_ilg.clipping.clip import as_clip_mode
from dp_ilg.clipping.lookups.tables import check_asked
from dp_ilg.optimizers.behind_noise import behind_noise
from dp_ilg.optimizers.kept_rows.keep import keep_rows
from dp_ilg.optimizers.sources import as_source, knowing
from dp_ilg.training.frameworks.optimizers import optimizer_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The arguments of `private_training`; see there."""

    loss_fn: Any
    optimizer: Any
    plan: Any
    seed: Any
    importance: Any
    source: Any
    layers: Any
    clip_mode: Any
    ema_decay: Any
    floor: Any
    score: Any
    public_importance: Any
    views: Any
    augment: Any
    engine: str
    microbatch_size: Any
    chunk_size: Any
    memory_mib: Any
    mesh: Any
    noise: str | None
    ahead: Any
    has_aux: bool
    metrics: Any
    rows: Any
    random: bool = False

    @property
    def exact(self) -> bool:
        """Whether the host draws the noise."""
        return self.noise == "exact" or self.plan.exact_noise

    def check(self) -> None:
        """Raises for what cannot be, in one sentence."""
        if not callable(self.loss_fn):
            raise TypeError(
                f"loss_fn is {type(self.loss_fn).__name__}, but must be a function "
                "(params, example) -> scalar, or (params, example, key) -> scalar."
            )
        if not isinstance(self.plan, PrivacyPlan):
            raise TypeError(
                f"plan is {type(self.plan).__name__}, but must be a PrivacyPlan; make "
                "one with dp_ilg.plan_privacy."
            )
        validation.whole("views", self.views)
        for name in ("microbatch_size", "chunk_size"):
            if getattr(self, name) is not None:
                validation.whole(name, getattr(self, name))
        if self.memory_mib is not None:
            validation.positive("memory_mib", self.memory_mib)
        if self.augment is not None and not callable(self.augment):
            raise TypeError(
                f"augment is {type(self.augment).__name__}, but must be a function "
                "(example, key) -> example."
            )
        if self.exact and self.mesh is not None:
            raise ValueError(
                "Exact noise is drawn for one device; leave mesh out, or plan without "
                "exact_noise."
            )
        self._check_rows()
        as_clip_mode(self.clip_mode)
        as_source(self.source)
        if self.optimizer is not None and not self._makes_it_private():
            optimizer_of(None, self.optimizer)

    def _check_rows(self) -> None:
        """Raises for rows without a budget, and where they cannot be kept."""
        if self.rows is None:
            if self.plan.row_budget:
                raise ValueError(
                    f"The plan's row_budget of {self.plan.row_budget:g} buys counts of "
                    "rows, but rows names no table; pass rows={'table': 4096}, or plan "
                    "without row_budget."
                )
            return
        check_asked(self.rows)
        if not self.plan.row_budget:
            raise ValueError(
                f"rows is {self.rows}, but the plan's row_budget is 0 and pays for no "
                "counts; make the plan with row_budget=0.1."
            )
        if self.mesh is not None or self.exact:
            what = "mesh" if self.mesh is not None else "exact noise"
            raise ValueError(
                f"private_training keeps rows on one device and with the default "
                f"noise, but {what} was asked for; leave out rows or {what}, or take "
                "the stages of dp_ilg.keep_rows by hand."
            )

    def clip_facts(self) -> dict[str, Any]:
        """What `dp_ilg.clipped_grad` is told beside loss and clip norm."""
        names = ("engine", "microbatch_size", "has_aux", "metrics")
        return {name: getattr(self, name) for name in names}

    def transformation(self, key: Any, model: Any, loss: Any = None) -> Any:
        """The private chain around the optimizer, and around that the choice of rows.

        Args:
            key: of the noise; secret.
            model: of the run, which may hold the optimizer; only shapes are read.
            loss: ``(params, example, key)``, for a source that sends made-up examples
                through it.

        Returns:
            The chain: what a function of the key makes, or the optimizer behind the
            noise; with `rows` a `RowOptimizer`.

        Raises:
            TypeError: for what is no optimizer.
            ValueError: for what cannot stand behind the noise, a private optimizer with
                a key of its own, and one of another plan.
        """
        found = self._chain(key, model, loss)
        return found if self.rows is None else keep_rows(found, self.rows, key=key)

    def _chain(self, key: Any, model: Any, loss: Any) -> PrivateTransformation:
        if not self._makes_it_private():
            behind = optimizer_of(model, self.optimizer)
            facts = self._noise_facts() | {"source": self.source_with(loss)}
            return behind_noise(behind, self.plan, key=key, **facts)
        try:
            made = self.optimizer(key)
        except TypeError as error:
            name = getattr(self.optimizer, "__name__", "the function")
            raise TypeError(
                f"optimizer is {name}, which made no private optimizer of a key "
                f"({type(error).__name__}); pass an Optax transformation, such as "
                "optax.adam(1e-3)."
            ) from error
        if getattr(made, "role", "") != "private":
            raise TypeError(
                f"The optimizer's function returned {type(made).__name__}, but must "
                "make a whole private optimizer of the key; pass an Optax "
                "transformation such as optax.adamw(1e-3) as it is, not in a function."
            )
        _check_plan(made, self.plan)
        return made

    def source_with(self, loss: Any) -> Any:
        """The source of importance, told the loss of the run under a public key."""
        if loss is None:
            return self.source
        public = jax.random.key(0, impl="threefry2x32")
        return knowing(self.source, loss_fn=lambda p, x: loss(p, x, public))

    def _makes_it_private(self) -> bool:
        """Whether the optimizer is a function of a key."""
        return callable(self.optimizer) and not hasattr(self.optimizer, "update")

    def _noise_facts(self) -> dict[str, Any]:
        names = ("importance", "source", "layers", "clip_mode", "ema_decay", "floor")
        facts = {name: getattr(self, name) for name in (*names, "score")}
        return facts | {
            "public_importance": self.public_importance,
            "noise": self.noise,
            "metrics": self.metrics,
        }


def _check_plan(tx: Any, plan: PrivacyPlan) -> None:
    plans = {link.plan for link in tx.links if getattr(link, "plan", None)} or {tx.plan}
    if plans - {plan, None}:
        raise ValueError(
            "The optimizer was made with another plan than private_training was given; "
            "give both the same plan."
        )
