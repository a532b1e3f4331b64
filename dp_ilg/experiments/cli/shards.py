"""The command `dp-ilg shards`: data sets as folders of shards, and checks of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from dp_ilg import validation
from dp_ilg.experiments.cli.commands import Rows, show
from dp_ilg.experiments.data.shard_rows import check_finite

_ROWS_AT_ONCE = 256
_ROWS: Rows = {
    "folder": ("Folder", "{}"),
    "rows": ("Training rows", "{:,}"),
    "arrays": ("Arrays", "{}"),
    "files": ("Files", "{:,}"),
    "bytes": ("Bytes", "{:,}"),
    "checked": ("Every file is as it was written", "{}"),
}


def shards(
    folder: Annotated[str, tyro.conf.Positional],
    *,
    data: str | None = None,
    data_dir: str | None = None,
    rows_per_shard: int | None = None,
    json: bool = False,
) -> Callable[[], None]:
    """Writes a data set as a folder of shards, or checks such a folder.

    Args:
        folder: where to; without --data, the folder to check.
        data: the data set, a row of the table of loaders.
        data_dir: a folder of data files (NAME.npz or IDX files).
        rows_per_shard: rows of a file; by default what makes 256 MiB.
        json: print one JSON object.

    Returns:
        What does it.

    Raises:
        ValueError: for no rows a shard, or a number of them without --data; and, when
            called, for a folder that is damaged or that nothing can be trained on.

    Example:
        >>> shards("no/such/folder")()
        Traceback (most recent call last):
        dp_ilg.experiments.data.files.DataError: no/such/folder/index.json cannot ...
    """
    if rows_per_shard is not None:
        validation.whole("--rows-per-shard", rows_per_shard)
        if data is None:
            raise ValueError(
                f"--rows-per-shard is {rows_per_shard}, but nothing is written without "
                "--data; give --data too, or leave it out."
            )

    def work() -> None:
        from dp_ilg.experiments.data.datasets import load_dataset
        from dp_ilg.experiments.data.folders import save_dataset

        if data is not None:
            where = None if data_dir is None else Path(data_dir)
            save_dataset(load_dataset(data, where), folder, rows_per_shard)
        show(_checked(Path(folder)), json, _ROWS)

    return work


def _checked(folder: Path) -> dict[str, Any]:
    """Reads every file of the folder and of its parts, then as training would."""
    from dp_ilg.experiments.data.folders import load_folder
    from dp_ilg.experiments.data.shards import INDEX, open_shards, read_index

    found = open_shards(folder)
    parts = [open_shards(path.parent) for path in sorted(folder.glob(f"*/{INDEX}"))]
    for arrays in (found, *parts):
        for name, array in arrays.items():
            array.content_digest()
            for first in range(0, len(array), _ROWS_AT_ONCE):
                check_finite(name, array[first : first + _ROWS_AT_ONCE])
    load_folder(folder)
    files = sorted(folder.rglob("*.npy"))
    return {
        "folder": str(folder),
        "rows": read_index(folder)["rows"],
        "arrays": ", ".join(f"{n} {a.dtype}{list(a.shape)}" for n, a in found.items()),
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "checked": True,
    }
