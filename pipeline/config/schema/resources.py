"""The section `resources`: what a machine or a cluster offers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.schema.section import Positive, Section


class RayConfig(Section):
    """What `--ray` asks of a cluster: what a worker takes of a node, and how many workers there may be."""

    gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs of a worker; 0.5 shares one between two. Null is 1 where some node has a GPU, else 0."""
    cpus: Annotated[float, Field(gt=0)] | None = None
    """Processors of a worker; null is a fair share of the node beside each GPU, and 1 without GPUs."""
    min: Positive = 1
    """Workers to ask for even while no node has room for them, so that a cluster that can grow does."""
    max: Positive | None = None
    """Workers at most; null is as many as the nodes have room for."""


class Resources(Section):
    """What a machine offers; no result rests on it, so nothing here is a DVC parameter."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    workers: Positive | None = None
    """Decoding threads; null is one for each processor, at most 16, and 16 where the data are behind a URL."""
    batch_size: Positive | None = None
    """Images per call of the encoder at most; null finds it out. `extract` makes equal batches of a full shard."""
    features: Literal["auto", "device", "host", "stream"] = "auto"
    """Where features wait: on the device, in host memory, or in the store; `auto` goes by their size."""
    channels_last: bool = False
    """Another layout of memory, which some GPUs prefer."""
    compile: bool = False
    """Compile the classifier with torch; takes a minute, and pays on long trainings."""
    tensorboard: bool = False
    """Write the history for TensorBoard too (extra `tensorboard`)."""
    ray: RayConfig = RayConfig()
    """What `--ray` asks of a cluster (extra `ray`)."""
