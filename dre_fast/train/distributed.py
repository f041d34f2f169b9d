"""The processes of a run, as torchrun starts them: what they add up, gather and wait for.

Every process encodes its own slides and sees the loss of the whole batch: outputs are gathered, and those of the other
processes enter as constants. The gradient that a process gets is then that of the whole loss through its own slides,
and the sum over the processes is the gradient one process would have got, to round-off. So the gradients are summed,
in one message a step, rather than averaged as ``DistributedDataParallel`` does; that a process has no slide in the
last batch, or goes through its tiles in two passes, makes no difference.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dre_fast.nn.model import SlideOutput

T = TypeVar("T")
# The others wait while the first process decodes a cohort into its cache, or one fills a bank of more tiles. torch's
# own ten to thirty minutes would end such runs; that a process has died is seen, and said, by torchrun.
LONGEST_WAIT = timedelta(days=2)


class Group:
    """The processes of a run; a group of one sends nothing.

    Attributes:
        rank, world: of this process, and how many there are.
        device: where this process computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.world = 0, 1
        self._ours = False
        started = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if not started and not dist.is_initialized():
            return
        if not dist.is_initialized():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT
            )
            self._ours = True
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks for all."""
        return self.rank == 0

    def close(self) -> None:
        """Leave, once all are here: a process that leaves while others still talk would end them."""
        if self._ours and dist.is_initialized():
            gc.collect()  # gloo's threads must be gone, with all that holds the group, before the process may exit
            dist.barrier()
            dist.destroy_process_group()
            self._ours = False

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def first_then_others(self, work: Callable[[], T]) -> T:
        """What ``work`` gives, done by the first process before the others begin: it may write files they read."""
        if self.first:
            done = work()
            self.wait()
            return done
        self.wait()
        return work()

    def from_first(self, value: T) -> T:
        """What the first process holds, on every one: plain values or tensors."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def everyones(self, value: T) -> list[T]:
        """What each process holds, by rank, on every one: plain values or tensors in host memory."""
        if self.world == 1:
            return [value]
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def rows(self, own: Tensor) -> Tensor:
        """Rows [b_r, ...] of every process in one [B, ...], by rank; the gradient goes to one's own alone.

        Args:
            own: any number of rows, none included; float dtypes and integers.
        """
        return self._join(own, self._counts(len(own))) if self.world > 1 else own

    def _join(self, own: Tensor, counts: list[int]) -> Tensor:
        most = max(counts)
        padded = own.new_zeros(most, *own.shape[1:])
        padded[: len(own)] = own.detach()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        gathered = [own if r == self.rank else part[:n] for r, (part, n) in enumerate(zip(parts, counts))]
        return torch.cat(gathered)

    def numbers(self, own: Tensor) -> Tensor:
        """Integers int64 [b_r] in host memory, of all processes in one [B], by rank."""
        return torch.cat(self.everyones(own)) if self.world > 1 else own

    def outputs(self, out: SlideOutput) -> SlideOutput:
        """The outputs of all processes for the slides of a batch, by rank; one's own with their gradient.

        In fp32, as the losses take them: under autocast a process without slides has no other dtype to send.
        ``residuals`` and ``live`` stay those of this process: they are not needed by any loss.
        """
        if self.world == 1:
            return out
        counts = self._counts(len(out.embedding))
        return SlideOutput(
            self._join(out.embedding.float(), counts),
            None if out.report is None else self._join(out.report.float(), counts),
            {name: self._join(logits.float(), counts) for name, logits in out.logits.items()},
            out.residuals,
            out.live,
        )

    @torch.no_grad()
    def add_gradients(self, parameters: Sequence[nn.Parameter], shared: Sequence[nn.Parameter]) -> None:
        """Sum the gradients over the processes, in one message.

        A parameter that had no gradient in any process still has none afterwards.

        Args:
            parameters: those that learn, the same ones on every process.
            shared: those of them whose gradient every process knows whole, of the loss itself: it is averaged.
        """
        if self.world == 1:
            return
        whole = {id(p) for p in shared}
        learn = [p for p in parameters if p.requires_grad]
        parts = []
        for p in learn:
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            parts.append((grad / self.world if id(p) in whole else grad).reshape(-1).float())
        had = torch.tensor([p.grad is not None for p in learn], dtype=torch.float32, device=self.device)
        message = torch.cat([had, *parts])
        dist.all_reduce(message)
        had, flat = message[: len(learn)].cpu(), message[len(learn) :]
        for p, some, part in zip(learn, had.tolist(), flat.split([p.numel() for p in learn])):
            # in the layout of p (channels last, say): torch's fused optimisers go through memory, whatever the strides
            p.grad = torch.empty_like(p).copy_(part.view_as(p)) if some else None

    @torch.no_grad()
    def same_start(self, model: nn.Module) -> None:
        """Give every process the first one's parameters and buffers, except those of the bank."""
        if self.world == 1:
            return
        for name, tensor in model.state_dict().items():
            if not name.startswith("bank."):
                dist.broadcast(tensor, src=0)

    @torch.no_grad()
    def average_statistics(self, module: nn.Module) -> None:
        """Give every process the mean of the floating point buffers: the running statistics of batch normalisation."""
        buffers = [b for b in module.buffers() if b.is_floating_point()]
        if self.world == 1 or not buffers:
            return
        flat = torch.cat([b.reshape(-1).float() for b in buffers]) / self.world
        dist.all_reduce(flat)
        for b, part in zip(buffers, flat.split([b.numel() for b in buffers])):
            b.copy_(part.view_as(b))

    def _counts(self, own: int) -> list[int]:
        counts = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        counts[self.rank] = own
        dist.all_reduce(counts)
        return counts.tolist()


def own_device(name: str) -> str:
    """``auto`` and ``cuda`` name the GPU of this process where torchrun started several on a machine."""
    local = os.environ.get("LOCAL_RANK")
    if local is None or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{local}"
