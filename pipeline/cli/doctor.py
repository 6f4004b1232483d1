"""`pipeline doctor`: what this machine can do, and what that means for an experiment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from pipeline.cli.options import configured, load
from pipeline.cli.tables import print_table
from pipeline.cli.terminal import DONE, bars, examples, say, show


@click.command(
    epilog=examples("pipeline doctor", "pipeline doctor -c configs/breastmnist.yaml", "pipeline doctor --json")
)
@configured
def doctor(config_path: Path, overrides: tuple[str, ...], as_json: bool) -> int:
    """Software, devices, room and weights of this machine, and how long an experiment takes: in half a minute."""
    named = click.get_current_context().get_parameter_source("config_path") is not ParameterSource.DEFAULT
    config = load(config_path, overrides) if named or overrides or config_path.is_file() else None
    from pipeline.stages.doctor import examine

    with bars() as progress:
        report = examine(config, progress)
    report = {"configuration": str(config_path) if config is not None else None, **report}
    if as_json:
        return show(report, as_json=True)
    _print(report)
    return DONE


def _print(report: dict[str, Any]) -> None:
    software, processor = report["software"], report["processor"]
    say("software   " + ", ".join(f"{name} {version}" for name, version in software.items()))
    say(f"processor  {processor['name']}, {processor['cores']} cores for this process")
    for device in report["devices"]:
        say(f"device     {device['name']}, {device['memory_gib']:.0f} GiB, {', '.join(device['precisions'])}")
    if not report["devices"]:
        say("device     no GPU that torch can use")
    memory, disk = report["memory_gib"], report["disk"]
    if memory:
        say(f"memory     {memory['available']:.0f} of {memory['total']:.0f} GiB are free")
    say(f"disk       {disk['free_gib']:.0f} of {disk['total_gib']:.0f} GiB are free at {disk['path']}")
    there = [name for name, installed in report["extras"].items() if installed]
    missing = [name for name, installed in report["extras"].items() if not installed]
    say(f"extras     {', '.join(there) or 'none'}" + (f"; not installed: {', '.join(missing)}" if missing else ""))
    for weights in report["weights"]:
        said = f"sha256 {weights['sha256'][:12]}" if weights["found"] else "not here"
        say(f"weights    {weights['name']}: {said}")
    if not report["weights"]:
        say("weights    none that are published are here")
    rows = [
        [name, f"{1000 * seconds:,.3g}", f"{1 / seconds:,.3g}"]
        for name, seconds in report["clocks"].items()
        if isinstance(seconds, float) and name != "bfloat16_over_float32"
    ]
    say("")
    print_table(("clock", "ms an image", "images/s"), rows)
    for name, reason in report["clocks"].get("failed", {}).items():
        say(f"{name}: could not be clocked ({reason})")
    say("")
    what = f"for {report['configuration']}" if report["configuration"] else "without a configuration"
    say(f"What that means {what} (clocked in {report['seconds']:.0f} s, good to a factor of about 1.5):")
    for sentence in report["means"]:
        say(f"  {sentence}")
