"""`pipeline explain`: pictures of where a run looks, and how well that finds the lesion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import click

from pipeline.cli.options import configured, load
from pipeline.cli.terminal import bars, examples, show


@click.command(
    epilog=examples(
        "pipeline explain",
        "pipeline explain p0007_0 p0012_1 --split val",
        "pipeline explain -c configs/isic2017.yaml --masks data/isic2017/masks",
    )
)
@configured
@click.argument("names", nargs=-1, metavar="[ID]...")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="How many of the surest hits and of the worst misses to show.",
)
@click.option(
    "--masks",
    type=click.Path(path_type=Path, file_okay=False),
    help="A folder of masks named as the samples (a.png, a_mask.png); by default the data set's own, if it has any.",
)
def explain(
    config_path: Path,
    overrides: tuple[str, ...],
    as_json: bool,
    names: tuple[str, ...],
    split: Literal["train", "val", "test"],
    count: int,
    masks: Path | None,
) -> int:
    """Where the run looks: gates and Grad-CAM over the images named, or over the surest hits and the worst misses."""
    from pipeline.stages import commands

    config = load(config_path, overrides)
    with bars() as progress:
        report = commands.explain(config, progress, names=names, split=split, count=count, masks=masks)
    return show(report if as_json else _short(report), as_json)


def _short(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report without what only programs read."""
    folder, found = Path(report["folder"]), report["localisation"]
    short: dict[str, Any] = {
        "sheet": str(folder / report["sheet"]["file"]),
        "pictures": f"{len(report['images'])} in {folder}",
    }
    if painted := report.get("overlay"):
        none = f"{painted['without_masks']} of {painted['images']} images have none"
        short["masks"] = f"{painted['masks']:.1f} on an image in the mean; {none}"
        if hit := painted["localisation"]:
            short["best mask against the lesion"] = "  ".join(
                f"{name} {hit[key]['value']:.3f} ({hit[key]['low']:.3f} to {hit[key]['high']:.3f})"
                for key, name in (("best_iou", "IoU"), ("recall", f"found at {hit['at']:g}"))
            )
    if found is None:
        return short | {"localisation": "no masks"}
    chance = found["chance"]
    return short | {
        f"where the lesion is ({found['images']} images)": {
            "chance": f"AUC .500  mass {chance['mass']:.3f}  lift 1.000  pointing {chance['pointing']:.3f}",
            **{
                name: "  ".join(
                    f"{'AUC' if score == 'auc' else score} {values[score]['value']:.3f} "
                    f"({values[score]['low']:.3f} to {values[score]['high']:.3f})"
                    for score in ("auc", "mass", "lift", "pointing")
                )
                for name, values in found["maps"].items()
            },
        },
        "the same gates with weights just drawn, AUC by seed": found["untrained_auc"],
    }
