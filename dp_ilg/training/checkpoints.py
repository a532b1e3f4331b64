"""Checkpoints of a private run: parameters, optimizer state with its keys, and step.

A checkpoint holds the secret keys, so that a resumed run repeats a release bit by
bit rather than drawing new noise for old data. Its files are for the owner only.
"""

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

_OVERHEAD = 1 << 16  # what Orbax writes besides the arrays, and more


def save_checkpoint(
    folder: Path, step: int, tree: PyTree, facts: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Writes one checkpoint and removes all but the newest `keep`.

    Args:
        folder: the folder of all checkpoints; made if absent.
        step: number of steps taken.
        tree: arrays in any tree; typed PRNG keys too.
        facts: what `load_checkpoint` compares or gives back; JSON values.
        keep: how many checkpoints stay.

    Returns:
        The checkpoint's folder, complete: Orbax writes aside and renames.

    Raises:
        OSError: if the folder cannot be written or the disk is full.

    Privacy:
        Whoever reads the keys can subtract the noise: files get mode 0600, folders
        0700. Never publish a checkpoint of a run whose guarantee matters.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> tree = {"w": jnp.ones(2), "key": jax.random.key(0)}
        >>> save_checkpoint(folder, 10, tree, {"plan": "abc"}).name
        '00000010'
    """
    folder = Path(folder).absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = folder / f"{step:08d}"
    saved = packed(step, tree, facts)
    for draft in folder.glob("*.orbax-checkpoint-tmp*"):  # of a run that was killed
        _remove(draft)
    _reserve(folder, sum(x.nbytes for x in saved["leaves"].values()))
    with _owner_only():
        _store(target, saved)
    for old in _steps(folder)[:-keep]:
        _remove(folder / f"{old:08d}")
    return target


def load_checkpoint(
    folder: Path, like: PyTree, expect: Mapping[str, Any]
) -> tuple[int, PyTree, dict[str, Any]]:
    """Reads the newest checkpoint.

    Args:
        folder: the folder of all checkpoints.
        like: a tree with the structure, shapes and dtypes that must come back.
        expect: facts that must be equal to the saved ones.

    Returns:
        The step, the tree and the saved facts.

    Raises:
        ValueError: in one sentence, if there is none, it is damaged, or it belongs
            to another plan, configuration or model.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = save_checkpoint(folder, 3, {"w": jnp.ones(2)}, {"plan": "abc"})
        >>> step, tree, _ = load_checkpoint(folder, {"w": jnp.zeros(2)}, {})
        >>> step, tree["w"].tolist()
        (3, [1.0, 1.0])
        >>> load_checkpoint(folder, {"w": jnp.zeros(2)}, {"plan": "xyz"})
        Traceback (most recent call last):
        ValueError: The checkpoint was made with another plan (abc, not xyz); use the \
run folder it belongs to.
    """
    step, leaves, facts = read_checkpoint(folder)
    for name, value in expect.items():
        if facts.get(name) != value:
            # a digest of the data is as secret as the keys
            which = "" if name == "data" else f" ({facts.get(name)}, not {value})"
            remedy = "use the run folder it belongs to"
            if name.startswith("source of "):
                remedy = "put the code back as it was, or begin a new run folder"
            raise ValueError(
                f"The checkpoint was made with another {name}{which}; {remedy}."
            )
    return step, filled(like, leaves), facts


def read_checkpoint(
    folder: Path,
) -> tuple[int, dict[str, np.ndarray], dict[str, Any]]:
    """Reads the newest checkpoint as it is, without a model to put it into.

    Args:
        folder: the folder of all checkpoints.

    Returns:
        The step, the leaves by their place in the saved tree ("0", "1", ...; empty
        ones are left out), and the saved facts.

    Raises:
        ValueError: in one sentence, if there is none, or it is not bit by bit what
            was saved.

    Privacy:
        The leaves include the secret keys.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = save_checkpoint(folder, 3, {"w": jnp.ones(2)}, {"plan": "abc"})
        >>> read_checkpoint(folder)
        (3, {'0': array([1., 1.], dtype=float32)}, {'plan': 'abc'})
    """
    folder = Path(folder).absolute()
    steps = _steps(folder)
    if not steps:
        raise ValueError(f"There is no checkpoint in {folder}; start a new run folder.")
    path = folder / f"{steps[-1]:08d}"
    saved = _restore(path)
    try:
        return unpacked(saved)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def packed(step: int, tree: PyTree, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A tree as plain arrays under plain names, with facts and a digest of it all.

    Args:
        step: number of steps taken.
        tree: arrays in any tree; typed PRNG keys too.
        facts: JSON values.

    Returns:
        What `unpacked` takes: dictionaries of NumPy arrays and whole numbers.

    Privacy:
        As secret as the keys in the tree.

    Example:
        >>> sorted(packed(3, {"w": jnp.ones(2)}, {"plan": "abc"}))
        ['digest', 'facts', 'leaves']
    """
    leaves = map(_plain, jax.tree.leaves(tree))
    saved: dict[str, Any] = {  # Orbax takes no empty arrays, and they hold nothing
        "leaves": {str(i): x for i, x in enumerate(leaves) if x.size},
        "facts": {"json": np.frombuffer(_encode(facts), np.uint8), "step": step},
    }
    return saved | {"digest": _digest(saved)}


def unpacked(
    saved: Mapping[str, Any],
) -> tuple[int, dict[str, np.ndarray], dict[str, Any]]:
    """What `packed` made: step, leaves and facts.

    Args:
        saved: of `packed`, perhaps written and read again.

    Returns:
        The step, the leaves by their place in the tree, and the facts.

    Raises:
        ValueError: unless it is bit by bit what was packed; or another error of
            Python's for what is nothing of the kind.

    Example:
        >>> step, leaves, facts = unpacked(packed(3, {"w": jnp.ones(2)}, {"a": 1}))
        >>> step, leaves["0"].tolist(), facts
        (3, [1.0, 1.0], {'a': 1})
    """
    if saved["digest"].tobytes() != _digest(saved).tobytes():
        raise ValueError("digest")
    facts = json.loads(saved["facts"]["json"].tobytes())
    return int(saved["facts"]["step"]), saved["leaves"], facts


def filled(like: PyTree, saved: dict[str, np.ndarray]) -> PyTree:
    """Puts leaves that were saved into the structure of a tree, in its types.

    Args:
        like: the tree.
        saved: leaves by their place, of `unpacked`.

    Returns:
        A tree like it.

    Raises:
        ValueError: unless shapes and dtypes are those of the tree.

    Example:
        >>> filled({"w": jnp.zeros(2)}, {"0": np.ones(2, np.float32)})["w"].tolist()
        [1.0, 1.0]
    """
    templates, structure = jax.tree.flatten(like)
    plain = [_plain(template) for template in templates]
    wanted = {str(i): (x.shape, x.dtype) for i, x in enumerate(plain) if x.size}
    found = {i: (x.shape, x.dtype) for i, x in saved.items()}
    if wanted != found:
        raise ValueError(
            f"The checkpoint holds {len(found)} arrays that are not the {len(wanted)} "
            "of this model and optimizer; use the configuration it was made with."
        )
    typed = [
        _like(template, saved.get(str(i), plain[i]))
        for i, template in enumerate(templates)
    ]
    return jax.tree.unflatten(structure, typed)


def _plain(leaf: Any) -> np.ndarray:
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def _like(template: Any, value: np.ndarray) -> jax.Array:
    if not _is_key(template):
        return jnp.array(value)  # a copy, since the step donates it
    return jax.random.wrap_key_data(
        jnp.asarray(value), impl=jax.random.key_impl(template)
    )


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.prng_key
    )


def _reserve(folder: Path, size: int) -> None:
    """Raises OSError if the disk has no room: Orbax fails in threads, and noisily."""
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(0, size + _OVERHEAD, _OVERHEAD):
            file.write(bytes(_OVERHEAD))
        file.flush()
        os.fsync(file.fileno())


def _checkpointer() -> Any:
    """Orbax, for one process: of several, only number 0 has a folder."""
    import orbax.checkpoint as ocp  # here, so that a loop without it needs none

    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _store(target: Path, saved: Any) -> None:
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(target, saved, force=True)
    except OSError:
        raise
    except Exception as error:  # Orbax's storage has error types of its own
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(target)) from error


def _restore(path: Path) -> Any:
    try:
        with _checkpointer() as checkpointer:
            return checkpointer.restore(path, restore_args=None)
    except Exception as error:  # Orbax raises many types for a damaged folder
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    why = "its digest is wrong" if str(error) == "digest" else type(error).__name__
    return ValueError(
        f"The checkpoint {path} is damaged ({why}); delete it to resume from the one "
        "before."
    )


def _digest(saved: Mapping[str, Any]) -> np.ndarray:
    """SHA-256 of leaves and facts: one flipped bit in a key is other noise."""
    digest = hashlib.sha256()
    for name, value in sorted(saved["leaves"].items()):
        array = np.ascontiguousarray(value)
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    facts = saved["facts"]
    digest.update(f"{int(facts['step'])} ".encode() + facts["json"].tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _encode(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(facts), sort_keys=True).encode()


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    names = [p.name for p in folder.iterdir()]
    return sorted(int(name) for name in names if re.fullmatch("[0-9]{8,}", name))


@contextmanager
def _owner_only() -> Iterator[None]:
    """Makes files with mode 0600 and folders with 0700, from their first moment."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def _remove(folder: Path) -> None:
    for path, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(path, name))
        for name in folders:
            os.rmdir(os.path.join(path, name))
    os.rmdir(folder)
