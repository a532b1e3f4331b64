"""Numbers as a page shows them."""

import math

from dp_ilg.accounting.statements.statement import round_up


def shown_epsilon(value: float) -> str:
    """An epsilon, never smaller than it is.

    Args:
        value: at least 0; infinite without privacy.

    Returns:
        Four significant digits, rounded up.

    Example:
        >>> shown_epsilon(1.99842), shown_epsilon(math.inf)
        ('1.999', '∞')
    """
    return round_up(value) if math.isfinite(value) else "∞"


def short(value: float) -> str:
    """A number of any size in a few characters.

    Args:
        value: the number.

    Returns:
        Three significant digits, a power of ten without zeros in front.

    Example:
        >>> short(1e-05), short(0.25)
        ('1e-5', '0.25')
    """
    mantissa, exponent, power = f"{value:.3g}".partition("e")
    return f"{mantissa}e{int(power)}" if exponent else mantissa


def digits(value: float) -> str:
    """Three significant digits, trailing zeros kept so that columns align.

    Args:
        value: the number.

    Returns:
        The text.

    Example:
        >>> digits(1.0), digits(123.0)
        ('1.00', '123')
    """
    return f"{value:#.3g}".removesuffix(".")


def duration(seconds: float) -> str:
    """A time in the units people use.

    Args:
        seconds: at least 0.

    Returns:
        Seconds, minutes and seconds, or hours and minutes.

    Example:
        >>> duration(12.34), duration(75), duration(7265)
        ('12.3 s', '1 min 15 s', '2 h 01 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
