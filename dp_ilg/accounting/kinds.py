"""An event as the distinct kinds of steps it consists of: what accountants compose."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dp_ilg.accounting import truncation

if TYPE_CHECKING:
    import dp_accounting


class Kind(NamedTuple):
    """Steps of one kind.

    Attributes:
        sampling_prob: the Poisson rate, 1 for an unsampled Gaussian.
        noise_multiplier: z, relative to the bound C of one example.
        truncated: a bound on the probability that a draw is cut, which doubles what one
            example can change in that step; 0 for plain Poisson sampling.
        count: the number of such steps.

    Example:
        >>> Kind(0.01, 1.0, 0.0, 100).count
        100
    """

    sampling_prob: float
    noise_multiplier: float
    truncated: float
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
        (Kind(sampling_prob=1.0, noise_multiplier=2.0, truncated=0.0, count=1),)
    """
    counts: dict[tuple[float, float, float], int] = {}
    _collect(event, 1, counts)
    found = (Kind(*key, count) for key, count in sorted(counts.items()))
    return tuple(kind for kind in found if kind.count and kind.sampling_prob)


def _collect(event, count: int, counts: dict[tuple[float, float, float], int]) -> None:
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
            key = (1.0, float(event.noise_multiplier), 0.0)
        case dp_accounting.PoissonSampledDpEvent(
            event=dp_accounting.GaussianDpEvent() as inner
        ):
            q = float(event.sampling_probability)
            key = (q, float(inner.noise_multiplier), 0.0)
        case dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent():
            q, most = float(event.sampling_probability), event.truncated_batch_size
            cut = truncation.cut_probability(event.dataset_size, q, most)
            key = (q, float(event.noise_multiplier), cut)
        case _:
            raise ValueError(
                f"The event {event!r} is not supported; compose Gaussians and Poisson "
                "samples of one Gaussian, made with effective_noise_multiplier()."
            )
    counts[key] = counts.get(key, 0) + count
