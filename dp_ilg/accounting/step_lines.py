"""The lines of a ledger: what a recorded step looks like, and when one differs."""

from typing import Any

from dp_ilg.accounting.sealing import ANY_DIGIT, seal

DIGEST_BYTES = 16
"""Length of the hashes that a ledger holds."""


def step_line(step: int, origin: Any) -> bytes:
    """The line of a step; of an old one, or one without digest, the step alone.

    Args:
        step: which.
        origin: the hash of what it was released from, or None.

    Returns:
        The sealed line.

    Example:
        >>> step_line(3, None)[:10]
        b'{"step": 3'
    """
    return seal({"step": step} | ({} if origin is None else {"released_from": origin}))


def step_forms(step: int) -> list[str]:
    """What the line of a step may look like, its unknown digits as `ANY_DIGIT`.

    Example:
        >>> len(step_forms(3))
        2
    """
    unknown = ANY_DIGIT * 2 * DIGEST_BYTES
    whole = step_line(step, unknown).decode()
    return [step_line(step, None).decode(), whole[:-11] + ANY_DIGIT * 8 + whole[-3:]]


def why_refused(step: int, origin: str | None, before: str | None) -> str:
    """Why a repeated step is refused, in one sentence.

    Args:
        step: which.
        origin: the hash of what it would be released from now, or None.
        before: the recorded one, or None.

    Returns:
        The sentence.

    Example:
        >>> why_refused(3, "ab", "cd")[:41]
        'step is 3, which was released from other '
    """
    if origin is None or before is None:
        now = "without" if origin is None else "with"
        return (
            f"step is {step}, which was recorded with{'out' * (before is None)} "
            f"released_from and would be repeated {now} it, so nobody can tell whether "
            "it is the same release; record every step with released_from="
            "dp_ilg.release_digest(params, program), or begin a new run with new keys."
        )
    return (
        f"step is {step}, which was released from other parameters or by another "
        "program, and the same noise on another sum would give their difference away; "
        "repeat it exactly as it was, or begin a new run with keys of its own."
    )
