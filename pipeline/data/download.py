"""Download a file whose digest is known: resumed after a stop, checked, and only then given its name."""

from __future__ import annotations

import hashlib
import http.client
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

from pipeline.data.medmnist_sets import ARCHIVE, SETS, SIZES_PX
from pipeline.errors import DataError
from pipeline.progress import Progress, silent

TIMEOUT_SECONDS = 30.0
ATTEMPTS = 4  # of which each goes on where the last one stopped
_BLOCK_BYTES = 1 << 20


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
    if path.exists():
        _check(path, md5, f"it is not the official {file_name}: move it away, or use a data set of another name")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    _download(f"{archive}/{file_name}?download=1", part, path, md5, progress)
    try:
        _check(part, md5, "the download is damaged and has been removed: run the command again")
    except DataError:
        part.unlink()
        raise
    part.replace(path)
    return path


def _check(path: Path, md5: str, remedy: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        message = f"{path}: its MD5 is {found} and should be {md5}; {remedy}"
        raise DataError(message)


def _download(url: str, part: Path, path: Path, md5: str, progress: Progress) -> None:
    """Fill `part` from where it ends, trying again where a connection breaks."""
    for attempt in range(ATTEMPTS):
        try:
            if _continue(url, part, progress):
                return
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            reason = f"the server answered {error.code} {error.reason}"
            error.close()
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                if _total(error.headers.get("Content-Range")) == part.stat().st_size:
                    return
                part.unlink()
            elif error.code < http.HTTPStatus.INTERNAL_SERVER_ERROR:
                break
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", None) or error)
            if isinstance(error, urllib.error.URLError) and not part.exists():
                break  # nothing has ever come from there: most likely there is no network
        time.sleep(0.5 * attempt)
    message = f"{url} cannot be downloaded ({reason}); fetch that file elsewhere and put it at {path} (MD5 {md5})"
    raise DataError(message)


def _continue(url: str, part: Path, progress: Progress) -> bool:
    """Append what is missing to `part`; returns whether the server's whole file is there afterwards."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # the server sends everything again
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else 0
        with part.open("ab" if have else "wb") as file:
            while block := answer.read(_BLOCK_BYTES):
                file.write(block)
                have += len(block)
                progress("download", have, total)
    return have >= total


def _total(content_range: str | None) -> int | None:
    """Size of the whole file from a `Content-Range: bytes */SIZE`, None if the server does not say."""
    match = re.fullmatch(r"bytes \*/(\d+)", content_range or "")
    return int(match[1]) if match else None
