"""The workers of a run as they see each other: a process group, or one process alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class Peers:
    """Collective operations over the default process group where one is initialised, else over this process alone."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all workers, in place, the same bits on each."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every worker's value, in the order of ranks, on each worker."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()
