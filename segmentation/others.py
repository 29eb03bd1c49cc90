"""The nuclei of a slide without those of somebody."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from segmentation.config import FACTS_FILE, NUCLEI_FILE, SegmentationFacts
from segmentation.outlines import NUCLEI_SCHEMA
from shards.artifact import write_atomically, written_aside
from shards.dataset import read_record


def write_others(out: Path, of_all: Path, are_theirs: npt.NDArray[np.bool_]) -> int:
    """The artifact `of_all` into the folder `out`, without some nuclei; returns how many stay.

    `are_theirs` are those that go, by row of the table. Others keep their numbers.
    """
    first = 0
    with (
        pq.ParquetFile(of_all / NUCLEI_FILE) as table,
        written_aside(out / NUCLEI_FILE) as path,
        pq.ParquetWriter(path, NUCLEI_SCHEMA) as writer,
    ):
        for group in range(table.num_row_groups):
            nuclei = table.read_row_group(group)
            writer.write_table(nuclei.filter(pa.array(~are_theirs[first : first + len(nuclei)])))
            first += len(nuclei)
    n_nuclei = int(np.count_nonzero(~are_theirs))
    facts = read_record(of_all / FACTS_FILE, SegmentationFacts)
    facts = facts.model_copy(update={"n_nuclei": n_nuclei})
    write_atomically(out / FACTS_FILE, facts.model_dump_json(indent=1).encode())
    return n_nuclei
