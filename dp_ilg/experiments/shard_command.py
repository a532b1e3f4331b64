"""The command `dp-ilg shards`: data sets as folders of shards, and checks of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from dp_ilg.experiments.commands import Rows, show

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

    Example:
        >>> shards("no/such/folder")()
        Traceback (most recent call last):
        dp_ilg.experiments.data_files.DataError: no/such/folder/index.json cannot ...
    """

    def work() -> None:
        from dp_ilg.experiments.data import load_dataset
        from dp_ilg.experiments.sources import save_dataset

        if data is not None:
            where = None if data_dir is None else Path(data_dir)
            save_dataset(load_dataset(data, where), folder, rows_per_shard)
        show(_checked(Path(folder)), json, _ROWS)

    return work


def _checked(folder: Path) -> dict[str, Any]:
    """Reads every file of the folder and of its parts once."""
    from dp_ilg.experiments.shards import INDEX, open_shards, read_index

    found = open_shards(folder)
    for path in sorted(folder.glob(f"*/{INDEX}")):
        for part in open_shards(path.parent).values():
            part.content_digest()
    for array in found.values():
        array.content_digest()
    files = sorted(folder.rglob("*.npy"))
    return {
        "folder": str(folder),
        "rows": read_index(folder)["rows"],
        "arrays": ", ".join(f"{n} {a.dtype}{list(a.shape)}" for n, a in found.items()),
        "files": len(files),
        "bytes": sum(path.stat().st_size for path in files),
        "checked": True,
    }
