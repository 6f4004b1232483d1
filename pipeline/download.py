"""Have a file whose digest is known: continued after a stop, checked, and only then given its name."""

from __future__ import annotations

import errno
import hashlib
import http.client
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

from pipeline.errors import PipelineError, naming
from pipeline.progress import Progress, silent

TIMEOUT_SECONDS = 30.0
ATTEMPTS = 4  # each goes on where the last one stopped
_BLOCK_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fetch(url: str, path: Path, *, digest: str, error: type[PipelineError], progress: Progress = silent) -> None:
    """Download a file unless the right one is there.

    Args:
        url: Where it is.
        path: Where it goes; its folder is made. What has arrived so far is beside it, with `.part` appended.
        digest: `ALGORITHM:HEX`, such as `md5:01ec...`.
        error: What to raise.
        progress: Called after each MiB, with bytes.

    Raises:
        PipelineError: Of the type `error`: another file has this name, the address cannot be reached (the message
            says which file to put where), or what came from there has another digest.
    """
    if path.exists():
        found = file_digest(path, digest)
        if found != digest:
            message = f"{path}: its digest is {found} and should be {digest}; move it away, or give yours another name"
            raise error(message)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    reason = _fill(url, part, progress)
    if reason:
        message = f"{url} cannot be downloaded ({reason}); fetch that file elsewhere and put it at {path} ({digest})"
        raise error(message)
    found = file_digest(part, digest)
    if found != digest:
        part.unlink()
        message = f"{url}: what came has the digest {found} and should have {digest}; run the command again"
        raise error(message)
    part.replace(path)


def file_digest(path: Path, like: str) -> str:
    """Digest of a file by the algorithm of another digest, as `ALGORITHM:HEX`."""
    algorithm = like.partition(":")[0]
    with path.open("rb") as file:
        return f"{algorithm}:{hashlib.file_digest(file, algorithm).hexdigest()}"


def _fill(url: str, part: Path, progress: Progress) -> str:
    """Fill `part` from where it ends, again where a connection breaks; returns why that failed, empty if it did not."""
    reason = ""
    for attempt in range(ATTEMPTS):
        time.sleep(0.5 * attempt)
        try:
            if _continue(url, part, progress):
                return ""
            reason = "the connection ended early"
        except urllib.error.HTTPError as answer:
            answer.close()
            reason = f"the server answered {answer.code} {answer.reason}"
            if answer.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                if answer.headers.get("Content-Range") == f"bytes */{part.stat().st_size}":
                    return ""
                part.unlink()
            elif answer.code < http.HTTPStatus.INTERNAL_SERVER_ERROR:
                return reason
        except (OSError, http.client.HTTPException) as failure:
            if getattr(failure, "errno", None) in _FULL:
                raise  # of the disk, not of the network
            reason = str(getattr(failure, "reason", None) or failure)
            if not part.exists():
                return reason  # nothing has ever come from there: most likely there is no network
    return reason


def _continue(url: str, part: Path, progress: Progress) -> bool:
    """Append what is missing to `part`; returns whether it is as long as the server's file afterwards."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        if answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0  # the server sends everything again
        elif not re.match(f"bytes {have}-", answer.headers.get("Content-Range", f"bytes {have}-")):
            message = "the server continued at another place"
            raise http.client.HTTPException(message)
        total = have + int(answer.headers.get("Content-Length", 0))
        with naming(part), part.open("ab" if have else "wb") as file:
            while block := answer.read(_BLOCK_BYTES):
                file.write(block)
                have += len(block)
                progress("download", have, max(have, total))
    return have >= total
