"""`cellpair curate` on a slide with damaged tiles: all goes on, cells are flagged, boxes told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile

from flows.cli import main
from pairing.geometry import Affine, Box
from pairing.slide import open_slide
from shards.check import validate
from shards.dataset import read_dataset
from shards.stream import read_stream
from tests.pairing.slides import halved, repeat, spoil

CONFIG = """
name = "damaged"
out = "out"
[patch]
fov_um = 32.0
size_px = 64
center = "cell"
[filters]
min_counts = 0
max_registration_error_um = 60
{filters}
[split]
assign = {{ D1 = "train" }}
[[runs]]
id = "r1"
xenium = {bundle}
slide = "he.ome.tif"
alignment = {alignment}
donor = "D1"
"""
MPP, TILE_PX = 0.2738, 128
Told = list[tuple[Box, str]]


def box_of(number: int, across: int) -> Box:
    x, y = number % across * TILE_PX, number // across * TILE_PX
    return x, y, x + TILE_PX, y + TILE_PX


@pytest.fixture(scope="module")
def damaged(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """A folder with the simulated slide, some of its tiles damaged, and box and kind of each."""
    folder = tmp_path_factory.mktemp("damaged")
    with open_slide(simulated / "he.ome.tif") as slide:
        width, height = slide.size_px
        image = slide.read((0, 0, width, height))
    across, down = -(-width // TILE_PX), -(-height // TILE_PX)
    garbage, black, copy, original = (
        row * across + across // 2 for row in (down // 4, down // 3, down // 2, 2 * down // 3)
    )
    x0, y0, x1, y1 = box_of(black, across)
    image[y0:y1, x0:x1] = 0
    path = folder / "he.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as out:
        sizes = {"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
        for level, metadata in ((image, sizes), (halved(image), None)):
            out.write(
                level, tile=(TILE_PX, TILE_PX), photometric="rgb", compression="jpeg",
                subifds=1 if metadata else 0, subfiletype=0 if metadata else 1, metadata=metadata,
            )  # fmt: skip
    spoil(path, garbage)
    repeat(path, copy, of=original)
    return folder, [
        (box_of(garbage, across), "undecodable"),
        (box_of(black, across), "black"),
        (box_of(copy, across), "duplicate"),
        (box_of(original, across), "duplicate"),
    ]


def curate(folder: Path, simulated: Path, filters: str) -> Path:
    config = CONFIG.format(
        filters=filters,
        bundle=json.dumps(str(simulated / "outs"), ensure_ascii=False),
        alignment=json.dumps(str(simulated / "he_imagealignment.csv"), ensure_ascii=False),
    )
    (folder / "curate.toml").write_text(config, encoding="utf-8")
    assert main(["curate", str(folder / "curate.toml"), "--workers", "1"]) == 0
    return folder / "out"


def on_damage(simulated: Path, boxes: list[Box]) -> set[str]:
    """Ids of the cells whose patch, as the resampling filter sees it, touches a box."""
    transform = json.loads((simulated / "truth" / "transform.json").read_text())
    he_px_from_xenium_um = Affine.of(transform["xenium_um_from_he_px"]).inverse
    cells = pq.read_table(simulated / "outs" / "cells.parquet").to_pandas()
    x, y = he_px_from_xenium_um(cells[["x_centroid", "y_centroid"]].to_numpy()).T
    half = 32.0 / MPP / 2
    reach = half + 2 * (2 * half / 64)
    touched = np.zeros(len(cells), bool)
    for x0, y0, x1, y1 in boxes:
        touched |= (x - reach < x1) & (x + reach > x0) & (y - reach < y1) & (y + reach > y0)
    return set(cells["cell_id"][touched])


def test_cells_on_damaged_tiles_are_flagged_and_the_boxes_told(
    damaged: tuple[Path, Told], simulated: Path
) -> None:
    folder, told = damaged
    out = curate(folder, simulated, "drop_flags = []")
    assert validate(out) == []
    (report,) = (out / "runs" / "r1" / "patches").glob("*/damage.json")
    damage = json.loads(report.read_text())["damage"]
    assert [(tuple(d["box"]), d["kind"]) for d in damage] == told
    rows = read_stream([out], "train").table(["cell_id", "flags", "nucleus"]).to_pandas()
    expected = on_damage(simulated, [box for box, _ in told])
    flagged = {r.cell_id for r in rows.itertuples() if "damaged_tile" in r.flags}
    assert flagged == expected
    assert 10 < len(flagged) < 150
    # Nuclei are found all around, and none where there is no tissue to see.
    assert rows["nucleus"].notna().sum() > 50
    (table,) = (out / "runs" / "r1" / "nuclei").glob("*/nuclei.parquet")
    nuclei = pq.read_table(table).to_pandas()
    for (x0, y0, x1, y1), kind in told:
        inside = nuclei["x_px"].between(x0 + 8, x1 - 8) & nuclei["y_px"].between(y0 + 8, y1 - 8)
        assert bool(inside.any()) == (kind == "duplicate")


def test_they_are_left_out_by_default_and_the_page_says_where(
    damaged: tuple[Path, Told], simulated: Path
) -> None:
    folder, told = damaged
    out = curate(folder, simulated, "")
    assert validate(out) == []
    expected = on_damage(simulated, [box for box, _ in told])
    dataset, _ = read_dataset(out)
    assert dataset.totals.dropped["flag_damaged_tile"] == len(expected)
    kept = read_stream([out], "train").table(["cell_id"])["cell_id"].to_pylist()
    assert expected.isdisjoint(kept)
    page = (out / "report" / "r1.html").read_text(encoding="utf-8")
    section = page[page.index('<section id="damage">') :]
    section = section[: section.index("</section>")]
    assert f"{len(expected)} of 300 patches lie over damaged places" in section
    minute = page[page.index("Patches over damaged places of the file") :]
    assert f"<td>{len(expected)} of 300 (" in minute[: minute.index("</tr>")]
    for words in ("does not decode", "black", "stands at two places"):
        assert words in section
    for (x0, *_), _ in told:
        assert f">{x0:,}<" in section
