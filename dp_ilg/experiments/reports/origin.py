"""What a page is about and who answers for it: date, names, digests."""

import datetime
import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_GIVEN = "not given"
_PACKAGES = ("dp_ilg", "jax", "jaxlib", "optax", "flax", "dp-accounting", "numpy")


@dataclass(frozen=True)
class Origin:
    """What ties a page to a run and to somebody who answers for it.

    Attributes:
        date: when the run ended, or last took a step; UTC, to the minute.
        responsible: who answers for the run; empty if the configuration does not say.
        contact: how to reach them; as `responsible`.
        model_sha256: digest of the trained parameters; empty while there are none.
        ledger_sha256: digest of the file `ledger.jsonl`.

    Privacy:
        Digests are published with the page. The ledger holds hashes under the run's
        key, of the training data among others, so its digest tells nothing to whoever
        knows neither; the keys have 64 bits, as everywhere in JAX.

    Example:
        >>> Origin("2026-11-30 20:05 UTC", "", "", "", "0" * 64).named["Responsible"]
        'not given'
    """

    date: str
    responsible: str
    contact: str
    model_sha256: str
    ledger_sha256: str

    @property
    def named(self) -> dict[str, str]:
        """The facts under the names that the page gives them."""
        return {
            "Date": self.date,
            "Responsible": self.responsible or NOT_GIVEN,
            "Contact": self.contact or NOT_GIVEN,
        }

    @property
    def digests(self) -> dict[str, str]:
        """The digests under the names that the page gives them, those there are."""
        found = {"model": self.model_sha256, "ledger": self.ledger_sha256}
        return {name: digest for name, digest in found.items() if digest}


def read_origin(
    run_dir: Path, table: Mapping[str, Any], summary: Mapping[str, Any] | None
) -> Origin:
    """Reads it off a run folder.

    Args:
        run_dir: the folder, with a ledger in it.
        table: its configuration.
        summary: what the run wrote at its end; None while it is unfinished.

    Returns:
        The facts; the date is the ledger's own where no end is on file.

    Raises:
        OSError: if the ledger cannot be read.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "ledger.jsonl").write_text("")
        >>> read_origin(folder, {"report": {"contact": "a@b.org"}}, None).contact
        'a@b.org'
    """
    ledger = run_dir / "ledger.jsonl"
    given = table.get("report")
    names = given if isinstance(given, Mapping) else {}
    written = summary or {}
    return Origin(
        date=_date(written.get("finished"), ledger),
        responsible=str(names.get("responsible", "")),
        contact=str(names.get("contact", "")),
        model_sha256=str(written.get("params_sha256", "")),
        ledger_sha256=file_sha256(ledger),
    )


def _date(finished: Any, ledger: Path) -> str:
    utc = datetime.UTC
    try:
        moment = datetime.datetime.fromisoformat(finished).astimezone(utc)
    except (TypeError, ValueError, OverflowError):
        moment = datetime.datetime.fromtimestamp(ledger.stat().st_mtime, utc)
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def now() -> str:
    """The time, as a summary has it.

    Returns:
        ISO 8601 in UTC, to the second.

    Example:
        >>> now()[-6:]
        '+00:00'
    """
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it.

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.

    Raises:
        OSError: if it cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "empty"
        >>> path.touch()
        >>> file_sha256(path)[:8]
        'e3b0c442'
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a result depends on.

    Example:
        >>> sorted(versions())[:3]
        ['dp-accounting', 'dp_ilg', 'flax']
    """
    found = {"python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in _PACKAGES}
