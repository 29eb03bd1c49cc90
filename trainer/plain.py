"""The same batches by a plain PyTorch DataLoader: slower, to debug with and to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import simplejpeg
import torch
from torch.utils.data import DataLoader, Dataset

from shards.errors import BadInput
from shards.order import Indices
from shards.reader import Pair
from shards.stream import Stream
from trainer.batch import Batch, Fault, neighbors_of
from trainer.ring import GENES_EXPECTED, Layout, Sparse, Unsigned

_Row = tuple[int, Pair | BadInput | None]  # None is padding


class Samples(Dataset[_Row]):
    """Any sample by its index; -1 is padding."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __getitem__(self, index: int) -> _Row:
        if index < 0:
            return index, None
        try:
            return index, self._stream.read([index])[0]
        except BadInput as error:
            return index, error


class Collate:
    """Rows to a batch, decoded."""

    def __init__(self, stream: Stream, layout: Layout) -> None:
        self._stream, self._layout = stream, layout

    def __call__(self, rows: list[_Row]) -> Batch:
        size_px = self._layout.size_px
        image_BHWC = np.zeros((len(rows), size_px, size_px, 3), dtype=np.uint8)
        panel_B = np.zeros(len(rows), dtype=np.int64)
        weight_B = np.zeros(len(rows), dtype=np.float32)
        counts, neighbors, faults = [], [], []
        for i, (index, pair) in enumerate(rows):
            counts.append(np.zeros((2, 0), dtype=np.uint16))
            neighbors.append(np.zeros((3, 0), dtype=np.uint16))
            if pair is None:
                continue
            try:
                image_BHWC[i], counts[i], neighbors[i], panel_B[i] = self._decoded(index, pair)
            except BadInput as error:
                faults.append(Fault(index, error))
            else:
                weight_B[i] = 1
        joined, near = _joined(counts), _joined(neighbors)
        return Batch(
            index_B=np.array([index for index, _ in rows], dtype=np.int64),
            image_BHWC=torch.from_numpy(image_BHWC),
            row_N=torch.from_numpy(joined.row),
            gene_N=torch.from_numpy(joined.values[0]),
            count_N=torch.from_numpy(joined.values[1]),
            panel_B=torch.from_numpy(panel_B),
            weight_B=torch.from_numpy(weight_B),
            neighbors=neighbors_of(near) if self._layout.neighbors else None,
            faults=tuple(faults),
        )

    def _decoded(self, index: int, pair: Pair | BadInput) -> tuple[Any, Unsigned, Unsigned, int]:
        if isinstance(pair, BadInput):
            raise pair
        fault = self._stream.fault
        if pair.counts is None:
            raise fault(index, expected="counts", found="a sample without them")
        size_px = self._layout.size_px
        expected = f"a JPEG of {size_px} px"
        try:
            image = simplejpeg.decode_jpeg(pair.jpeg, "RGB")
        except ValueError as error:
            raise fault(index, expected=expected, found=str(error)) from error
        if image.shape != (size_px, size_px, 3):
            found = f"one of {image.shape[1]} × {image.shape[0]} px"
            raise fault(index, expected=expected, found=found)
        near = pair.neighbors
        if near is None:
            near = np.zeros((3, 0), dtype=np.uint16)
        near = near[:, near[0] < self._layout.neighbors]
        n_genes = len(self._stream.panels[pair.panel].genes)
        for gene, most in ((pair.counts[0], n_genes), (near[1], n_genes * self._layout.neighbors)):
            if len(gene) > most or (gene >= n_genes).any():
                raise fault(index, expected=GENES_EXPECTED, found="others")
        return image, pair.counts, near, pair.panel


def _joined(parts: list[Unsigned]) -> Sparse:
    sizes = [part.shape[1] for part in parts]
    row = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
    return Sparse(row, np.concatenate(parts, axis=1))


def plain_batches(
    stream: Stream, layout: Layout, chunks: Iterator[Indices], workers: int
) -> Iterator[Batch]:
    """A batch for each chunk of indices."""
    loader = DataLoader(
        Samples(stream),
        batch_sampler=(chunk.tolist() for chunk in chunks),
        collate_fn=Collate(stream, layout),
        num_workers=workers,
        # Not forked: this process has threads, and may use CUDA.
        multiprocessing_context="spawn" if workers else None,
    )
    return iter(loader)
