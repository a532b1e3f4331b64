"""Checkpoints of a private run: parameters, optimizer state with its keys, and step.

A checkpoint holds the secret keys, so that a resumed run repeats a release bit by
bit rather than drawing new noise for old data. Its files are for the owner only.
"""

import errno
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
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
    leaves = map(_plain, jax.tree.leaves(tree))
    saved = {  # Orbax takes no empty arrays, and they hold nothing
        "leaves": {str(i): x for i, x in enumerate(leaves) if x.size},
        "facts": {"json": np.frombuffer(_encode(facts), np.uint8), "step": step},
    }
    for draft in folder.glob("*.orbax-checkpoint-tmp*"):  # of a run that was killed
        _remove(draft)
    _reserve(folder, sum(x.nbytes for x in saved["leaves"].values()))
    _store(target, saved)
    _owner_only(folder)
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
    folder = Path(folder).absolute()
    steps = _steps(folder)
    if not steps:
        raise ValueError(f"There is no checkpoint in {folder}; start a new run folder.")
    saved = _restore(folder / f"{steps[-1]:08d}")
    facts = json.loads(saved["facts"]["json"].tobytes())
    for name, value in expect.items():
        if facts.get(name) != value:
            raise ValueError(
                f"The checkpoint was made with another {name} ({facts.get(name)}, not "
                f"{value}); use the run folder it belongs to."
            )
    return int(saved["facts"]["step"]), _fill(like, saved["leaves"]), facts


def _fill(like: PyTree, saved: dict[str, np.ndarray]) -> PyTree:
    """Puts saved leaves into the structure of `like`, in its types."""
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


def _store(target: Path, saved: Any) -> None:
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(target, saved, force=True)
    except OSError:
        raise
    except Exception as error:  # Orbax's storage has error types of its own
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number), str(target)) from error


def _restore(path: Path) -> Any:
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(path, restore_args=None)
    except Exception as error:  # Orbax raises many types for a damaged folder
        raise ValueError(
            f"The checkpoint {path} is damaged ({type(error).__name__}); delete it to "
            "resume from the one before."
        ) from error


def _encode(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(facts), sort_keys=True).encode()


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def _owner_only(folder: Path) -> None:
    for path, folders, files in os.walk(folder):
        for name in folders:
            os.chmod(os.path.join(path, name), 0o700)
        for name in files:
            os.chmod(os.path.join(path, name), 0o600)


def _remove(folder: Path) -> None:
    for path, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(path, name))
        for name in folders:
            os.rmdir(os.path.join(path, name))
    os.rmdir(folder)
