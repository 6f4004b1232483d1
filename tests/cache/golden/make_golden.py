"""Writes the golden stores, of which those of a released version are never changed.

`python -m tests.cache.golden.make_golden`
"""

from __future__ import annotations

from pathlib import Path

import cache
from tests.cache.making import FINGERPRINT, SHARD_MIB, begin, row, rows, write

_FIRST_TAPS = {"neck": cache.TapSpec(4, 3, 3, "float16"), "late": cache.TapSpec(2, 2, 3, "float32")}
_ALL_TAPS = {
    **_FIRST_TAPS,
    "neck@hflip": cache.TapSpec(4, 3, 3, "float16"),
    "image": cache.TapSpec(3, 5, 5, "uint8"),
}
_PACKED_TAPS = {
    **_ALL_TAPS,
    "whole": cache.TapSpec(4, 3, 3, "int8"),
    "brain": cache.TapSpec(2, 2, 3, "bfloat16"),
}
TAPS = {  # by version of the format
    1: _FIRST_TAPS,
    2: _ALL_TAPS,
    3: _ALL_TAPS,
    4: _PACKED_TAPS,
}
WRITTEN = (3, 4)
"""Versions that are written today, the newer one where a tap calls for it."""
HERE = Path(__file__).parent
FIRST = rows(range(7))
WANTED = [*rows(range(1, 6)), row(3, "the pixels of image 3.png"), *rows([20, 21])]
"""What the golden stores hold: dead rows, a duplicate, a sample set aside, a shard that was added later."""
BAD = 21
STORY = {"license": "CC0-1.0", "data_set": "made of noise", "created": "2025-01-01"}
LABELS = cache.Labels(("round", "lobed"), (0, 1, 0, 1, 0, 0, 1, 1), ("train",) * 6 + ("val", "test"))


def main(folder: Path = HERE) -> None:
    """Write both formats into a folder, in every version that is written today."""
    for version, suffix in ((version, suffix) for version in WRITTEN for suffix in ("zarr", "h5")):
        taps = TAPS[version]
        path = folder / f"version-{version}.{suffix}"
        for wanted, labels in ((FIRST, None), (WANTED, LABELS)):
            with begin(
                path, wanted, fingerprint=FINGERPRINT, taps=taps, shard_mib=SHARD_MIB, provenance=STORY, labels=labels
            ) as writer:
                for plan in writer.pending:
                    bad = {i: "the feature is not finite" for i in plan.rows if wanted[i] == row(BAD)}
                    write(writer, plan, wanted, taps, set_aside=bad)
                writer.commit()


if __name__ == "__main__":
    main()
