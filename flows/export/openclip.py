"""A split as open_clip reads it: tars of patches with gene sentences, and how many there are."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq

from flows.export.sentences import Sentences
from flows.export.source import Part, Progress, Source
from shards.errors import BadInput
from shards.index import default_cache
from shards.mix import Parts
from shards.reader import GlobalReader, Pair
from shards.schema import INDEX_SCHEMA, Split

# open_clip gives whole tars to workers and wants at least one for each.
TAR_SAMPLES: Final = 2_500
# Read side by side and mixed: a shard holds one donor, and open_clip mixes no more than the few
# thousand samples that a worker has at hand.
MIXED_SHARDS: Final = 64
_READ_ROWS: Final = 256

# Of the index table, what goes into the .json: all but where members lie, and the neighbours.
_METADATA = [
    name
    for name in INDEX_SCHEMA.names
    if not name.endswith(("_offset", "_size")) and name not in {"crc32", "neighbors"}
]


def write_openclip(
    folder: Path, source: Source, split: Split, top_k: int, tar_samples: int = TAR_SAMPLES
) -> int:
    """Write `<split>-000000.tar` … and `sizes.json`, by which open_clip counts, into `folder`.

    A sample is its patch, byte by byte that of the shard (`jpg`), its gene sentence (`txt`) and
    its metadata (`json`). Returns how many were written: those whose sentence is not empty. Raises
    BadInput on a sample that is damaged.
    """
    parts = [part for part in source.parts if part.split == split]
    sizes: dict[str, int] = {}
    with closing(_members(source, parts, top_k)) as samples:
        for number, first in enumerate(samples):
            name = f"{split}-{number:06d}.tar"
            sizes[name] = 0
            with tarfile.open(folder / name, "w", format=tarfile.GNU_FORMAT) as tar:
                for members in chain([first], islice(samples, tar_samples - 1)):
                    for member, content in members.items():
                        info = tarfile.TarInfo(member)  # of a fixed time and owner
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
                    sizes[name] += 1
    (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n")
    return sum(sizes.values())


def _members(
    source: Source, parts: Sequence[Part], top_k: int
) -> Generator[dict[str, bytes | memoryview]]:
    """What the tars hold of each sample, by name."""
    sentences = {panel_id: Sentences(panel, top_k) for panel_id, panel in source.panels.items()}
    n_groups = -(-len(parts) // MIXED_SHARDS)
    with Progress(parts, parts[0].split) as progress:
        for group in range(n_groups):
            for row, pair in _mixed(parts[group::n_groups]):
                progress.add(1)
                assert pair.counts is not None, "a dataset of pairs has counts"
                if sentence := sentences[row["panel"]].of(pair.counts):
                    metadata = json.dumps(row, ensure_ascii=False, allow_nan=False)
                    yield {
                        f"{row['key']}.jpg": pair.jpeg,
                        f"{row['key']}.txt": sentence.encode(),
                        f"{row['key']}.json": metadata.encode(),
                    }


def _mixed(parts: Sequence[Part]) -> Iterator[tuple[dict[str, Any], Pair]]:
    """The samples of some shards, those of each spread evenly over the whole."""
    n_P = np.array([part.shard.n_samples for part in parts])
    place = np.concatenate([(np.arange(n) + 0.5) / n for n in n_P])
    order = np.argsort(place, kind="stable")
    shard_P = np.repeat(np.arange(len(parts)), n_P)
    locations = Parts.of(n_P, np.ones_like(n_P))
    shards = [part.shard for part in parts]
    with ExitStack() as stack:
        rows = [stack.enter_context(closing(_metadata(part))) for part in parts]
        reader = stack.enter_context(GlobalReader(shards, locations, default_cache(), "crc32"))
        for start in range(0, len(order), _READ_ROWS):
            indices = order[start : start + _READ_ROWS]
            pairs = dict(reader.each(indices))
            for i, index in enumerate(indices.tolist()):
                pair = pairs[i]
                if isinstance(pair, BadInput):
                    raise pair
                yield next(rows[shard_P[index]]), pair


def _metadata(part: Part) -> Generator[dict[str, Any]]:
    with pq.ParquetFile(part.shard.table) as table:
        for batch in table.iter_batches(_READ_ROWS, columns=_METADATA):
            yield from batch.to_pylist()
