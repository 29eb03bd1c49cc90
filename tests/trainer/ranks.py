"""What four ranks compute, and the same on one device.

    python -m tests.trainer.ranks FOLDER PORT SECOND_PORT

starts them, with the environment that torchrun would give; each leaves `rank-N.pt`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Literal

import torch
import torch._dynamo  # checkpointing does so, for seconds: once here, not again in every rank
from torch import nn
from torch.nn import functional

from trainer.caching import Embedded, backward_in_chunks
from trainer.config import LossConfig
from trainer.distributed import World, start_world
from trainer.expression import ExpressionHead
from trainer.loss import PairLoss

Kind = Literal["info_nce", "siglip", "soft_targets"]

KINDS: tuple[Kind, ...] = ("info_nce", "siglip", "soft_targets")
N_RANKS, ROWS = 4, 6  # of each rank
# Rows that count on each rank; of the last, the second row is left out as well.
LAYOUTS = {"full": (6, 6, 6, 6), "short": (5, 5, 4, 4), "lonely": (0, 3, 0, 0)}
CHUNKS = (1, 3)
CASES = tuple(product(KINDS, LAYOUTS, CHUNKS))
SILENCE_S = 5.0

Result = dict[str, torch.Tensor]


def loss_config(
    kind: Kind, *, temperature: float = 0.3, siglip_bias: float = -1.5, low: float = 0.01
) -> LossConfig:
    return LossConfig(
        kind=kind,
        temperature=temperature,
        temperature_min=low,
        temperature_max=1.0,
        siglip_bias=siglip_bias,
        image_expression=0.0,
        masked_genes=0.0,
        masked_share=0.0,
        expression_family="negative_binomial",
    )


class Towers(nn.Module):
    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.image = nn.Linear(7, 5)
        self.gene = nn.Linear(9, 5)
        self.head = ExpressionHead(5, 9, "negative_binomial")
        self.loss = PairLoss(loss_config(kind))


def step(kind: Kind, layout: str, n_chunks: int, world: World) -> Result:
    """Losses and gradients of one batch of 24 rows, of which `world` gives this rank its share."""
    torch.manual_seed(world.rank)  # rank 0's parameters are everyone's
    towers = Towers(kind)
    world.broadcast(towers)

    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(N_RANKS * ROWS)
    image_BF = torch.randn(len(rows), 7, generator=generator)
    counts_BG = torch.poisson(torch.rand(len(rows), 9, generator=generator) * 3, generator)
    sample_B = rows % 17  # repeated on one rank and on several
    weight_B = (rows % ROWS < torch.tensor(LAYOUTS[layout])[rows // ROWS]).float()
    if layout == "short":
        weight_B[-ROWS + 1] = 0
    here_B = rows.chunk(world.size)[world.rank]
    chunks = here_B.chunk(n_chunks)
    share_B = weight_B / world.total(weight_B[here_B].sum())
    everything_BG = torch.ones(len(rows), 9, dtype=torch.bool)

    def embed(i: int) -> Embedded:
        c = chunks[i]
        z_image_BD = functional.normalize(towers.image(image_BF[c]), dim=1)
        z_gene_BD = functional.normalize(towers.gene(counts_BG[c]), dim=1)
        nll_B = towers.head(z_image_BD, counts_BG[c], everything_BG[c], everything_BG[c])
        return Embedded(z_image_BD, z_gene_BD, share_B[c] @ nll_B)

    passed = backward_in_chunks(
        n_chunks,
        embed,
        lambda image, gene: towers.loss(image, gene, weight_B[here_B], sample_B[here_B], world),
    )
    world.sum_gradients(towers.parameters())
    result = {"loss": world.total(passed.loss), "added": world.total(passed.added)}
    for name, parameter in towers.named_parameters():
        assert parameter.grad is not None
        result[name] = parameter.grad
    return result


def exchanges(world: World) -> Iterator[tuple[str, torch.Tensor]]:
    """What a rank hears from the others, call by call."""
    x_BD = torch.tensor([[world.rank, 10.0], [world.rank, 20.0]], requires_grad=True)
    gathered_ND = world.gather(x_BD)
    yield "gathered", gathered_ND.detach()
    weight_N = torch.arange(len(gathered_ND)) + 100.0 * world.rank
    (weight_N @ gathered_ND).sum().backward()  # type: ignore[no-untyped-call]
    assert x_BD.grad is not None
    yield "gathered gradient", x_BD.grad
    yield "gathered integers", world.gather(torch.tensor([2**60 + world.rank]))
    yield "total", world.total(torch.tensor([1.0, world.rank]))
    yield "any", torch.tensor([world.any(world.rank == 2), world.any(False)])

    module = nn.BatchNorm1d(3)
    convolution = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    nn.init.constant_(module.weight, world.rank + 7)
    nn.init.constant_(convolution.weight, world.rank + 8)
    module.running_mean += world.rank + 9
    world.broadcast(nn.ModuleList([module, convolution]))
    yield "broadcast", torch.cat([module.weight, module.running_mean, convolution.weight.flatten()])

    # Two of these are more than what is summed at once; the types alternate.
    large = [nn.Parameter(torch.zeros(5_000_000)) for _ in range(3)]
    double = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    of_two, of_none = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(4))
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    for i, parameter in enumerate([*large, double]):
        parameter.grad = torch.full_like(parameter, 10.0**i)
    if world.rank in (1, 2):
        of_two.grad = torch.arange(4.0).reshape(2, 2) + world.rank
    world.sum_gradients([large[0], double, *large[1:], of_two, frozen, of_none])
    sums = [p.grad for p in (*large, double, of_two)]
    assert of_none.grad is None
    assert frozen.grad is None
    yield "summed gradients", torch.cat([g[:4].double().flatten() for g in sums if g is not None])


def fall_silent(folder: Path) -> None:
    """The last rank takes no part any more; the others leave behind what they were told."""
    with start_world(torch.device("cpu"), timeout_s=SILENCE_S) as world:
        if world.rank < N_RANKS - 1:
            try:
                world.any(False)
            except RuntimeError as error:
                (folder / f"told-{world.rank}").write_text(str(error))
        deadline = time.monotonic() + 10 * SILENCE_S
        while len(list(folder.glob("told-*"))) < N_RANKS - 1 and time.monotonic() < deadline:
            time.sleep(0.05)


def one_rank(rank: int, folder: Path, ports: list[str]) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(N_RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0]}
    with start_world(torch.device("cpu"), timeout_s=120) as world:
        found = {case: step(*case, world) for case in CASES}
        heard = dict(exchanges(world))
        torch.save({"steps": found, "exchanges": heard}, folder / f"rank-{rank}.pt")
        world.any(False)
    os.environ["MASTER_PORT"] = ports[1]
    fall_silent(folder)


def main(folder: str, *ports: str) -> int:
    # Forked, for torch takes seconds to import; no thread of it runs yet.
    start = multiprocessing.get_context("fork").Process
    ranks = [start(target=one_rank, args=(r, Path(folder), list(ports))) for r in range(N_RANKS)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return sum(rank.exitcode != 0 for rank in ranks)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
