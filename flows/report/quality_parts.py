"""Flags and scores of a run's patches: how many, how distributed, and what they look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from flows.report import charts
from flows.report.embed import chart_uri, thumbnail_uri
from pairing.flags import FLAGS, Flag, with_flags
from pairing.geometry import Points
from pairing.pack import Filters
from pairing.patches import INDEX_FILE, PatchReader
from shards.schema import NOTE_OF_FLAG, Totals

N_EXAMPLES = 4
_THUMBNAIL_PX = 128


@dataclass(frozen=True, slots=True)
class FlagRow:
    """One flag: by what it is told, the patches that bear it, the kept ones, some of them."""

    flag: Flag
    rule: str
    n_cut: int
    n_kept: int
    is_dropped: bool
    examples: list[str]


@dataclass(frozen=True, slots=True)
class QualityParts:
    """Of all patches that were cut; charts, as data URIs, of the scores that any of them has."""

    rows: list[FlagRow]
    charts: dict[str, str]


def quality_parts(
    patches_folder: Path,
    cells_um: Points,
    filters: Filters,
    totals: Totals,
    n_flagged: Mapping[str, int],
) -> QualityParts:
    """Read from the patches' index; examples are spread evenly over the flagged ones.

    `cells_um` (n, 2) are the places of all cells of the run, in the Xenium frame; `n_flagged` is
    how many patches bear each flag. In a run of several donors charts and examples are by what is
    usual in the run, and not with each of them.
    """
    index = pq.read_table(patches_folder / INDEX_FILE).to_pandas()
    patches = with_flags(index, cells_um[index["row"]], filters)
    rules = {
        "edge": "it reaches over the border of the image",
        "damaged_tile": "a place of the file that does not decode, is black or stands there twice",
        "blurred": f"sharpness below {filters.blurred_below:g}",
        "pen": f"more than {filters.pen_above:.1%} of it under ink",
        "fold": f"darker than {filters.fold_above:g} times what is usual with its donor in the run",
        "torn": f"more than {filters.torn_above:.0%} of its donor's cells around lie on glass",
    }
    reader = PatchReader(patches_folder)
    try:
        rows = [
            FlagRow(
                flag=flag,
                rule=rules[flag],
                n_cut=n_flagged[flag],
                n_kept=totals.noted[NOTE_OF_FLAG + flag],
                is_dropped=flag in filters.drop_flags,
                examples=_examples(reader, patches[patches[flag]]),
            )
            for flag in FLAGS
        ]
    finally:
        reader.close()
    return QualityParts(rows, _charts(patches, filters))


def _examples(reader: PatchReader, flagged: pd.DataFrame) -> list[str]:
    places = np.unique(np.linspace(0, len(flagged) - 1, N_EXAMPLES).round().astype(int))
    rows = flagged.iloc[places if len(flagged) else []]
    return [
        thumbnail_uri(reader.read(part, int(offset), int(size)), _THUMBNAIL_PX)
        for part, offset, size in rows[["part", "offset", "size"]].itertuples(index=False)
    ]


def _charts(patches: pd.DataFrame, filters: Filters) -> dict[str, str]:
    marks = {
        "sharpness": ("sharpness", filters.blurred_below, "blurred_below", (-0.2, 2.0)),
        "pen_share": ("share under ink", filters.pen_above, "pen_above", (0.0, 1.0)),
        "glass_share": ("cells around on glass", filters.torn_above, "torn_above", (0.0, 1.0)),
        "dark_ratio": ("darkness, of what is usual", filters.fold_above, "fold_above", (0.0, 4.0)),
    }
    drawn = {}
    for score, (words, at, name, limits) in marks.items():
        values = patches[score].dropna().to_numpy(np.float64)
        if len(values):
            mark = (at, f"{name} = {at:g}")
            figure = charts.histogram(values, words, limits=limits, mark=mark, of="patches")
            drawn[score] = chart_uri(figure)
    return drawn
