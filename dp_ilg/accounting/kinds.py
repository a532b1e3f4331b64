"""An event as the distinct kinds of steps it consists of: what accountants compose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dp_ilg.accounting import truncation

if TYPE_CHECKING:
    import dp_accounting


_Laws = tuple[tuple[float, float], ...]
_Key = tuple[float, float, _Laws]


class Kind(NamedTuple):
    """Steps of one kind.

    Attributes:
        sampling_prob: the Poisson rate, 1 for an unsampled Gaussian.
        noise_multiplier: z, relative to the bound C of one example.
        truncated: empty for plain Poisson sampling. Else `truncation.cut_laws`: how
            likely a draw is cut, and the rate at which one example then takes the place
            of another, which is twice the change; for one data set and for the
            neighbour that is larger.
        count: the number of such steps.

    Example:
        >>> Kind(0.01, 1.0, (), 100).count
        100
    """

    sampling_prob: float
    noise_multiplier: float
    truncated: _Laws
    count: int


def kinds_of(event: dp_accounting.DpEvent) -> tuple[Kind, ...]:
    """Merges an event into distinct Gaussians; order never matters to composition.

    Args:
        event: as `epsilon` takes it.

    Returns:
        The kinds of its steps, sorted.

    Raises:
        ValueError: for an event that is not supported.

    Example:
        >>> import dp_accounting
        >>> kinds_of(dp_accounting.GaussianDpEvent(2.0))
        (Kind(sampling_prob=1.0, noise_multiplier=2.0, truncated=(), count=1),)
    """
    counts: dict[_Key, int] = {}
    _collect(event, 1, counts)
    found = (Kind(*key, count) for key, count in sorted(counts.items()))
    return tuple(kind for kind in found if kind.count and kind.sampling_prob)


def _collect(event, count: int, counts: dict[_Key, int]) -> None:
    import dp_accounting

    match event:
        case dp_accounting.NoOpDpEvent():
            return
        case dp_accounting.SelfComposedDpEvent():
            return _collect(event.event, count * event.count, counts)
        case dp_accounting.ComposedDpEvent():
            for part in event.events:
                _collect(part, count, counts)
            return
        case dp_accounting.GaussianDpEvent():
            key = (1.0, float(event.noise_multiplier), ())
        case dp_accounting.PoissonSampledDpEvent(
            event=dp_accounting.GaussianDpEvent() as inner
        ):
            q = float(event.sampling_probability)
            key = (q, float(inner.noise_multiplier), ())
        case dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent():
            q, most = float(event.sampling_probability), event.truncated_batch_size
            cut = truncation.cut_laws(event.dataset_size, q, most)
            key = (q, float(event.noise_multiplier), cut)
        case _:
            raise ValueError(
                f"The event {event!r} is not supported; compose Gaussians and Poisson "
                "samples of one Gaussian, made with effective_noise_multiplier()."
            )
    counts[key] = counts.get(key, 0) + count


def merged(kinds: Sequence[Kind], most: int) -> list[Kind]:
    """Makes fewer kinds of many: noise multipliers are rounded down to a common one.

    Args:
        kinds: the steps.
        most: how many noise multipliers there may be for one rate.

    Returns:
        Kinds that have at most the noise of those given, hence at least their epsilon.

    Example:
        >>> merged([Kind(0.1, z, (), 1) for z in (1.0, 1.01, 2.0)], 2)
        [Kind(sampling_prob=0.1, noise_multiplier=1.0, truncated=(), count=2), \
Kind(sampling_prob=0.1, noise_multiplier=2.0, truncated=(), count=1)]
    """
    groups: dict[tuple[float, _Laws], list[Kind]] = {}
    for kind in sorted(kinds):
        groups.setdefault((kind.sampling_prob, kind.truncated), []).append(kind)
    found = []
    for group in groups.values():
        if len(group) <= most:
            found += group
            continue
        noise = np.array([kind.noise_multiplier for kind in group])
        edges = np.geomspace(noise.min(), noise.max(), most)
        bins = np.searchsorted(edges, noise * (1 + 1e-12), side="right")
        for one in np.unique(bins):
            part = [group[i] for i in np.flatnonzero(bins == one)]
            count = sum(kind.count for kind in part)
            found.append(part[0]._replace(count=count))  # sorted: the least noise
    return found
