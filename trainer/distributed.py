"""The ranks of a run: who they are, and the few things that they tell each other.

Every rank makes the same calls in the same order; each call waits for all the others. Alone, a
world of one rank starts nothing and every call gives back what it was given.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from types import TracebackType
from typing import Any, Final

import torch
from torch import distributed, nn
from torch.autograd.function import once_differentiable

from shards.errors import BadInput

TIMEOUT_S: Final = 600.0

_NUMBERS: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_ADDRESS: Final = ("MASTER_ADDR", "MASTER_PORT")
_GROUP_BYTES: Final = 32 << 20  # of gradients that are summed at a time


@dataclass(frozen=True, slots=True)
class World:
    """One rank's view of all ranks; a context that leaves the process group at its end.

    `local_rank` counts the ranks of one machine, and `device` is this rank's own. A call fails
    with RuntimeError where a rank is lost: at once if its connection breaks, else after the
    time that `start_world` was given. (NCCL then ends the process itself.)
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def gather(self, x_BD: torch.Tensor) -> torch.Tensor:
        """(size · B, …): the rows of all ranks, in the order of ranks.

        B is the same on all ranks. Differentiable, on all ranks or on none: a rank's rows get the
        gradients of all ranks' use of them.
        """
        if self.size == 1:
            return x_BD
        gathered: torch.Tensor = _Gather.apply(x_BD, self)  # type: ignore[no-untyped-call]  # torch's
        return gathered

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of `x` over all ranks, without its gradient, on the rank's device."""
        x = x.detach().to(self.device, copy=True)
        if self.size > 1:
            distributed.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        return bool(self.total(torch.tensor(int(flag))).item())

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every rank the sum of all ranks' gradients.

        A rank without one adds zeros; a parameter that no rank has a gradient of stays without.
        """
        if self.size > 1:
            for group in _groups(p for p in parameters if p.requires_grad):
                _sum_gradients(group)

    @torch.no_grad()
    def broadcast(self, module: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0."""
        if self.size > 1:
            for x in chain(module.parameters(), module.buffers()):
                sent = x.contiguous()
                distributed.broadcast(sent, src=0)
                x.copy_(sent)

    def stop(self) -> None:
        """Leave the other ranks; all leave together."""
        if self.size > 1:
            distributed.destroy_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # NCCL waits for all ranks when it stops. One that failed must end at once instead, so that
        # its error is seen and torchrun ends the others.
        if kind is None or self.device.type == "cpu":
            self.stop()


def start_world(device: torch.device, *, timeout_s: float = TIMEOUT_S) -> World:
    """The ranks that torchrun started, joined over NCCL on CUDA and over gloo on the CPU.

    Started without torchrun, a process is alone. `timeout_s` bounds the wait for the others, here
    and in every later call. Raises BadInput where torchrun's variables are incomplete or a machine
    has more ranks than GPUs.
    """
    if not any(name in os.environ for name in _NUMBERS):
        return World(device)
    rank, size, local_rank = _read_environment()
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise BadInput(
                "LOCAL_RANK",
                expected=f"a rank for each of the {torch.cuda.device_count()} GPUs here at most",
                found=f"rank {local_rank}, counted from 0",
                remedy="give torchrun --nproc-per-node as many ranks as there are GPUs",
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size > 1:
        distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    return World(device, rank, size, local_rank)


def _read_environment() -> tuple[int, int, int]:
    numbers = [os.environ.get(name, "") for name in _NUMBERS]
    wrong = [name for name, n in zip(_NUMBERS, numbers, strict=True) if not n.isdecimal()]
    wrong += [name for name in _ADDRESS if not os.environ.get(name)]
    if wrong:
        raise BadInput(
            "the environment",
            expected=f"{', '.join(_NUMBERS + _ADDRESS)}, as torchrun sets them, or none",
            found=f"no usable {', '.join(wrong)}",
            remedy="start the ranks with torchrun, or unset these variables to run alone",
        )
    rank, size, local_rank = map(int, numbers)
    return rank, size, local_rank


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: torch.Tensor, world: World) -> torch.Tensor:
        ctx.world = world
        x_ND = x_BD.new_empty(world.size * len(x_BD), *x_BD.shape[1:])
        distributed.all_gather_single(x_ND, x_BD.contiguous())
        return x_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Summed whole and cut, not scattered: embeddings are small beside gradients, and gloo and
        # NCCL then do the same.
        grad_ND = grad_ND.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad_ND)
        return grad_ND.chunk(ctx.world.size)[ctx.world.rank], None


def _groups(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type, in order, of at most `_GROUP_BYTES` together where they allow it."""
    group: list[nn.Parameter] = []
    for parameter in parameters:
        n_bytes = sum(p.nbytes for p in group) + parameter.nbytes
        if group and (n_bytes > _GROUP_BYTES or parameter.dtype != group[0].dtype):
            yield group
            group = []
        group.append(parameter)
    if group:
        yield group


@torch.no_grad()
def _sum_gradients(group: list[nn.Parameter]) -> None:
    here = [p.grad is not None for p in group]
    flat = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group]
    summed = torch.cat([*flat, flat[0].new_tensor(here)])
    del flat
    distributed.all_reduce(summed)
    sizes = [*(p.numel() for p in group), len(group)]
    *gradients, anywhere_P = torch.split_with_sizes(summed, sizes)
    # Where this rank has them all, it need not wait for the device to know who else has.
    anywhere = here if all(here) else anywhere_P.tolist()
    for parameter, gradient, has in zip(group, gradients, anywhere, strict=True):
        if has:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(gradient.view_as(parameter))
