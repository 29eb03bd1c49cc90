"""What each loader does to an epoch: tried on a small dataset, not taken from what it says.

Some ranks read an epoch; then one rank stops in the middle and goes on in new objects, from the
state that the loader gave, with as many workers and with another number.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import webdataset as wds
from torch.utils.data import DistributedSampler

from benchmarks.loader.contenders import Indexed, litdata_chunks, tars
from shards.stream import Stream, read_stream
from shards.vocabulary import Vocabulary
from trainer.config import PRESETS, DataLoadingConfig
from trainer.data import Loader

BATCH: Final = 8
RANKS: Final = 5
BEFORE: Final = 20  # batches until the stop

State = Any
# Batches of keys, each with the state after it, of an epoch from a state on (None: its start).
Epoch = Callable[[Stream, State, int, int, int], Generator[tuple[list[str], State], None, None]]


@dataclass(frozen=True, slots=True)
class Found:
    """What became of the samples of an epoch, in words."""

    once: str
    resumed: str
    other_workers: str


def tried(root: Path, epoch: Epoch) -> Found:
    stream = read_stream([root], "train")
    want = Counter(stream.keys(range(len(stream))))
    ranks = [[keys for keys, _ in epoch(stream, None, rank, RANKS, 1)] for rank in range(RANKS)]
    once = _told(Counter(key for batches in ranks for keys in batches for key in keys), want)
    steps = [len(batches) for batches in ranks]
    if len(set(steps)) > 1:
        once += f", steps of ranks {steps}"
    return Found(
        once,
        _resumed(stream, epoch, want, 1, 1),
        _resumed(stream, epoch, want, 1, 2),
    )


def _resumed(stream: Stream, epoch: Epoch, want: Counter[str], before: int, after: int) -> str:
    seen: Counter[str] = Counter()
    state = None
    with contextlib.closing(epoch(stream, None, 0, 1, before)) as started:
        for keys, state_after in itertools.islice(started, BEFORE):
            seen.update(keys)
            state = state_after
    try:
        for keys, _ in epoch(stream, state, 0, 1, after):
            seen.update(keys)
    except (AssertionError, ValueError, RuntimeError) as error:
        return f"no: {type(error).__name__} {error}".strip()
    return ("" if state is not None else "gives no state; ") + _told(seen, want)


def _told(seen: Counter[str], want: Counter[str]) -> str:
    if seen == want:
        return "yes"
    return f"no: {(seen - want).total()} repeated, {(want - seen).total()} missing"


def ours(stream: Stream, state: State, rank: int, size: int, workers: int) -> Any:
    loader = Loader(stream, Vocabulary.union(stream.panels))
    settings = {"batch_size": BATCH * size, "workers": workers}
    config = DataLoadingConfig.model_validate(PRESETS["small"]["data_loading"] | settings)
    with contextlib.closing(
        loader.training(stream.order(0), state or 0, config, rank, size)
    ) as steps:
        for step in steps:
            (batch,) = step.chunks
            yield stream.keys(batch.index_B[batch.index_B >= 0]), step.positions.stop
            if step.positions.stop == len(stream):
                return


def webdataset(stream: Stream, state: State, rank: int, size: int, workers: int) -> Any:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}
    pipeline = (
        wds.WebDataset(tars(stream), shardshuffle=100, nodesplitter=wds.split_by_node, seed=0)
        .shuffle(100)
        .to_tuple("__key__")
        .batched(BATCH)
    )
    loader = wds.WebLoader(pipeline, batch_size=None, num_workers=workers)
    for (keys,) in loader:
        yield list(keys), None


def stateful(stream: Stream, state: State, rank: int, size: int, workers: int) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = Numbers(stream)
    sampler = DistributedSampler(data, size, rank, seed=0) if size > 1 else None
    torch.manual_seed(0)
    loader = StatefulDataLoader(
        data, BATCH, shuffle=sampler is None, sampler=sampler, num_workers=workers, collate_fn=list
    )
    if state is not None:
        loader.load_state_dict(state)
    for numbers in loader:
        yield stream.keys(numbers), loader.state_dict()


class Numbers(Indexed):
    """Indices alone: what is read is not asked here."""

    def __getitem__(self, index: int) -> Any:
        return index


def litdata(stream: Stream, state: State, rank: int, size: int, workers: int) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.utilities.env import _DistributedEnv

    folder = litdata_chunks(stream, stream.shards[0].tar.parents[4].parent / "litdata-small", "1MB")
    data = StreamingDataset(str(folder), shuffle=True, drop_last=False, seed=0)
    data.distributed_env = _DistributedEnv(world_size=size, global_rank=rank, num_nodes=1)
    loader = StreamingDataLoader(
        data, batch_size=BATCH, num_workers=workers, collate_fn=_numbers, drop_last=False
    )
    if state is not None:
        loader.load_state_dict(state)
    for numbers in loader:
        yield stream.keys(numbers), loader.state_dict()


def _numbers(items: list[dict[str, Any]]) -> list[int]:
    return [item["index"] for item in items]


LOADERS: Final[dict[str, Epoch]] = {
    "ours": ours,
    "webdataset": webdataset,
    "StatefulDataLoader": stateful,
    "LitData": litdata,
}


def main() -> None:
    """One loader, tried: python -m benchmarks.loader.guarantees NAME DATASET."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    found = tried(Path(sys.argv[2]), LOADERS[sys.argv[1]])
    answers.write("\n".join([found.once, found.resumed, found.other_workers]))


if __name__ == "__main__":
    main()
