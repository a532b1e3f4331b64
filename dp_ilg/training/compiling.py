"""Compiling before the data are there, and keeping what was compiled.

A private step is compiled from shapes alone, on this machine or for a job that starts
later, and a second start reads the program from a folder instead of compiling it.
"""

from pathlib import Path
from typing import Any

import jax

_LEAST_SECONDS = 0.2  # programs that compile faster are not kept


def shapes_of(tree: Any, rows: int | None = None) -> Any:
    """Shapes and types of a tree of arrays, as ``lower`` takes them.

    Args:
        tree: arrays, or whatever has `shape` and `dtype`.
        rows: replaces the leading axis, such as by the chunk size of a sampler.

    Returns:
        The same tree of ``jax.ShapeDtypeStruct``.

    Example:
        >>> import numpy as np
        >>> shapes_of({"x": np.zeros((9, 2), np.float32)}, rows=4)
        {'x': ShapeDtypeStruct(shape=(4, 2), dtype=float32)}
    """

    def shape(array: Any) -> jax.ShapeDtypeStruct:
        size = array.shape if rows is None else (rows, *array.shape[1:])
        return jax.ShapeDtypeStruct(size, array.dtype)

    return jax.tree.map(shape, tree)


def use_compile_cache(folder: str | Path | None) -> None:
    """Keeps compiled programs in a folder, and takes them from there.

    JAX's own variable JAX_COMPILATION_CACHE_DIR does the same. An entry is found by the
    program, the compiler's version and options and the device, so that it computes the
    same bits.

    Args:
        folder: where; made if absent, for its owner only. None changes nothing.

    Raises:
        OSError: if the folder cannot be made.

    Privacy:
        Programs are made from shapes and public constants; data, parameters and keys
        are their arguments. But a program is code: who can write to the folder decides
        what runs here.

    Example:
        >>> use_compile_cache(None)
    """
    if folder is None:
        return
    path = Path(folder).absolute()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    least = "jax_persistent_cache_min_compile_time_secs"
    jax.config.update(least, _LEAST_SECONDS)
