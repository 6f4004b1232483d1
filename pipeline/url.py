"""Files and folders of the data that lie behind a URL: what of `pathlib.Path` the layouts need, for any fsspec place.

A URL may carry what gives access to it (`user:password@`, a signed query). That is used to read, and shows nowhere
else: not in `str`, so not in what is recorded, and not in a message. Nothing is kept on disk.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from pipeline.errors import DataError, UnreachableError

Answer = TypeVar("Answer")

_LOCAL = ("file://", "local://")
_WEB = ("http://", "https://")
_LIST = ".txt"  # of a file that names the files of a folder that cannot be listed
_PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    **dict.fromkeys(("http", "https"), "aiohttp"),
    "hf": "huggingface_hub",
}
_PATIENCE_SECONDS = 60.0  # a server over http may be silent so long
_PAUSES_SECONDS = (0.5, 2.0, 8.0)  # between tries, where a server does not answer as it should
_REFUSED = {401, 403, 407}
_PASSING = {408, 425, 429}  # below 500, what another try may change
_MARKS = (  # of a file's version, as one service or the other calls it; the first that it gives is taken
    *("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "blob_id", "CRC"),
    *("LastModified", "Last-Modified", "last_modified", "updated", "mtime", "modified", "created"),
)
_USER = re.compile(r"://[^/\s]*@")  # a password may hold quotes and @
_QUERY = re.compile(r"(://[^\s'\"<>?]*)\?[^\s'\"<>]*")


class Url:
    """A file or folder behind a URL.

    Attributes:
        text: The URL as it was given, with what gives access.
        below: Name of a file below it, with forward slashes, as it is: nothing in it is quoted.
    """

    def __init__(self, text: str, below: str = "") -> None:
        """Name a place; nothing is asked."""
        self.text, self.below = text, below

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and (self.text, self.below) == (other.text, other.below)

    def __hash__(self) -> int:
        return hash((self.text, self.below))

    def __str__(self) -> str:
        parts = (part.partition("?")[0].partition("#")[0] for part in self.text.split("::"))
        shown = "::".join(_USER.sub("://", part) for part in parts).rstrip("/")
        return f"{shown}/{self.below}" if self.below else shown

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    def __truediv__(self, name: str) -> Url:
        return Url(self.text, f"{self.below}/{name}" if self.below else name)

    @property
    def name(self) -> str:
        """The last part; of a host by itself its name."""
        return (self.below or str(self).partition("::")[0].partition("://")[2]).rstrip("/").rsplit("/", 1)[-1]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """What follows the name's last dot, with the dot."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Url:
        """The folder that it lies in."""
        if self.below:
            return Url(self.text, self.below.rpartition("/")[0])
        first, *rest = self.text.split("::")
        parts = urlsplit(first)
        return Url("::".join([urlunsplit(parts._replace(path=parts.path.rstrip("/").rpartition("/")[0])), *rest]))

    @property
    def can_list(self) -> bool:
        """Whether its files can be listed: plain http cannot do that."""
        return not self.text.startswith(_WEB)

    def open(self, mode: str = "r", *, encoding: str | None = None, newline: str | None = None) -> IO[Any]:
        """Fetch the file and open it in memory for reading; see `read_bytes`."""
        data = io.BytesIO(self.read_bytes())
        return data if "b" in mode else io.TextIOWrapper(data, encoding=encoding, newline=newline)

    def read_bytes(self) -> bytes:
        """Fetch the file.

        Raises:
            DataError: It is not there.
            UnreachableError: The server does not answer, however often it is asked, or does not let us read.
        """
        fs, path = self._found()
        data: bytes = self.ask(lambda: fs.cat_file(path))
        return data

    @contextmanager
    def ranges(self, block_bytes: int) -> Iterator[IO[bytes]]:
        """Open the file to read parts of it, each of which is fetched when it is wanted.

        Args:
            block_bytes: How much is fetched at once.

        Raises:
            DataError: As `read_bytes`; or the server sends whole files only.
            UnreachableError: As `read_bytes`.
        """
        fs, path = self._found()
        with self.ask(lambda: fs.open(path, "rb", block_size=block_bytes)) as file:
            if not file.seekable():
                raise self.without_ranges()
            yield io.BufferedReader(_Parts(self, file))

    def mark(self) -> str | None:
        """Size and version of the file; None where it is not there, or the server tells no version."""
        fs, path = self._found()
        try:
            return _mark(fs.info(path))
        except Exception:  # reading the file says what is wrong
            return None

    def files(self) -> tuple[Url, Mapping[str, str | None]]:
        """Find the files of a folder at any depth: the folder, and the mark of each file by its name below it.

        Plain http lists nothing. There a text file names the files, a line each, below the folder that it lies in.

        Raises:
            DataError: There is no file, or no way to list them.
            UnreachableError: As `read_bytes`.
        """
        if not self.can_list:
            listed = dict.fromkeys(self._listed())
            return self.parent, listed
        fs, root = self._found()
        fs.invalidate_cache()  # what it remembers may be old
        found = self.ask(lambda: fs.find(root, detail=True))
        fs.invalidate_cache()  # and large
        start = f"{root}/" if root else ""
        files = {name[len(start) :]: _mark(info) for name, info in found.items() if name.startswith(start)}
        if not files:
            message = f"{self}: there is no file below this URL; check it"
            raise DataError(message)
        return self, files

    def _listed(self) -> list[str]:
        """Names of files that a text file lists."""
        if self.suffix.lower() != _LIST:
            message = (
                f"{self}: plain http cannot say which files are in a folder. Put a list of them there, a name a line "
                f"(find . -type f | cut -c3- > files.txt), and give its URL, which ends in {_LIST}; or use a table "
                f"(data.layout: csv)"
            )
            raise DataError(message)
        try:
            lines = self.read_bytes().decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            message = f"{self}: this is no text in UTF-8 ({error}); expected a name of a file in each line"
            raise DataError(message) from None
        names = [name.strip().removeprefix("./") for name in lines if name.strip()]
        wrong = next((name for name in names if name.startswith("/") or "://" in name or ".." in name.split("/")), None)
        if wrong is not None or not names:
            message = f"{self}: expected names of files below its own folder, a line each, and found {wrong!r}"
            raise DataError(message)
        return names

    def _found(self) -> tuple[Any, str]:
        """Fsspec's file system, and the path in it.

        Raises:
            DataError: Fsspec does not know such URLs, or lacks a package for them.
        """
        import fsspec.core

        try:
            if not self.can_list:
                urlsplit(self.text).port  # noqa: B018  of what no URL is, it says why
            fs, root = fsspec.core.url_to_fs(self.text, **({} if self.can_list else _patience()))
        except (ImportError, ValueError) as error:
            raise DataError(self._unknown(error)) from None
        except Exception as error:  # some services are asked at once
            raise self._spell(error) from None
        if not self.below:
            return fs, root.rstrip("/")
        if not self.can_list:
            parts = urlsplit(root)
            return fs, urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(self.below)}"))
        return fs, f"{root.rstrip('/')}/{self.below}" if root else self.below

    def _unknown(self, error: Exception) -> str:
        protocol = self.text.partition("://")[0].rpartition("::")[2]
        package = _PACKAGES.get(protocol)
        if isinstance(error, ImportError) and package:
            return f"{self}: reading {protocol}:// needs the package {package!r}: pip install {package}"
        return f"{self}: {self._clean(str(error))}; use s3://, gs://, https://, hf://, or a path of this machine"

    def ask(self, ask: Callable[[], Answer]) -> Answer:
        """What the server answers, which is asked again where another try may help.

        Raises:
            DataError: It knows no such file.
            UnreachableError: It does not answer, however often it is asked, or does not let us read.
        """
        for pause in (*_PAUSES_SECONDS, None):
            try:
                return ask()
            except Exception as error:
                if not _is_foreign(error):
                    raise
                told = self._spell(error)
                if pause is None or isinstance(told, DataError) or _is_refusal(error):
                    raise told from None
                time.sleep(pause)
        raise AssertionError

    def _spell(self, error: Exception) -> DataError | UnreachableError:
        """The error that a person reads; it holds nothing that gives access."""
        status = _status(error)
        if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) or status in (404, 410):
            return DataError(f"{self}: there is no such file; check the URL")
        if _is_refusal(error):
            return UnreachableError(
                f"{self}: the server does not let you read this; give what it knows you by (such as AWS_PROFILE, "
                f"GOOGLE_APPLICATION_CREDENTIALS or HF_TOKEN) on every machine that reads, and run the same command "
                f"again, which continues"
            )
        reason = self._clean(str(error)) or type(error).__name__
        if status is not None and status < 500 and status not in _PASSING:
            return DataError(f"{self}: the server refuses ({reason}); check the URL")
        return UnreachableError(
            f"{self}: {type(error).__name__}: {reason.splitlines()[0]}; check the URL and the connection, and run the "
            f"same command again, which continues"
        )

    def without_ranges(self) -> DataError:
        """What to say of a server that sends whole files only."""
        return DataError(f"{self}: the server sends whole files only, and parts of one are needed: fetch it, name that")

    def _clean(self, text: str) -> str:
        """A foreign message without what gives access."""
        return without_access(text.replace(self.text, str(self)))


class _Parts(io.RawIOBase):
    """A file at a server, read in parts."""

    def __init__(self, url: Url, file: IO[bytes]) -> None:
        self._url, self._file = url, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._url.ask(lambda: self._file.read(len(buffer)))
        except ValueError as error:
            if "range" not in str(error):
                raise
            raise self._url.without_ranges() from None
        buffer[: len(data)] = data
        return len(data)


AnyPath = Path | Url


def any_path(text: str) -> AnyPath:
    """A path of this machine, or a URL where the text is one."""
    if text.startswith(_LOCAL):
        return Path(text.partition("://")[2])
    return Url(text) if is_url(text) else Path(text)


def is_url(text: str) -> bool:
    """Whether a text is a URL rather than a path."""
    return "://" in text


def without_access(text: str) -> str:
    """A text without the user, the password and the query of any URL in it."""
    return _QUERY.sub(r"\1", _USER.sub("://", text))


def join(folder: AnyPath, name: str) -> AnyPath:
    """A file by its name in a folder, or by a URL of its own."""
    return any_path(name) if is_url(name) else folder / name.removeprefix("./")


def _mark(info: Mapping[str, Any]) -> str | None:
    """Size and version from what a file system says of a file."""
    version = next((str(info[key]) for key in _MARKS if info.get(key)), None)
    return None if version is None else f"{info.get('size')} {version}"


def _patience() -> dict[str, Any]:
    """Options of a connection over http that gives up a silent server, and no large file."""
    import aiohttp

    waits = aiohttp.ClientTimeout(total=None, sock_connect=_PATIENCE_SECONDS / 2, sock_read=_PATIENCE_SECONDS)
    return {"client_kwargs": {"timeout": waits}}


def _status(error: Exception) -> int | None:
    """Status of http in an error, wherever its package keeps it."""
    for found in (error, getattr(error, "response", None)):
        for name in ("status", "status_code", "code"):
            number = getattr(found, name, None)
            if isinstance(number, int):
                return number
    return None


def _is_refusal(error: Exception) -> bool:
    """Whether we are not known, or not any more: that ends a run, and no image is to blame."""
    by_gcsfs = str(error).startswith("Forbidden: ")  # an OSError without a status
    return isinstance(error, PermissionError) or _status(error) in _REFUSED or by_gcsfs


def _is_foreign(error: Exception) -> bool:
    """Whether an error comes from a connection, whichever package made it, and is no mistake of ours."""
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] not in {"builtins", "pipeline"}
