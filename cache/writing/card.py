"""The card of a store: what a stranger should know before using it, as Markdown with front matter.

It is made from the fingerprint, the taps and the provenance alone. Of the provenance it uses `license` (of the data),
`data_set`, `citation` and the rounding errors, where they are given.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from cache.description import TapSpec, arrays_of, version_for
from cache.fingerprint import JSON, Fingerprint

ROUNDING = "rounding_error"
"""Key of the provenance: by packed tap, the error of its rows (see `cache.packing`)."""

_LOAD = """```python
import cache

store = cache.open_store("PATH OR URL OF THIS STORE")
features = store.read([0, 1, 2])  # by tap, (rows, C, h, w)
```

Without that package: `zarr.open_group` or `h5py.File` read the same arrays; `index/slot` maps a row to its place."""


def _caution(taps: Mapping[str, TapSpec]) -> str:
    """What a person should know before handing the store on."""
    pixels = [f"`{name}`" for name, tap in taps.items() if tap.holds_pixels]
    outlines = [f"`{name}`" for name, tap in taps.items() if not (tap.holds_features or tap.holds_pixels)]
    if not pixels:
        shown = (
            f" Of {' and '.join(outlines)} one sees outlines of what was found, and no grey value." if outlines else ""
        )
        return f"They are no images, but may tell much about them: treat them under the licence of the data.{shown}"
    return (
        f"**This store holds the images themselves**, reduced, in {' and '.join(pixels)}: whoever has it sees them, "
        "and they may identify people. Hand it on only where the images may go."
    )


_ROUNDED = (
    "The rounding error is the root mean square difference from the features before rounding, over their standard "
    "deviation, as the root mean square of all rows. Features of type int8 are whole numbers, to be multiplied by the "
    "scale of their row and channel in the array `TAP.scale`; bfloat16 is stored as its bits."
)


def _row_bytes(name: str, tap: TapSpec) -> int:
    """Bytes of a row of a tap, with what lies beside it."""
    return sum(array.row_bytes for array in arrays_of({name: tap}).values())


def _spell_error(errors: Mapping[str, float], name: str) -> str:
    return f"{errors[name]:.2%}" if name in errors else "none"


def rounding_of(provenance: Mapping[str, JSON]) -> dict[str, float]:
    """The rounding error of each packed tap that a provenance tells, which may be a stranger's and anything."""
    told = provenance.get(ROUNDING)
    if not isinstance(told, Mapping):
        return {}
    return {tap: error for tap, error in told.items() if type(error) in (int, float)}


def render_card(
    fingerprint: Fingerprint, taps: Mapping[str, TapSpec], rows: int, provenance: Mapping[str, JSON]
) -> str:
    """The text of `README.md`.

    Args:
        fingerprint: What the features depend on.
        taps: Shape and type by tap name.
        rows: Samples in the store.
        provenance: How it came about.
    """
    fields = fingerprint.fields
    front = {
        "license": provenance.get("license", "unknown"),
        "data_set": provenance.get("data_set", "unknown"),
        "encoder": fields.get("encoder", "unknown"),
        "weights_sha256": fields.get("weights_sha256", "unknown"),
        "fingerprint": fingerprint.digest(),
        "rows": rows,
        "taps": list(taps),
        "feature_store_format": version_for(taps),
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items()]
    total = rows * sum(tap.row_bytes for tap in arrays_of(taps).values()) / 2**20
    errors = rounding_of(provenance)
    table = [
        f"| `{name}` | {tap.channels} x {tap.height} x {tap.width} | {tap.dtype} | {_row_bytes(name, tap) / 1024:.1f} |"
        + (f" {_spell_error(errors, name)} |" if errors else "")
        for name, tap in taps.items()
    ]
    more = (" rounding error |", " --- |") if errors else ("", "")
    head = [f"| tap | C x h x w | type | KiB a row |{more[0]}", f"| --- | --- | --- | --- |{more[1]}"]
    about = [f"- {key.replace('_', ' ')}: `{json.dumps(value)}`" for key, value in sorted(fields.items())]
    citation = str(provenance.get("citation", "Cite the data set and the encoder that these features come from."))
    parts = [
        "\n".join(["---", *lines, "---"]),
        f"# Features of {front['data_set']}",
        f"Features of {rows} images by the frozen encoder `{front['encoder']}`, {total:.1f} MiB. {_caution(taps)}",
        "\n".join([*head, *table]) + (f"\n\n{_ROUNDED}" if errors else ""),
        "## How they were made",
        "\n".join(about) or "The fingerprint is empty.",
        "## How to load them",
        _LOAD,
        "## Citation",
        citation,
    ]
    return "\n\n".join(parts) + "\n"
