"""Published private optimizers as rows of a table, each a chain of the same verbs.

``BASELINES[name](learning_rate, plan, key=key, **options)`` makes any of them. A row
also says whether it spends the plan's score budget, and which clip mode
`dp_ilg.clipped_grad` must be given (per-example gradients need nothing). Every row has
the guarantee of its plan, and the contract tests run over every row.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dp_ilg.accounting.plan import PrivacyPlan
from dp_ilg.base import PrivateTransformation
from dp_ilg.baselines.adaptive import (
    adaclip,
    adadp,
    quantile_clipping,
    quantile_clipping_per_layer,
    scale_then_privatize,
)
from dp_ilg.baselines.made_of import checked, clip_mode_of, spends_scores
from dp_ilg.baselines.muon import dp_muon
from dp_ilg.baselines.plain import (
    automatic_clipping,
    dp_adam,
    dp_adam_bc,
    dp_sgd,
    dp_sgd_decay,
)
from dp_ilg.baselines.shaped import dp_sgd_ilg
from dp_ilg.baselines.slack import slack_clipping
from dp_ilg.clipping.adding.metric_sums import Metric
from dp_ilg.clipping.clip import ClipMode, as_clip_mode, normalize
from dp_ilg.geometry.rules import RULES
from dp_ilg.optimizers.chains import chain, dp_adam_ilg
from dp_ilg.optimizers.metric_links import metric_links
from dp_ilg.optimizers.sources import charges
from dp_ilg.registry.lookup import resolve, table

__all__ = [
    "BASELINES",
    "Baseline",
    "adaclip",
    "adadp",
    "automatic_clipping",
    "baseline",
    "dp_adam",
    "dp_adam_bc",
    "dp_adam_ilg",
    "dp_muon",
    "dp_sgd",
    "dp_sgd_decay",
    "dp_sgd_ilg",
    "quantile_clipping",
    "quantile_clipping_per_layer",
    "scale_then_privatize",
    "slack_clipping",
]

Options = dict[str, Any]


class Baseline(NamedTuple):
    """One published method: how to make it, and what must be known around it.

    Attributes:
        name: its key in `BASELINES`.
        make: ``(learning_rate, plan, *, key, **options) -> PrivateTransformation``.
        spends: maps the options to whether the plan's score budget is spent.
        clips: maps the options to the clip mode.

    Example:
        >>> import dp_ilg, jax
        >>> plan = dp_ilg.plan_privacy(noise_multiplier=1.0, delta=1e-5, num_steps=9,
        ...     num_examples=1000, batch_size=100, score_budget=0)
        >>> row = BASELINES["dp_sgd"]
        >>> tx = row(0.1, plan, key=jax.random.key(0), momentum=0.9)
        >>> row.options(), row.spends_scores(), row.clip_mode().name
        (('layers', 'momentum'), False, 'joint')
    """

    name: str
    make: Callable[..., PrivateTransformation]
    spends: Callable[[Options], bool]
    clips: Callable[[Options], Any]

    def __call__(
        self,
        learning_rate: Any,
        plan: PrivacyPlan,
        *,
        key: Any,
        metrics: Mapping[str, Metric] | None = None,
        smooth_steps: Any = 25,
        **options: Any,
    ) -> PrivateTransformation:
        """Makes the optimizer.

        Args:
            learning_rate: a number or an Optax schedule.
            plan: without score budget unless `spends_scores`.
            key: PRNG key, secret.
            metrics: name -> `dp_ilg.Metric`, released by any of the methods.
            smooth_steps: over how many steps' worth they are averaged.
            **options: those of `options`.

        Returns:
            An Optax transformation with ``geometry(state)`` and ``importance(state)``,
            and ``metrics(state)`` where there are metrics.

        Raises:
            ValueError: for an unknown option, a plan whose score budget would be
                wasted, and whatever the method refuses.
            TypeError: for a bad key.

        Privacy: (epsilon, delta) of the plan, as for `dp_ilg.dp_adam_ilg`.
        """
        self.check_options(options)
        if plan.score_budget and not self.spends_scores(**options):
            raise ValueError(
                f"{self.name} releases no scores, so the plan's score_budget of "
                f"{plan.score_budget:g} would be wasted; make it with score_budget=0."
            )
        tx = self.make(learning_rate, plan, key=key, **options)
        own = metric_links(plan, metrics, key, smooth_steps)
        return chain(tx.links[0], *own, *tx.links[1:]) if own else tx

    def options(self) -> tuple[str, ...]:
        """Names of the options this method has."""
        known = [*inspect.signature(self.make).parameters.values()][2:]
        fixed = self.make.keywords if isinstance(self.make, functools.partial) else {}
        named = [p.name for p in known if p.kind is not p.VAR_KEYWORD]
        return tuple(n for n in named if n not in ("key", "metrics", *fixed))

    def check_options(self, options: Options) -> None:
        """Raises unless every option is one of this method's."""
        for name in options:
            if name not in self.options():
                raise ValueError(
                    f"The method {self.name} has no option {name}; it takes "
                    f"{', '.join(self.options()) or 'none'}."
                )

    def spends_scores(self, **options: Any) -> bool:
        """Whether the plan's score budget is spent."""
        return self.spends(options)

    def clip_mode(self, **options: Any) -> ClipMode:
        """What to pass to `dp_ilg.clipped_grad` as ``clip_mode``."""
        return as_clip_mode(self.clips(options))


def baseline(name: str) -> Baseline:
    """The row of a method, or one that is made of a method from outside.

    Args:
        name: a key of `BASELINES`, an entry point of ``dp_ilg.methods``, or
            ``package.module:name`` or ``./file.py:name`` of a function
            ``(learning_rate, plan, *, key, **options) -> chain``.

    Returns:
        The row. One from outside holds every chain it makes against its claim: it must
        clip, and draw noise for the plan and under the key that it is given.

    Raises:
        ValueError: for any other name.

    Privacy: a method from outside has the guarantee of what it is made of; its code
    runs with every right, so read it.

    Example:
        >>> baseline("sgd")
        Traceback (most recent call last):
        ValueError: method is 'sgd', which is unknown; did you mean dp_sgd? (one of \
your own: ./file.py:name or package.module:name)
    """
    found = resolve("method", name, BASELINES, "method")
    if name in BASELINES:
        return found
    if isinstance(found, Baseline):
        return found._replace(make=checked(name, found.make))
    return _row_of_outside(name, found)


def _row_of_outside(name: str, make: Callable[..., PrivateTransformation]) -> Baseline:
    own = checked(name, make)
    return Baseline(
        name,
        own,
        lambda options: spends_scores(name, own, options),
        lambda options: clip_mode_of(own, options),
    )


def _row(
    make: Callable[..., PrivateTransformation],
    *,
    scores: bool = False,
    clip: Any = "joint",
    name: str | None = None,
) -> Baseline:
    mode = clip if callable(clip) else lambda options: clip
    return Baseline(name or make.__name__, make, lambda options: scores, mode)


def _importance_row(name: str, make: Any = dp_adam_ilg, **fixed: Any) -> Baseline:
    """DP-AdamILG or its kin, with a rule fixed or left to the options."""

    def spends(options: Options) -> bool:
        given = {"importance": "min_noise_energy", "source": "scores"} | options | fixed
        return charges(given["source"]) and given["importance"] != "uniform"

    make = functools.partial(make, **fixed) if fixed else make
    return Baseline(name, make, spends, lambda o: o.get("clip_mode", "joint"))


_ROWS = [
    _row(adaclip),
    _row(adadp),
    _row(automatic_clipping, clip=lambda o: normalize(o.get("gamma", 0.01))),
    _row(dp_adam),
    _row(dp_adam_bc),
    _importance_row("dp_adam_ilg"),
    *[_importance_row(f"dp_adam_ilg_{rule}", importance=rule) for rule in RULES],
    _row(dp_muon),
    _row(dp_sgd),
    _row(dp_sgd_decay),
    _importance_row("dp_sgd_ilg", dp_sgd_ilg),
    _row(quantile_clipping, scores=True),
    _row(quantile_clipping_per_layer, scores=True, clip="per_layer"),
    _row(scale_then_privatize),
    _row(slack_clipping),
]
BASELINES: dict[str, Baseline] = table("method", {row.name: row for row in _ROWS})
