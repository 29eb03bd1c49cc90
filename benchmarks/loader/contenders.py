"""Endless batches of the same samples, by us and by others, each as it is meant to be used.

Every one yields how many samples its batch holds. Peers stack images and join counts in the same
way; what is none of the project's dependencies is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import simplejpeg
import torch
import webdataset as wds
from torch.utils.data import Dataset

from benchmarks.loader.samples import N_GENES, PX
from shards.stream import Stream, read_stream
from shards.vocabulary import Vocabulary
from trainer.config import PRESETS, DataLoadingConfig
from trainer.data import Loader
from trainer.ring import Layout, Ring

LIMIT: Final = "limit"
CHUNK: Final = 256
BATCH: Final = 4 * CHUNK
SHUFFLE_BUFFER: Final = 1000
IN_MEMORY: Final = 8192  # JPEGs, of which the decoder's own speed is taken
PEERS: Final = "uv pip install torchdata==0.11.0 litdata==0.2.76"

Batches = Iterator[int]
Sample = tuple[Any, Any]


def limit(root: Path) -> Batches:
    """The decoder alone: JPEGs in memory, in the order of training, into the slots of a ring."""
    stream = read_stream([root], "train")
    ring = Ring(Layout(rows=CHUNK, size_px=PX, genes=N_GENES, neighbors=0), 4)
    jpegs = [bytes(p.jpeg) for p in stream.read(stream.order(0).batch(range(IN_MEMORY)))]
    while True:
        for start in range(0, IN_MEMORY, CHUNK):
            image = ring.slots[start // CHUNK % 4].image
            for row in range(CHUNK):
                simplejpeg.decode_jpeg(jpegs[start + row], "RGB", buffer=image[row])
            yield CHUNK


def ours(root: Path, **settings: Any) -> Batches:
    stream = read_stream([root], "train")
    config = DataLoadingConfig.model_validate(
        PRESETS["small"]["data_loading"] | {"batch_size": BATCH, "micro_batch": CHUNK} | settings
    )
    loader = Loader(stream, Vocabulary.union(stream.panels))
    order = stream.order(
        0,
        reading=config.reading,
        pieces=config.block.pieces,
        piece_samples=config.block.piece_samples,
    )
    for step in loader.training(order, 0, config):
        yield len(step.positions)


def joined(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    images, counts = zip(*samples, strict=True)
    return (
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.concatenate(counts, axis=1).astype(np.int32)),
    )


def tars(stream: Stream) -> list[str]:
    return [str(shard.tar) for shard in stream.shards]


def simplejpeg_handler(key: str, data: bytes) -> Any:
    return simplejpeg.decode_jpeg(data, "RGB") if key.endswith("jpg") else None


def webdataset(root: Path, decode: Any) -> Batches:
    pipeline = (
        wds.WebDataset(tars(read_stream([root], "train")), shardshuffle=100, seed=0)
        .shuffle(SHUFFLE_BUFFER)
        .decode(decode)
        .to_tuple("jpg", "counts.npy")
        .batched(CHUNK, collation_fn=joined)
    )
    while True:
        for images, _ in pipeline:
            yield len(images)


class Indexed(Dataset[Sample]):
    """A map-style dataset of the stream, as one would write it for a plain DataLoader."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.reader = stream.reader()

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, index: int) -> Sample:
        _, pair = next(self.reader.each([index]))
        return simplejpeg.decode_jpeg(pair.jpeg, "RGB"), pair.counts


def stateful(root: Path) -> Batches:
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = StatefulDataLoader(
        Indexed(read_stream([root], "train")), CHUNK, shuffle=True, collate_fn=joined
    )
    while True:
        for images, _ in loader:
            yield len(images)


def litdata_chunks(stream: Stream, out: Path, chunk_bytes: str = "64MB") -> Path:
    """The samples in the format of LitData, made once."""
    from litdata.streaming.writer import BinaryWriter

    if not (out / "index.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        writer = BinaryWriter(str(out), chunk_bytes=chunk_bytes)
        for i in range(len(stream)):
            (pair,) = stream.read([i])
            counts = np.ascontiguousarray(pair.counts).tobytes()
            writer[i] = {"index": i, "jpeg": bytes(pair.jpeg), "counts": counts}
        writer.done()
        writer.merge()
    return out


def litdata_item(item: dict[str, Any]) -> Sample:
    counts = np.frombuffer(item["counts"], np.uint16).reshape(2, -1)
    return simplejpeg.decode_jpeg(item["jpeg"], "RGB"), counts


def litdata(root: Path) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset

    folder = litdata_chunks(read_stream([root], "train"), root.parent / "litdata")
    data = StreamingDataset(str(folder), shuffle=True, transform=litdata_item)
    loader = StreamingDataLoader(data, batch_size=CHUNK, num_workers=0, collate_fn=joined)
    while True:
        for images, _ in loader:
            yield len(images)


CONTENDERS: Final[dict[str, Callable[[Path], Batches]]] = {
    LIMIT: limit,
    "ours, 1 worker": partial(ours, workers=1),
    "ours, 0 workers": partial(ours, workers=0),
    "ours, blocks, 1 worker": partial(ours, workers=1, reading="block"),
    "webdataset, rgb8": partial(webdataset, decode="rgb8"),
    "webdataset, simplejpeg": partial(webdataset, decode=simplejpeg_handler),
    "StatefulDataLoader": stateful,
    "LitData": litdata,
}
