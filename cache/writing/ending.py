"""The last lines of a store: index, metadata of the arrays, and the root that makes them one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.description import IDS, Description
from cache.durable import sync_folder, write_file
from cache.errors import IncompleteRowsError
from cache.formats.second_copy import SPARE, encode_spare
from cache.formats.zarr_layout import ids_chunk, index_chunk_name, metadata_files, root_json, with_checksum
from cache.index import Row, describe_entry, encode_ids, encode_json, index_of
from cache.writing.partial import WorkFolder
from cache.writing.plan import NOWHERE, Plan
from cache.writing.same_work import Identity

Arrays = Mapping[str, npt.NDArray[Any]]


def finish_store(
    work: WorkFolder, identity: Identity, slots: int, shard_rows: int, arrays: Arrays, version: int
) -> None:
    """Complete the Zarr folder in `work.store`, whose shards are all there; the root comes last.

    Args:
        work: The store in the making.
        identity: Fingerprint, taps and provenance.
        slots: Places in each tap's array.
        shard_rows: Slots in a shard.
        arrays: The index by name.
        version: Of the format.

    Raises:
        NoSpaceError: The disk is full.
    """
    description = Description(
        fingerprint=identity.fingerprint,
        taps=identity.taps,
        rows=len(arrays["slot"]),
        slots=slots,
        shard_rows=shard_rows,
        index={name: describe_entry(array) for name, array in arrays.items()},
        provenance=identity.provenance,
        version=version,
    )
    _write_files(work.store, store_files(description, arrays), work.scratch("metadata"))
    root = root_json(description)
    (work.store / "zarr.json").unlink(missing_ok=True)  # of a commit that was stopped: not what the seal is about
    sync_folder(work.store)
    work.seal(root)
    write_file(work.store / "zarr.json", [root], work.scratch("metadata"))
    sync_folder(work.store)


def store_files(description: Description, arrays: Arrays) -> dict[str, bytes]:
    """Content of every file of a Zarr folder but its root and its shards, by path in the folder.

    Raises:
        UntrustedStoreError: The arrays are none that a store can have.
    """
    files = {f"{path}/zarr.json": content for path, content in metadata_files(description).items()}
    stored = {**{name: arrays[name] for name in description.index}, SPARE: encode_spare(description, arrays, {})}
    for name, array in stored.items():
        chunk = f"index/{name}/{index_chunk_name(array.shape)}"
        files[chunk] = with_checksum(np.ascontiguousarray(array).tobytes())
    if description.version > 2:
        index = index_of(description, arrays, "the index")
        files[f"{IDS}/c.0"] = ids_chunk(index.ids, index.slot, description.slots)
    if "card" in arrays:
        files["README.md"] = arrays["card"].tobytes()
    return files


def _write_files(store: Path, files: Mapping[str, bytes], scratch: Path) -> None:
    """Write files into a folder, all synced, their folders too."""
    for name, data in files.items():
        path = store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, [data], scratch)
    for folder in {parent for name in files for parent in (store / name).parents if parent.is_relative_to(store)}:
        sync_folder(folder)


def collect_index(
    work: WorkFolder, identity: Identity, plan: Plan, rows: Sequence[Row], known_bad: Mapping[bytes, str]
) -> tuple[dict[str, npt.NDArray[Any]], list[int]]:
    """The index of a store whose shards are all finished, by name, and which of the rows are in it.

    Args:
        work: The store in the making.
        identity: Its taps.
        plan: Slot of every row.
        rows: The rows that were asked for.
        known_bad: Reasons by digest of pixels that were known to give no feature.

    Raises:
        IncompleteRowsError: Every row is set aside.
    """
    extent, checksums, found_bad = work.collect(plan, identity.taps)
    present = extent[:, 0] > 0
    reasons = {**known_bad, **{plan.digest[slot].tobytes(): reason for slot, reason in found_bad.items()}}
    stored = [slot != NOWHERE and bool(present[slot]) for slot in plan.row_slot.tolist()]
    if not any(stored):
        reason = next(iter(reasons.values()), "")
        message = f"{work.path}: all {len(rows)} rows are set aside ({reason}); there is nothing to store"
        raise IncompleteRowsError(message)
    set_aside = [
        {"id": row.id, "digest": row.digest.hex(), "reason": reasons[row.digest]}
        for row, good in zip(rows, stored, strict=True)
        if not good
    ]
    arrays: dict[str, npt.NDArray[Any]] = {
        "ids": encode_ids([row.id for row, good in zip(rows, stored, strict=True) if good]),
        "set_aside": encode_json(set_aside),
        "slot": plan.row_slot[stored],
        "digest": np.where(present[:, None], plan.digest, np.uint8(0)),
        "extent": extent,
        **{f"crc32c/{tap}": checksums[tap] for tap in identity.taps},
    }
    return arrays, np.flatnonzero(stored).tolist()
