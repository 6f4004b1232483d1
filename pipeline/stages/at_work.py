"""Who does the work of stage one: this process, or a Ray cluster that it is connected to for as long as that lasts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.cluster import connected
from pipeline.config.schema import Config
from pipeline.encoders import Described, family_of
from pipeline.errors import ConfigError
from pipeline.extract.on_ray import OnRay
from pipeline.progress import Progress
from pipeline.stages import clocks
from pipeline.stages.inputs import behind_url, build_encoder, plain_encoder, workers
from pipeline.stages.nodes import need_of


@contextmanager
def at_work(
    config: Config, progress: Progress, *, strict: bool, ray: str | None
) -> Iterator[tuple[Described, OnRay | None]]:
    """The encoder, and the cluster that encodes with one like it; None where this process does.

    Args:
        config: The configuration.
        progress: Told what slows the work down or keeps it waiting.
        strict: Stop at the first bad image.
        ray: Address of a cluster; None for this process.

    Raises:
        ConfigError: A cluster is asked for under `torchrun`, or the extra is not installed.
        ClusterError: There is no cluster at the address.
    """
    if ray is None:
        encoder = build_encoder(config, new_images=False)
        slow = clocks.slow_precision(config.encoder.precision, str(encoder.device))
        if slow:
            progress("precision", 1, 1, note=slow)
        yield encoder, None
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = "--ray and torchrun both share the work out: start one process with --ray, or leave --ray out"
        raise ConfigError(message)
    plain = plain_encoder(config)
    knows_masks = family_of(config.encoder.name).reads == "mask"  # this process reads them all, for their digest
    told = build_encoder(config, new_images=False) if knows_masks else plain
    with connected(ray) as cluster:
        yield (
            told,
            OnRay(
                cluster,
                plain,
                need_of(config),
                threads=config.resources.workers or (workers(config) if behind_url(config) else None),
                batch_size=config.resources.batch_size,
                strict=strict,
                tell=lambda said: progress("ray", 1, 1, note=said),
            ),
        )
