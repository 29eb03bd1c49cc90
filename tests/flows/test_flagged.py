"""`cellpair curate` on a slide with ink and a part out of focus: flagged, counted, cut once."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tifffile

from flows.cli import main
from pairing.flags import FLAGS
from pairing.patches import INDEX_FILE
from pairing.slide import open_slide
from shards.check import validate
from shards.dataset import read_dataset
from shards.stream import read_stream
from tests.flows.report_page import Page

CONFIG = """
name = "quality"
out = "out"
[patch]
fov_um = 32.0
size_px = 128
center = "cell"
[segmentation]
model = "none"
[registration]
refine = false
[filters]
min_counts = 20
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
MPP = 0.2738
BLUE = np.array([1.0, 0.62, 0.18])
BORNE = ("blurred", "pen")


@pytest.fixture(scope="module")
def spoiled(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the simulated slide, its left under ink, its right out of focus."""
    folder = tmp_path_factory.mktemp("quality")
    with open_slide(simulated / "he.ome.tif") as slide:
        width, height = slide.size_px
        image = slide.read((0, 0, width, height))
    ink_px, soft_px = ends_of(width)
    ink = (image[:, :ink_px] + 1.0) * 10.0**-BLUE - 1
    image[:, :ink_px] = np.clip(np.rint(ink), 0, 255)
    image[:, soft_px:] = cv2.GaussianBlur(image, (0, 0), 3.0 / MPP)[:, soft_px:]
    with tifffile.TiffWriter(folder / "he.ome.tif", ome=True) as out:
        sizes = {"axes": "YXS", "PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
        out.write(
            image, tile=(256, 256), photometric="rgb", compression="jpeg",
            compressionargs={"level": 92}, metadata=sizes,
        )  # fmt: skip
    return folder


def ends_of(width: int) -> tuple[int, int]:
    """Where ink ends and defocus begins, from left to right."""
    return width * 3 // 10, width // 2


def curate(folder: Path, simulated: Path, filters: str) -> Path:
    config = CONFIG.format(
        filters=filters,
        bundle=json.dumps(str(simulated / "outs"), ensure_ascii=False),
        alignment=json.dumps(str(simulated / "he_imagealignment.csv"), ensure_ascii=False),
    )
    (folder / "curate.toml").write_text(config, encoding="utf-8")
    assert main(["curate", str(folder / "curate.toml"), "--workers", "1"]) == 0
    return folder / "out"


def patches_of(out: Path) -> tuple[Path, pd.DataFrame]:
    (index,) = out.glob(f"runs/r1/patches/*/{INDEX_FILE}")
    return index, pq.read_table(index).to_pandas().set_index("row")


def test_flags_are_measured_dropped_and_counted_and_other_thresholds_cut_nothing(
    spoiled: Path, simulated: Path
) -> None:
    out = curate(spoiled, simulated, 'drop_flags = ["blurred", "pen"]')
    assert validate(out) == []
    index, patches = patches_of(out)
    inodes = {path.name: path.stat().st_ino for path in index.parent.iterdir()}

    # What was spoiled is known: patches that lie in one part of the slide as a whole.
    with open_slide(spoiled / "he.ome.tif") as slide:
        ink_px, soft_px = ends_of(slide.size_px[0])
    half = 32.0 / MPP / 2
    inked = patches["x_px"] + half < ink_px
    free = patches["x_px"] - half > ink_px
    soft = patches["x_px"] - half > soft_px
    sharp = patches["x_px"] + half < soft_px
    pen, blurred = patches["pen_share"] > 0.05, patches["sharpness"] < 0.35
    assert (patches["pen_share"][inked] > 0.5).mean() > 0.95
    assert not pen[free].any()
    assert blurred[soft].mean() > 0.9
    assert blurred[sharp & free].mean() < 0.05
    assert min(inked.sum(), soft.sum()) > 25

    # Every cell under its first reason; the flags that the kept ones bear are noted.
    low = pq.read_table(next(out.glob("runs/r1/cells/*/cells.parquet")))["n_counts"].to_numpy() < 20
    low = pd.Series(low)[patches.index]
    kept = ~low & ~blurred & ~pen
    dataset, _ = read_dataset(out)
    totals = dataset.totals
    assert totals.dropped == {
        "outside_slide": 300 - len(patches),
        "registration_error": 0,
        "low_counts": low.sum(),
        "flag_blurred": (~low & blurred).sum(),
        "flag_pen": (~low & ~blurred & pen).sum(),
    }
    assert totals.kept == kept.sum() > 40
    assert (totals.noted["flag_blurred"], totals.noted["flag_pen"]) == (0, 0)
    assert totals.noted["flag_edge"] == patches["edge"][kept].sum()
    assert totals.noted["sharpness_not_assessed"] == patches["sharpness"][kept].isna().sum()
    page = Page(out / "report" / "r1.html")
    assert page.number("totals", "dropped: flag pen") == totals.dropped["flag_pen"] > 0

    # Another threshold, and nothing dropped for it: the same patches, other shards.
    out = curate(spoiled, simulated, "pen_above = 0.6\ndrop_flags = []")
    assert {path.name: path.stat().st_ino for path in index.parent.iterdir()} == inodes
    assert [path.parent for path in out.glob(f"runs/r1/patches/*/{INDEX_FILE}")] == [index.parent]
    assert len(list(out.glob("runs/r1/shards/*/manifest.json"))) == 2
    assert validate(out) == []
    dataset, _ = read_dataset(out)
    assert dataset.totals.noted["flag_pen"] == (~low & (patches["pen_share"] > 0.6)).sum()
    columns = ["x_px", "y_px", "flags", "sharpness", "pen_share", "dark_ratio", "glass_share"]
    rows = read_stream([out], "train").table(columns).to_pandas()
    assert len(rows) == (~low).sum()
    at = (
        patches.reset_index()
        .set_index(["x_px", "y_px"])
        .loc[pd.MultiIndex.from_frame(rows[["x_px", "y_px"]])]
    )
    for name in ("sharpness", "pen_share"):
        np.testing.assert_array_equal(rows[name], at[name])
    assert [set(f) <= set(FLAGS) for f in rows["flags"]] == [True] * len(rows)
    for flag, bears in (("pen", rows["pen_share"] > 0.6), ("blurred", rows["sharpness"] < 0.35)):
        assert [flag in f for f in rows["flags"]] == bears.tolist()
    assert rows["dark_ratio"].notna().all()


def test_of_dapi_no_score_is_told(simulated: Path, tmp_path: Path) -> None:
    text = CONFIG.format(
        filters='drop_flags = ["blurred", "pen", "fold", "torn"]',
        bundle=json.dumps(str(simulated / "outs"), ensure_ascii=False),
        alignment="x",
    )
    text = text.replace('slide = "he.ome.tif"\nalignment = x', 'image = "morphology"')
    (tmp_path / "curate.toml").write_text(text, encoding="utf-8")
    assert main(["curate", str(tmp_path / "curate.toml"), "--workers", "1"]) == 0
    dataset, _ = read_dataset(tmp_path / "out")
    for score in ("sharpness", "pen_share", "dark_ratio", "glass_share"):
        assert dataset.totals.noted[f"{score}_not_assessed"] == dataset.totals.kept
    for flag in ("blurred", "pen", "fold", "torn"):
        assert dataset.totals.dropped[f"flag_{flag}"] == 0
    assert validate(tmp_path / "out") == []
