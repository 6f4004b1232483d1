"""MedMNIST's archives from their official place, checked by their official digests."""

from __future__ import annotations

from pathlib import Path

from pipeline.data.layouts.medmnist_sets import ARCHIVE, SETS, SIZES_PX
from pipeline.download import fetch
from pipeline.errors import DataError
from pipeline.progress import Progress, silent


def fetch_medmnist(
    name: str, size_px: int, folder: Path, *, progress: Progress = silent, archive: str = ARCHIVE
) -> Path:
    """Have an official MedMNIST archive in a folder, downloading it if it is not there.

    Args:
        name: Of the set, such as `breastmnist`.
        size_px: Side of its images: 28, 64, 128 or 224.
        folder: Where the archive goes; made if missing.
        progress: Called after each MiB with bytes.
        archive: Address of the folder that holds the archives.

    Returns:
        Path of the `.npz` file, whose MD5 has been checked.

    Raises:
        DataError: There is no such set or size, the archive cannot be reached (the message says which file to put
            where), or the file has another digest.
    """
    if name not in SETS or size_px not in SIZES_PX:
        message = (
            f"MedMNIST has no set {name!r} at {size_px!r} px; "
            f"the sets are {', '.join(SETS)}, at {', '.join(map(str, SIZES_PX))} px"
        )
        raise DataError(message)
    file_name = f"{name}.npz" if size_px == 28 else f"{name}_{size_px}.npz"
    path = folder / file_name
    md5 = SETS[name].md5[SIZES_PX.index(size_px)]
    fetch(f"{archive}/{file_name}?download=1", path, digest=f"md5:{md5}", error=DataError, progress=progress)
    return path
