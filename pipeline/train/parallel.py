"""Training on several devices: who does which part of a batch, and batch norm over all of it.

`torchrun` starts the processes and tells each its place. Each takes its slice of every batch, so the batch size means
the same on any number of processes, and so does the result, to rounding: gradients are averaged and batch norm sees the
whole batch. Gates are computed where their samples are. Every process holds the data once.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """The processes that train one classifier together.

    Attributes:
        rank: This process's place, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes files and reports."""
        return self.rank == 0

    def share(self, positions: Tensor) -> slice:
        """Say which part of a batch (B,) this process takes; the parts differ by one sample at most."""
        count = len(positions)
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, mine: T) -> list[T]:
        """Collect a value from each process, in the order of their ranks."""
        if self.size == 1:
            return [mine]
        everyone: list[T] = [mine] * self.size
        torch.distributed.all_gather_object(everyone, mine)
        return everyone

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def wrap(self, classifier: nn.Module, device: torch.device) -> nn.Module:
        """Give a module that computes as `classifier`, and whose gradients are the mean over all processes."""
        if self.size == 1:
            return classifier
        return DistributedDataParallel(
            classifier, device_ids=[device] if device.type == "cuda" else None, broadcast_buffers=False
        )


def join(device: torch.device) -> tuple[Team, torch.device]:
    """Find this process's team from the environment that `torchrun` sets, and its own device."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Team(), device
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(torch.distributed.destroy_process_group)
    return Team(torch.distributed.get_rank(), size), device


class TeamBatchNorm(nn.BatchNorm2d):
    """Batch norm whose mean and variance are of the samples of all processes; torch's own such layer needs a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W), B being this process's part of the batch."""
        if not self.training:
            return super().forward(x)
        values = x.float()
        count = _total(values.new_tensor(values.numel() / values.shape[1]))
        mean = _total(values.sum(dim=(0, 2, 3))) / count
        centred = values - mean[:, None, None]
        variance = _total(centred.square().sum(dim=(0, 2, 3))) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        normalised: Tensor = centred * scale[:, None, None] + self.bias[:, None, None]
        return normalised.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


def share_batch_norms(module: nn.Module) -> None:
    """Replace every batch norm in a module by one over all processes; parameters and state are kept."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            shared = TeamBatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
            shared.load_state_dict(child.state_dict())
            setattr(module, name, shared)
        else:
            share_batch_norms(child)


def _total(mine: Tensor) -> Tensor:
    """Sum a tensor over all processes; differentiable."""
    total: Tensor = all_reduce(mine)  # type: ignore[no-untyped-call]
    return total
