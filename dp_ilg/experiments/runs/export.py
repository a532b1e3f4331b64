"""Parameters alone, out of a checkpoint that also holds the secret keys."""

import hashlib
import os
import secrets
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from dp_ilg.experiments.data.locks import locked
from dp_ilg.experiments.reports.record import read_run
from dp_ilg.experiments.runs import projection
from dp_ilg.experiments.runs.evaluation import leaves_sha256
from dp_ilg.training.checkpoints import read_checkpoint


def export_parameters(
    run_dir: Path, out: Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Writes the newest parameters of a run to an .npz file, and nothing else.

    Args:
        run_dir: the folder of a training run, finished or not.
        out: the file; its name must end in .npz. It holds one array a parameter, by
            its path (``hidden_0/kernel``); those of 16 bits that NumPy does not know
            (bfloat16) become float32, which is exact. A projection of the inputs comes
            along, as ``projection/mean`` and so on.
        overwrite: whether a file that exists may be replaced.

    Returns:
        What was written: `out`, number of `arrays` and `parameters`, `steps` that the
        parameters have seen, and the `epsilon` and `delta` of all steps charged.

    Raises:
        ValueError: in one sentence, for a folder that is damaged or in use, a lost
            projection, or a file that exists or has another ending.
        OSError: if the file cannot be written; nothing is left behind.

    Privacy:
        Parameters are post-processing of what the plan's mechanism released: the file
        may be published under the run's (epsilon, delta). Optimizer state and keys
        are never in it.

    Example:
        >>> export_parameters(Path("no/such/run"), Path("out.npz"))
        Traceback (most recent call last):
        ValueError: no/such/run is not a folder; give the folder of a training run.
    """
    out = Path(out)
    if out.suffix != ".npz":
        raise ValueError(f"{out} does not end in .npz; give a name that does.")
    if os.path.lexists(out) and not overwrite:
        raise ValueError(f"{out} exists; pass --overwrite to replace it.")
    record = read_run(Path(run_dir))
    with locked(Path(run_dir)):
        step, leaves, facts = read_checkpoint(Path(run_dir) / "checkpoints")
    names, first = facts.get("parameters"), facts.get("parameters_from", 0)
    arrays = _named(leaves, names, first) | _projection(Path(run_dir), facts)
    _write(out, arrays)
    return {
        "run_dir": str(run_dir),
        "out": str(out),
        "arrays": len(arrays),
        "parameters": sum(array.size for array in arrays.values()),
        "steps": step,
        "epsilon": record.epsilon_charged(),
        "delta": record.plan.delta,
    }


def stored_sha256(run_dir: Path) -> tuple[int, str]:
    """The digest of the parameters that a run folder holds, computed again.

    Args:
        run_dir: the folder of a training run.

    Returns:
        The steps they have seen, and what `params_sha256` says of them.

    Raises:
        ValueError: in one sentence, for a folder that is damaged or in use, or whose
            checkpoint is of a version that did not name its parameters.

    Example:
        >>> stored_sha256(Path("no/such/run"))
        Traceback (most recent call last):
        ValueError: There is no checkpoint in ...
    """
    folder = Path(run_dir) / "checkpoints"
    with locked(Path(run_dir)) if folder.is_dir() else nullcontext():
        step, leaves, facts = read_checkpoint(folder)
    keys, first = facts.get("parameter_keys"), facts.get("parameters_from", 0)
    if keys is None:
        raise ValueError(
            f"The checkpoint in {folder} is of a version that did not say where its "
            "parameters belong; check it with the version that wrote it."
        )
    shapes = [shape for _, shape in facts["parameters"]]
    arrays = [
        (key, leaves.get(str(i), np.zeros(shape, np.float32)))
        for i, (key, shape) in enumerate(zip(keys, shapes, strict=True), first)
    ]
    return step, leaves_sha256(arrays)


def _named(
    leaves: dict[str, np.ndarray], names: Any, first: int
) -> dict[str, np.ndarray]:
    """The leaves that are parameters, or their averages, in the order of the names."""
    if not names:
        raise ValueError(
            "The checkpoint does not name its parameters: it is of an older version; "
            "read it with the version that wrote it."
        )
    return {
        name: _plain(leaves.get(str(i), np.zeros(shape, np.float32)))
        for i, (name, shape) in enumerate(names, first)
    }


def _projection(run_dir: Path, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of the projection, if the run made one; it is public."""
    known, path = facts.get("projection"), run_dir / projection.FILE
    if known is None:
        return {}
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != known:
        raise ValueError(
            f"{path} is missing or not what this run released, and the parameters are "
            "of no use without it; restore it from a copy."
        )
    basis = projection.from_bytes(content)
    return {f"projection/{k}": np.asarray(v) for k, v in basis._asdict().items()}


def _plain(array: np.ndarray) -> np.ndarray:
    """The array in a type that NumPy itself can read back."""
    return array if array.dtype.kind in "biuf" else array.astype(np.float32)


def _write(out: Path, arrays: dict[str, np.ndarray]) -> None:
    draft = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        with open(draft, "wb") as file:
            _save(file, arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, out)
    except BaseException as error:
        draft.unlink(missing_ok=True)
        if isinstance(error, OSError):  # the name that was asked for, not the draft's
            raise type(error)(error.errno, error.strerror, str(out)) from None
        raise


def _save(file: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    """As `numpy.savez`, which takes no array named "file"."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)
