"""What a private run is asked for: checked at the door, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from dp_ilg import validation
from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import PrivateTransformation
from dp_ilg.clipping.clip import as_clip_mode
from dp_ilg.optimizers.behind_noise import behind_noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The arguments of `private_training`; see there."""

    loss_fn: Callable[..., Any]
    optimizer: Any
    plan: PrivacyPlan
    seed: Any
    importance: Any
    source: str
    layers: Any
    clip_mode: Any
    ema_decay: Any
    floor: Any
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
    reads_key: bool = True

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
        as_clip_mode(self.clip_mode)

    def transformation(self, key: Any) -> PrivateTransformation:
        """The private chain around the optimizer.

        Args:
            key: of the noise; secret.

        Returns:
            The chain: what a function of the key makes, or the optimizer behind the
            noise.

        Raises:
            TypeError: for what is no optimizer.
            ValueError: for a whole private optimizer with a key of its own, or one of
                another plan.
        """
        given = self.optimizer
        if isinstance(given, optax.GradientTransformation):
            if getattr(given, "role", ""):
                raise ValueError(
                    "optimizer is private already and has a key of its own, which a "
                    "second run would share; pass the Optax transformation that is to "
                    "stand behind the noise, or lambda key: dp_ilg.dp_adam_ilg(..., "
                    "key=key)."
                )
            return behind_noise(given, self.plan, key=key, **self._noise_facts())
        made = given(key) if callable(given) else None
        if getattr(made, "role", "") != "private":
            kind = type(given if made is None else made).__name__
            raise TypeError(
                f"optimizer is {kind}, but must be an Optax transformation such as "
                "optax.adamw(1e-3), or a function of a key that makes a whole private "
                "optimizer."
            )
        _check_plan(made, self.plan)
        return made

    def _noise_facts(self) -> dict[str, Any]:
        names = ("importance", "source", "layers", "clip_mode", "ema_decay", "floor")
        facts = {name: getattr(self, name) for name in names}
        return facts | {
            "public_importance": self.public_importance,
            "noise": self.noise,
        }


def _check_plan(tx: Any, plan: PrivacyPlan) -> None:
    plans = {link.plan for link in tx.links if getattr(link, "plan", None)} or {tx.plan}
    if plans - {plan, None}:
        raise ValueError(
            "The optimizer was made with another plan than private_training was given; "
            "give both the same plan."
        )
