"""The feature store: features of a frozen encoder on disk, read at memory speed.

>>> import hashlib, tempfile
>>> from pathlib import Path
>>> import numpy as np
>>> import cache
>>> path = Path(tempfile.mkdtemp()) / "demo.zarr"
>>> images = {name: np.full((8, 8), grey, np.uint8) for grey, name in enumerate(["a.png", "b.png", "c.png"])}
>>> rows = [cache.Row(name, hashlib.sha256(image).digest()) for name, image in images.items()]
>>> taps = {"neck": cache.TapSpec(channels=2, height=4, width=4, dtype="float16")}
>>> with cache.create_store(path, fingerprint=cache.Fingerprint({"encoder": "mean"}), taps=taps, rows=rows) as writer:
...     for plan in writer.pending:
...         neck = np.stack([np.full((2, 4, 4), list(images.values())[row].mean(), "float16") for row in plan.rows])
...         writer.write(plan, {"neck": neck}, extents=np.ones((len(plan.rows), 2), "float32"))
...     store = writer.commit()
>>> store.ids
('a.png', 'b.png', 'c.png')
>>> store.read([2, 0])["neck"][:, 0, 0, 0]
array([2., 0.], dtype=float16)
>>> store["b.png"]["neck"].shape, store[1:]["neck"].shape
((2, 4, 4), (2, 2, 4, 4))
>>> cache.verify(path)
()
"""

from cache.care.convert import convert_store, keyed_pseudonyms, pool_steps, pseudonymise_store
from cache.care.diff import StoreDifference, TapDifference, diff_stores
from cache.care.info import StoreInfo, info
from cache.care.inspect import Inspection, TapReport, Twins, inspect_store
from cache.care.relation import refuse_another
from cache.care.repair import repair_store
from cache.care.verify import Damage, verify
from cache.description import FORMAT_VERSION, SCALE, TapSpec, arrays_of, taps_of, type_for
from cache.errors import (
    DamagedRowError,
    Difference,
    FingerprintMismatchError,
    FormatError,
    IncompleteRowsError,
    NoSpaceError,
    NoSuchRowError,
    StoreError,
    StoreLockedError,
    StoreNotFoundError,
    UntrustedStoreError,
)
from cache.fingerprint import Fingerprint
from cache.index import Row
from cache.labels import Labels
from cache.packing import pack
from cache.reading.reader import Store, open_store
from cache.roundings import Roundings
from cache.sharing.manifest import Manifest
from cache.sharing.share import make_manifest, pull_store, push_store
from cache.sharing.strangers import are_pseudonyms, what_strangers_read
from cache.writing.join import StoreWorker, join_store
from cache.writing.shards import ShardPlan
from cache.writing.writer import StoreWriter, create_store

__all__ = [
    "FORMAT_VERSION",
    "SCALE",
    "Damage",
    "DamagedRowError",
    "Difference",
    "Fingerprint",
    "FingerprintMismatchError",
    "FormatError",
    "IncompleteRowsError",
    "Inspection",
    "Labels",
    "Manifest",
    "NoSpaceError",
    "NoSuchRowError",
    "Roundings",
    "Row",
    "ShardPlan",
    "Store",
    "StoreDifference",
    "StoreError",
    "StoreInfo",
    "StoreLockedError",
    "StoreNotFoundError",
    "StoreWorker",
    "StoreWriter",
    "TapDifference",
    "TapReport",
    "TapSpec",
    "Twins",
    "UntrustedStoreError",
    "are_pseudonyms",
    "arrays_of",
    "convert_store",
    "create_store",
    "diff_stores",
    "info",
    "inspect_store",
    "join_store",
    "keyed_pseudonyms",
    "make_manifest",
    "open_store",
    "pack",
    "pool_steps",
    "pseudonymise_store",
    "pull_store",
    "push_store",
    "refuse_another",
    "repair_store",
    "taps_of",
    "type_for",
    "verify",
    "what_strangers_read",
]
