"""A donor of several who is withdrawn: none of their cells anywhere, no byte of others changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import shapely

from flows.cli import main
from pairing.annotations import read_regions
from pairing.simulate import SimulationParams, SlideParams, simulate
from pairing.slide import open_slide
from shards.artifact import read_artifact
from shards.check import validate
from shards.dataset import read_dataset, read_manifest
from shards.schema import donor_slug
from tests.flows.report_page import Page, decoded

# A microarray with nuclei on its H&E takes longer than a test of `make test` may.
pytestmark = pytest.mark.slow

CONFIG = """
name = "cores"
out = "out"
[cells]
unit = "{unit}"
[patch]
fov_um = 32
size_px = 64
[segmentation]
model = "{model}"
[split]
aliases = {{ P7 = ["D2", "biopsy 2"] }}
withdraw = [{withdraw}]
[[runs]]
id = "tma"
xenium = "{run}/outs"
{image}
donors = "{donors}"
{labels}
"""


@pytest.fixture(scope="module")
def microarray(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("microarray") / "run"
    slide = SlideParams(mpp=0.5)
    simulate(out, SimulationParams(n_cells=150, n_donors=3, seed=2, slide=slide))
    return out


def curate(
    folder: Path,
    run: Path,
    *withdraw: str,
    donors: Path | None = None,
    dapi: bool = False,
    model: str = "none",
    unit: str = "xenium",
) -> int:
    truth = pd.read_parquet(run / "truth" / "cells.parquet")
    labels = truth.rename(columns={"type": "group"})[["cell_id", "group"]]
    labels.to_csv(folder / "groups.csv", index=False)
    he = f'slide = "{run}/he.ome.tif"\nalignment = "{run}/he_imagealignment.csv"'
    text = CONFIG.format(
        run=run,
        model=model,
        unit=unit,
        labels='labels = "groups.csv"' if unit == "xenium" else "",
        withdraw=", ".join(f'"{name}"' for name in withdraw),
        image='image = "morphology"' if dapi else he,
        donors=donors or run / "truth" / "donors.geojson",
    )
    (folder / "curate.toml").write_text(text, encoding="utf-8")
    return main(["curate", str(folder / "curate.toml"), "--workers", "1"])


def shard_set(out: Path) -> Path:
    dataset, root = read_dataset(out)
    return root / dataset.runs[0].path


def artifacts_of(out: Path) -> dict[str, Path]:
    """The newest dataset's artifacts by stage."""
    folders = {"shards": shard_set(out)}
    for stage in ("shards", "cells"):
        record = read_artifact(folders[stage])
        assert record is not None
        folders |= {s: out / "runs" / "tma" / s / fp for s, fp in record.parents.items()}
    return folders


@pytest.fixture(scope="module")
def curated(microarray: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curated")
    assert curate(folder, microarray, model="compact") == 0
    return folder


# By the name that the file has, by the canonical one, and by another of the same person.
@pytest.mark.parametrize("name", ["D2", "P7", "biopsy 2"])
def test_the_shards_of_the_others_keep_every_byte(
    curated: Path, microarray: Path, tmp_path: Path, name: str
) -> None:
    work = tmp_path / "work"
    shutil.copytree(curated, work)
    before = shard_set(work / "out")
    assert curate(work, microarray, name, model="compact") == 0
    after = shard_set(work / "out")
    assert after != before
    assert validate(work / "out") == []
    want = {shard for shard in read_manifest(before).shards if shard.donor != "D2"}
    assert {shard.donor for shard in want} == {"D1", "D3"}
    assert set(read_manifest(after).shards) == want
    for shard in want:
        for suffix in (".tar", ".parquet"):
            name = f"{shard.name}{suffix}"
            assert (after / name).read_bytes() == (before / name).read_bytes()
    assert not list(after.glob(f"*{donor_slug('D2')}*"))


def test_no_artifact_holds_a_cell_of_theirs_or_names_them(
    curated: Path, microarray: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    shutil.copytree(curated, work)
    truth = pd.read_parquet(microarray / "truth" / "cells.parquet").set_index("cell_id")
    theirs = set(truth.index[truth["donor"] == "D2"])
    assert curate(work, microarray, "D2", model="compact") == 0
    folders = artifacts_of(work / "out")
    cells = pd.read_parquet(folders["cells"] / "cells.parquet")
    assert set(cells["cell_id"]) == set(truth.index) - theirs
    registered = pd.read_parquet(folders["registration"] / "cells.parquet")
    assert set(registered["cell_id"]) == set(cells["cell_id"])
    patches = pd.read_parquet(folders["patches"] / "index.parquet")
    assert patches["row"].max() < len(cells)
    assert len(patches) <= len(cells)
    totals = read_dataset(work / "out")[0].totals
    assert totals.seen == len(cells)
    for folder in folders.values():
        record = (folder / "artifact.json").read_text()
        assert '"D2"' not in record
        assert not [cell for cell in theirs if cell in record]


@pytest.mark.parametrize("kind", ["csv", "geojson"])
def test_the_page_shows_no_tissue_of_theirs(microarray: Path, tmp_path: Path, kind: str) -> None:
    donors = microarray / "truth" / f"donors.{kind}"
    outlines = dict(read_regions(microarray / "truth" / "donors.geojson"))

    def overview() -> npt.NDArray[np.float64]:
        page = Page(tmp_path / "out" / "report" / "tma.html")
        return np.asarray(decoded(page.images[page.titles.index("Whole")]), np.float64)

    def darkness(donor: str, picture: npt.NDArray[np.float64]) -> float:
        """Of the middle of a core, beside that of the slide's corner."""
        with open_slide(microarray / "he.ome.tif") as slide:
            scale = picture.shape[1] / slide.size_px[0]
        left, top, right, bottom = np.multiply(outlines[donor].buffer(-40).bounds, scale).astype(
            int
        )
        return float(picture[:5, :5].mean() - picture[top:bottom, left:right].mean())

    assert curate(tmp_path, microarray, donors=donors) == 0
    before = overview()
    assert curate(tmp_path, microarray, "D2", donors=donors) == 0
    after = overview()
    for donor in ("D1", "D3"):
        assert darkness(donor, after) == pytest.approx(darkness(donor, before), abs=3)
        assert darkness(donor, after) > 30
    assert darkness("D2", before) > 30
    assert abs(darkness("D2", after)) < 2


def test_rows_that_are_left_say_what_they_said(
    curated: Path, microarray: Path, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    shutil.copytree(curated, work)
    before = artifacts_of(work / "out")["cells"]
    assert curate(work, microarray, "D2", model="compact") == 0
    after = artifacts_of(work / "out")["cells"]
    old, new = (pd.read_parquet(folder / "cells.parquet") for folder in (before, after))
    left = old["cell_id"].isin(new["cell_id"]).to_numpy()
    pd.testing.assert_frame_equal(old[left].reset_index(drop=True), new)

    def neighbor_ids(folder: Path, cells: pd.DataFrame) -> list[list[str]]:
        ids = cells["cell_id"].to_numpy()
        rows = np.load(folder / "neighbors.npy", allow_pickle=False)
        return [[ids[n] for n in row if n >= 0] for row in rows]

    want = [
        [cell for cell in near if cell in set(new["cell_id"])]
        for near, is_left in zip(neighbor_ids(before, old), left, strict=True)
        if is_left
    ]
    assert neighbor_ids(after, new) == want
    counts = [
        np.load(folder / "counts_indptr.npy", allow_pickle=False) for folder in (before, after)
    ]
    assert np.diff(counts[1]).tolist() == np.diff(counts[0])[left].tolist()


def test_other_stages_and_other_withdrawals_move_nothing(
    curated: Path,
    microarray: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    shutil.copytree(curated, work)

    def stages() -> dict[str, int]:
        made = [p.parts[-3] for p in (work / "out" / "runs").rglob("artifact.json")]
        return {stage: made.count(stage) for stage in made}

    other = "somebody of another run"
    assert curate(work, microarray, other, model="compact") == 0
    assert set(stages().values()) == {1}
    assert "withdraw names a donor of no run: 'somebody of another run'\n" in caplog.text
    assert curate(work, microarray, other, "d2", model="compact") == 0
    assert set(stages().values()) == {1}
    assert "withdraw names a donor of no run: 'd2'; is 'D2' meant?" in caplog.text
    assert curate(work, microarray, "D2", model="compact") == 2
    told = capsys.readouterr().err
    assert "[split] withdraw with all whom this folder must not hold" in told
    caplog.clear()
    assert curate(work, microarray, other, "d2", "D2", model="compact") == 0
    assert "'D2'" not in caplog.text
    assert stages() == {"registration": 2, "nuclei": 2, "cells": 2, "patches": 2, "shards": 2}


@pytest.mark.parametrize(("unit", "kind"), [("xenium", "csv"), ("he_nuclei", "geojson")])
def test_after_clean_no_nucleus_of_theirs_is_left_and_other_shards_are_as_they_were(
    microarray: Path, tmp_path: Path, unit: str, kind: str
) -> None:
    donors = microarray / "truth" / f"donors.{kind}"
    outlines = dict(read_regions(microarray / "truth" / "donors.geojson"))

    def nuclei() -> dict[int, shapely.Point]:
        """Of every file of the output."""
        tables = [pd.read_parquet(path) for path in (tmp_path / "out").rglob("nuclei.parquet")]
        table = pd.concat(tables).drop_duplicates("nucleus_id").set_index("nucleus_id")
        return dict(zip(table.index, shapely.points(table[["x_px", "y_px"]]), strict=True))

    assert curate(tmp_path, microarray, donors=donors, model="compact", unit=unit) == 0
    before, shards = nuclei(), shard_set(tmp_path / "out")
    old = {path.name: path.read_bytes() for path in shards.glob("tma-*")}
    assert curate(tmp_path, microarray, "D2", donors=donors, model="compact", unit=unit) == 0
    assert nuclei() == before  # of the dataset that was, until it is cleaned
    assert main(["clean", str(tmp_path / "out")]) == 0
    theirs = {n for n, place in before.items() if outlines["D2"].contains(place)}
    assert len(theirs) > 20
    assert nuclei() == {n: place for n, place in before.items() if n not in theirs}
    left = shard_set(tmp_path / "out")
    want = {name: data for name, data in old.items() if donor_slug("D2") not in name}
    assert {path.name: path.read_bytes() for path in left.glob("tma-*")} == want
    assert want.keys() < old.keys()
    assert validate(tmp_path / "out") == []
    # Nothing is made again, and what has to be is made of all nuclei again.
    artifacts = artifacts_of(tmp_path / "out")
    assert curate(tmp_path, microarray, "D2", donors=donors, model="compact", unit=unit) == 0
    assert artifacts_of(tmp_path / "out") == artifacts
    shutil.rmtree(artifacts["cells"])
    assert curate(tmp_path, microarray, "D2", donors=donors, model="compact", unit=unit) == 0
    assert artifacts_of(tmp_path / "out") == artifacts
    assert nuclei() == before


@pytest.mark.parametrize("kind", ["geojson", "csv"])
@pytest.mark.parametrize("dapi", [False, True])
def test_either_file_and_either_image(
    microarray: Path, tmp_path: Path, kind: str, dapi: bool
) -> None:
    donors = microarray / "truth" / f"donors.{kind}"
    if dapi and kind == "geojson":
        pytest.skip("the simulator writes polygons in pixels of the slide")
    assert curate(tmp_path, microarray, donors=donors, dapi=dapi) == 0
    before = read_manifest(shard_set(tmp_path / "out"))
    assert curate(tmp_path, microarray, "D1", "D3", donors=donors, dapi=dapi) == 0
    after = read_manifest(shard_set(tmp_path / "out"))
    assert after.shards == tuple(s for s in before.shards if s.donor == "D2")
    assert validate(tmp_path / "out") == []


def test_a_run_whose_donors_are_all_withdrawn_is_refused(
    microarray: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert curate(tmp_path, microarray, "D1", "P7", "D3") == 2
    assert "3 in donors.geojson, all withdrawn" in caplog.text
