"""The folder of a store in the making: the plan, a record per finished shard, and the store as it grows.

Of the plan `plan.json` is written last, of a shard its record. What lacks its last file does not exist, so a kill at
any moment leaves either a finished piece or none.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.description import TapSpec, load_json
from cache.durable import link_or_copy, remove, sync_folder, write_file
from cache.errors import FormatError
from cache.fingerprint import JSON, Fingerprint, canonical
from cache.formats.mapped import ZarrRows, folder_inode
from cache.formats.zarr_layout import shard_bytes, shard_name, stored_places
from cache.writing.plan import KeptShard, Plan
from cache.writing.reuse import Source
from cache.writing.same_work import Identity

_UNREADABLE = (KeyError, TypeError, ValueError, IndexError, OSError, EOFError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged plan or record ends in."""


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard.

    Attributes:
        extent: (slots of the shard, 2) float32, (0, 0) where there is no row.
        checksums: (taps, slots of the shard) uint32.
        set_aside: Reason by slot within the shard, for samples that gave no feature.
    """

    extent: npt.NDArray[np.float32]
    checksums: npt.NDArray[np.uint32]
    set_aside: Mapping[int, str]


def partial_path(path: Path) -> Path:
    """Where the store at `path` grows."""
    return path.with_name(path.name + ".partial")


class WorkFolder:
    """`NAME.partial`: `store/` grows into the store, `work/` holds plan and records."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is touched."""
        self.path = path
        self.store = path / "store"
        self._work = path / "work"

    @property
    def packed(self) -> Path:
        """Where a single-file store is written before it gets its name."""
        return self.path / "packed"

    @property
    def aside(self) -> Path:
        """Where an old version waits where two names cannot be exchanged in one step."""
        return self.path / "aside"

    @property
    def lock(self) -> Path:
        """Whose lock the one writer holds."""
        return self.path / "lock"

    @property
    def plan(self) -> Path:
        """What is there from the first moment to the last at which shards may be written."""
        return self._work / "plan.json"

    def scratch(self, name: str) -> Path:
        """A name to write under before the rename; what a stop leaves there, the next write of that name replaces."""
        return self._work / f"unfinished-{name}"

    def shard(self, tap: str, number: int) -> Path:
        """A shard file of the store in the making."""
        return self.store / tap / shard_name(number)

    def exists(self) -> bool:
        """Whether there is a plan."""
        return self.plan.exists()

    def drop_committed(self, target: Path) -> None:
        """Delete what a run left that was stopped after its store got the name `target`, and what has no plan.

        Retired work has plans of its own: a run that was stopped before it had one leaves that to the next.
        """
        seal = self._work / "sealed"
        if not self.exists():
            self._finish_retiring()
            self.drop()
        elif seal.exists() and self._has_name(target, *seal.read_text().split("\n")):
            self.clear()

    def _has_name(self, target: Path, root: str, folder: str = "") -> bool:
        """Whether the sealed store is no longer in `store/`: it was renamed, or the version before it lies there.

        The folder itself tells, unless the work was copied to another disk. There the roots do; one that is missing
        says nothing, as it is written after the seal, and an older version may be damaged.
        """
        if folder == str(folder_inode(self.store)):
            return False
        here, there = (_sha256(place / "zarr.json") for place in (self.store, target))
        return not self.store.exists() or there == root or here not in {"", root}

    def clear(self) -> None:
        """Delete everything but the lock."""
        self.drop()
        for path in reversed(self._previous()):
            WorkFolder(path).drop()
            remove(path)

    def drop(self) -> None:
        """Delete the plan and what has grown by it; the plan first, so that what is left is nothing."""
        self.plan.unlink(missing_ok=True)
        for path in (self._work, self.store, self.packed, self.aside):
            remove(path)

    def _previous(self) -> list[Path]:
        """Folders of retired work, oldest first."""
        return sorted(self.path.glob("previous-*"), key=lambda path: int(path.name.removeprefix("previous-")))

    def retire(self) -> None:
        """Make the unfinished work of another plan a source for the next one; a stop half-way is made good later."""
        target = self.path / f"previous-{len(self._previous())}"
        target.mkdir()
        self._work.rename(target / "work")
        self._finish_retiring()

    def _finish_retiring(self) -> None:
        """Move the store after its plan, where that has been retired already."""
        for folder in self.retired()[:1]:
            if self.store.exists() and not folder.store.exists():
                self.store.rename(folder.store)

    def retired(self) -> list[WorkFolder]:
        """Unfinished work of earlier plans, newest first."""
        return [folder for path in reversed(self._previous()) if (folder := WorkFolder(path)).exists()]

    def unfinished(self) -> list[WorkFolder]:
        """All work that was begun and not committed."""
        return [self, *self.retired()] if self.exists() else self.retired()

    def start(self, identity: Identity, plan: Plan, sources: Sequence[Source], known_bad: Mapping[bytes, str]) -> None:
        """Write a plan, with every kept shard in its place."""
        for folder in (self._work, self.store, *(self.store / tap for tap in identity.taps)):
            folder.mkdir(parents=True, exist_ok=True)
        for shard in plan.kept:
            self._keep(shard, plan, identity.taps, sources[shard.source])
        for folder in (*(self.store / tap for tap in identity.taps), self.store):
            sync_folder(folder)
        self._write("plan.npz", _npz(row_slot=plan.row_slot, digest=plan.digest, filled=plan.filled))
        fields = {
            "fingerprint": identity.fingerprint.fields,
            "taps": [[name, *tap.shape, tap.dtype] for name, tap in identity.taps.items()],
            "provenance": identity.provenance,
            "rows_sha256": identity.rows_sha256,
            "shard_rows": plan.shard_rows,
            "shards": plan.shards,
            "rows": len(plan.row_slot),
            "known_bad": {digest.hex(): reason for digest, reason in known_bad.items()},
        }
        self._write("plan.json", canonical(fields))
        sync_folder(self.path)

    def _keep(self, shard: KeptShard, plan: Plan, taps: Mapping[str, TapSpec], source: Source) -> None:
        assert isinstance(source.rows, ZarrRows)
        old = slice(shard.source_number * plan.shard_rows, (shard.source_number + 1) * plan.shard_rows)
        for tap in taps:
            link_or_copy(
                source.rows.shards.path(tap, shard.source_number), self.shard(tap, shard.number), self.scratch("link")
            )
        checksums = np.stack([source.checksums[tap][old] for tap in taps])
        self.finish(shard.number, ShardRecord(source.extent[old], checksums, {}))

    def fields(self) -> dict[str, JSON]:
        """What `plan.json` says."""
        found = load_json(self.plan.read_bytes(), str(self.plan))
        assert isinstance(found, dict)
        return found

    def load(self) -> tuple[Identity, Plan, dict[bytes, str]]:
        """Identity, plan, and reasons by digest of pixels known to give no feature.

        Raises:
            FormatError: The plan is damaged.
        """
        try:
            fields = self.fields()
            taps = {name: TapSpec(*shape) for name, *shape in fields["taps"]}
            identity = Identity(Fingerprint(fields["fingerprint"]), taps, fields["provenance"], fields["rows_sha256"])
            arrays = _load_npz(self._work / "plan.npz")
            plan = Plan(fields["shard_rows"], arrays["row_slot"], arrays["digest"], arrays["filled"], ())
            return identity, plan, {bytes.fromhex(key): reason for key, reason in fields["known_bad"].items()}
        except _UNREADABLE as error:
            message = f"{self.path} is damaged ({error}); delete it and run the same command again"
            raise FormatError(message) from error

    def finish(self, number: int, record: ShardRecord) -> None:
        """Record that a shard's files are whole, synced and in place."""
        set_aside = canonical({str(slot): reason for slot, reason in record.set_aside.items()})
        data = _npz(extent=record.extent, checksums=record.checksums, set_aside=np.frombuffer(set_aside, np.uint8))
        self._write(f"shard-{number}.npz", data)

    def finished(self) -> set[int]:
        """Numbers of the finished shards."""
        return {int(path.stem.removeprefix("shard-")) for path in self._work.glob("shard-*.npz")}

    def is_finished(self, number: int) -> bool:
        """Whether a shard is finished, or the whole store is."""
        return (self._work / f"shard-{number}.npz").exists() or not self.exists()

    def claim_file(self, number: int) -> Path:
        """The file whose lock says that a process is at work on a shard."""
        return self._work / f"claim-{number}"

    def drop_torn(self, plan: Plan, taps: Mapping[str, TapSpec]) -> None:
        """Take shards for unfinished whose record cannot be read, or whose files have not the size that it calls for.

        Their bytes are not read here: a bit that flips shows when the store is verified or the row is read.
        """
        for number in self.finished():
            try:
                present = self.record(number).extent[:, 0] > 0
                places = int(stored_places(present, max(len(present), 1))[0])
                sizes = {
                    self.shard(tap, number): shard_bytes(places, taps[tap].row_bytes, plan.shard_rows) for tap in taps
                }
                whole = not places or all(path.stat().st_size == size for path, size in sizes.items())
            except (FormatError, FileNotFoundError):
                whole = False
            if not whole:
                (self._work / f"shard-{number}.npz").unlink()

    def record(self, number: int) -> ShardRecord:
        """What is known of a finished shard.

        Raises:
            FormatError: Its record is damaged.
        """
        path = self._work / f"shard-{number}.npz"
        try:
            arrays = _load_npz(path)
            reasons = load_json(arrays["set_aside"].tobytes(), str(path))
            return ShardRecord(arrays["extent"], arrays["checksums"], {int(key): text for key, text in reasons.items()})
        except _UNREADABLE as error:
            message = f"{path} is damaged ({error}); run the same command again, which encodes that shard again"
            raise FormatError(message) from error

    def seal(self, root: bytes) -> None:
        """Remember the finished `store/` and its root, to know after a stop whether it still lies there."""
        self._write("sealed", f"{hashlib.sha256(root).hexdigest()}\n{folder_inode(self.store)}".encode())

    def source(self) -> Source:
        """The finished shards, to take features from."""
        identity, plan, bad = self.load()
        extent, checksums, set_aside = self.collect(plan, identity.taps)
        return Source(
            taps=identity.taps,
            shard_rows=plan.shard_rows,
            digest=plan.digest,
            extent=extent,
            checksums=checksums,
            set_aside={**bad, **{plan.digest[slot].tobytes(): reason for slot, reason in set_aside.items()}},
            rows=ZarrRows(self.store, identity.taps, plan.shard_rows, extent[:, 0] > 0),
        )

    def rows(self, plan: Plan, taps: Mapping[str, TapSpec]) -> ZarrRows:
        """The bytes of the rows of finished shards."""
        extent, _, _ = self.collect(plan, taps)
        return ZarrRows(self.store, taps, plan.shard_rows, extent[:, 0] > 0)

    def collect(
        self, plan: Plan, taps: Mapping[str, TapSpec]
    ) -> tuple[npt.NDArray[np.float32], dict[str, npt.NDArray[np.uint32]], dict[int, str]]:
        """Records of all finished shards: extents (slots, 2), checksums (slots,) by tap, reasons by slot."""
        extent = np.zeros((plan.slots, 2), np.float32)
        checksums = np.zeros((len(taps), plan.slots), np.uint32)
        set_aside: dict[int, str] = {}
        for number in self.finished():
            record, slots = self.record(number), plan.shard_slots(number)
            extent[slots.start : slots.start + len(record.extent)] = record.extent
            checksums[:, slots.start : slots.start + len(record.extent)] = record.checksums
            set_aside.update((slots.start + within, reason) for within, reason in record.set_aside.items())
        return extent, dict(zip(taps, checksums, strict=True)), set_aside

    def _write(self, name: str, data: bytes) -> None:
        write_file(self._work / name, [data], self.scratch(name))
        sync_folder(self._work)


def _sha256(path: Path) -> str:
    """Hexadecimal digest of a file, empty if there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _npz(**arrays: npt.NDArray[Any]) -> bytes:
    """Arrays as the bytes of an `.npz` file."""
    buffer = io.BytesIO()
    np.savez(buffer, **dict[str, Any](arrays))
    return buffer.getvalue()


def _load_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
