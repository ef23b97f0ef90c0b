"""Several processes that train one model (``torchrun``, ``accelerate launch``).

Every process holds the model, draws the same batch, and embeds its share of the texts; the embeddings are gathered, so that each
computes the loss of the whole batch, and the gradients of the shares are summed. That is the gradient of one process with the
whole batch, dropout in stage 1 apart, whose masks are each process's own: in-batch negatives and groups reach across processes, as
in R-GRPO. Process 0, the owner, holds the index, logs,
evaluates and writes; the others wait for it as long as it takes. Every process keeps the whole model, as the owner embeds the catalog
by itself, and the optimiser's moments of its own share of the weights.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import AdamW, Optimizer

T = TypeVar("T")
_PATIENCE = timedelta(days=365)  # the owner may evaluate for hours; torchrun ends the others when a process dies


class World:
    """The processes of a run; one alone where the program was not started by a launcher.

    >>> world = World()
    >>> world.rank, world.size, world.owner, world.share(5)
    (0, 1, True, slice(0, 5, None))
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    @classmethod
    def join(cls) -> World:
        """Join the other processes where a launcher has started several (its variables ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``):
        NCCL with one GPU a process where there are GPUs, else gloo on the CPU.

        Raises ValueError when there are more processes on the machine than GPUs.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
            local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
            if gpus and local >= gpus:
                raise ValueError(
                    f"process {local} on a machine with {gpus} GPUs: start as many processes as there are GPUs"
                )
            if gpus:
                torch.cuda.set_device(local)
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_PATIENCE)
            atexit.register(_leave)
        return cls()

    @property
    def owner(self) -> bool:
        """Whether this process holds the index, logs, evaluates and writes."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The part of ``count`` rows that this process works on."""
        return slice(*self._cuts(count)[self.rank : self.rank + 2])

    def _cuts(self, count: int) -> list[int]:
        return [count * part // self.size for part in range(self.size + 1)]

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """The ``count`` rows of all processes from the shares of each, ``[count, ...]``."""
        if self.size == 1:
            return rows
        cuts = self._cuts(count)
        sizes = [end - start for start, end in pairwise(cuts)]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # gloo gathers equal sizes alone
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # this share had no text for it
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def adamw(self, parameters: Sequence[torch.nn.Parameter], learning_rate: float) -> Optimizer:
        """AdamW without weight decay; fused, which is several times faster on the large tables of static embeddings. Of several
        processes each keeps the moments of its share of the weights, half of what a weight needs in training (ZeRO, stage 1;
        Rajbhandari et al., SC 2020)."""
        if self.size == 1:
            return AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(parameters, AdamW, lr=learning_rate, weight_decay=0.0, fused=True)

    def collect(self, optimizer: Optimizer) -> None:
        """Bring the moments of all processes to the owner, whose ``state_dict`` is then whole."""
        if self.size > 1:
            optimizer.consolidate_state_dict(to=0)  # type: ignore[attr-defined]

    def from_owner(self, value: T) -> T:
        """The owner's value, in every process."""
        if self.size == 1:
            return value
        box: list[Any] = [value if self.owner else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    def tensor_from_owner(self, value: Tensor | None, device: torch.device) -> Tensor:
        """The owner's tensor, in every process, on ``device``."""
        shape, dtype = self.from_owner((value.shape, value.dtype) if value is not None else None) or ((), None)
        tensor = value.to(device) if value is not None else torch.empty(shape, dtype=dtype, device=device)
        if self.size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def owner_first(self) -> Iterator[None]:
        """What the owner writes in this block, the others find when they enter it."""
        if not self.owner:
            self.wait()
        yield
        if self.owner:
            self.wait()


def _leave() -> None:
    """End the group before the interpreter does: gloo's threads, still running then, abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
