"""A run with several donors, and cell labels: from files to shards, splits, pages and checks."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from flows.cli import main
from pairing.geometry import Affine
from pairing.simulate import SimulationParams, SlideParams, simulate
from shards.check import validate
from shards.dataset import read_dataset, read_manifest
from shards.schema import donor_slug
from shards.stream import read_stream

CONFIG = """
name = "cores"
out = "out"
[patch]
fov_um = 32
size_px = 64
[segmentation]
model = "none"
[filters]
max_registration_error_um = 60
[split]
assign = {{ "Ä 1" = "train", B = "val", C = "test" }}
[[runs]]
id = "tma"
xenium = "{run}/outs"
slide = "{run}/he.ome.tif"
alignment = "{run}/he_imagealignment.csv"
donors = "{donors}"
labels = "groups.csv"
"""


def centres_px(simulated: Path, cells_um: pd.DataFrame) -> np.ndarray:
    transform = json.loads((simulated / "truth" / "transform.json").read_text())
    he_px_from_xenium_um = Affine.of(transform["xenium_um_from_he_px"]).inverse
    return he_px_from_xenium_um(cells_um[["x_um", "y_um"]].to_numpy())


def cores(simulated: Path) -> list[tuple[str, shapely.Geometry]]:
    """Three columns of the tissue that touch: the third in two pieces, with a gap between."""
    px = centres_px(simulated, pd.read_parquet(simulated / "truth" / "cells.parquet"))
    (x0, y0), (x1, y1) = px.min(axis=0) - 9, px.max(axis=0) + 9
    a, b = x0 + (x1 - x0) / 3, x0 + (x1 - x0) * 2 / 3
    low, high = y0 + (y1 - y0) * 0.45, y0 + (y1 - y0) * 0.55
    return [
        ("Ä 1", shapely.box(x0, y0, a, y1)),
        ("B", shapely.box(a, y0, b, y1)),
        ("C", shapely.box(b, y0, x1, low)),
        ("C", shapely.box(b, high, x1, y1)),
    ]


def write_cores(path: Path, regions: list[tuple[str, shapely.Geometry]]) -> None:
    features = [
        {
            "type": "Feature",
            "properties": {"objectType": "annotation", "classification": {"name": donor}},
            "geometry": shapely.geometry.mapping(polygon),
        }
        for donor, polygon in regions
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def write_config(folder: Path, simulated: Path, donors: str = "cores.geojson") -> Path:
    truth = pd.read_parquet(simulated / "truth" / "cells.parquet")
    groups = truth.rename(columns={"type": "group"})[["cell_id", "group"]].assign(color="#00ff00")
    groups.iloc[: len(groups) // 2].to_csv(folder / "groups.csv", index=False)
    path = folder / "curate.toml"
    path.write_text(CONFIG.format(run=simulated, donors=donors), encoding="utf-8")
    return path


def curate(config: Path) -> int:
    return main(["curate", str(config), "--workers", "1"])


def rows_of(out: Path) -> pd.DataFrame:
    """All rows of the index tables, with the shard that each is in."""
    dataset, root = read_dataset(out)
    tables = [
        pq.read_table(root / f"{name}.parquet").to_pandas().assign(shard=name)
        for names in dataset.shards.values()
        for name in names
    ]
    return pd.concat(tables, ignore_index=True)


@pytest.fixture(scope="module")
def curated(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("donors")
    write_cores(folder / "cores.geojson", cores(simulated))
    assert curate(write_config(folder, simulated)) == 0
    return folder


@pytest.fixture(scope="module")
def microarray(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("microarray") / "run"
    simulate(out, SimulationParams(n_cells=90, n_donors=3, seed=2, slide=SlideParams(mpp=0.5)))
    return out


def test_every_cell_is_in_one_shard_of_its_donor_or_counted(curated: Path, simulated: Path) -> None:
    out = curated / "out"
    assert validate(out) == []
    (cells_folder,) = (out / "runs" / "tma" / "cells").glob("[0-9a-f]*")
    cells = pd.read_parquet(cells_folder / "cells.parquet")
    want: list[str | None] = [None] * len(cells)
    for i, centre in enumerate(centres_px(simulated, cells)):
        for donor, polygon in cores(simulated):
            if polygon.contains(shapely.Point(*centre)):
                want[i] = donor
    cells = cells.assign(donor=want).set_index("cell_id")
    assert 0 < want.count(None) < len(cells) / 4

    dataset, _ = read_dataset(out)
    n_low = int((cells["donor"].notna() & (cells["n_counts"] < 10)).sum())
    assert dataset.totals.dropped == {
        "no_donor": want.count(None),
        "outside_slide": 0,
        "registration_error": 0,
        "low_counts": n_low,
        "flag_damaged_tile": 0,
    }
    rows = rows_of(out)
    assert rows["cell_id"].is_unique
    assert len(rows) == dataset.totals.kept == len(cells) - want.count(None) - n_low
    assert rows["donor"].tolist() == cells.loc[rows["cell_id"], "donor"].tolist()


def test_a_shard_holds_one_donor_in_hashed_order_and_goes_to_its_split(curated: Path) -> None:
    out = curated / "out"
    dataset, root = read_dataset(out)
    assert dataset.donors == {"B": "val", "C": "test", "Ä 1": "train"}
    shards = read_manifest(root / dataset.runs[0].path).shards
    assert [s.donor for s in shards] == ["B", "C", "Ä 1"]
    assert [s.name for s in shards] == [f"tma-{donor_slug(s.donor)}-000000" for s in shards]
    assert shards[0].name == f"tma-B-{hashlib.sha256(b'B').hexdigest()[:8]}-000000"
    for split, names in dataset.shards.items():
        stream = read_stream([out], split)
        assert {dataset.donors[d] for d in stream.table(["donor"])["donor"].to_pylist()} == {split}
        assert len(names) == 1
    for _, of_shard in rows_of(out).groupby("shard"):
        hashes = [hashlib.sha256(f"tma/{cell}".encode()).digest() for cell in of_shard["cell_id"]]
        assert hashes == sorted(hashes)


def test_no_sample_holds_counts_of_another_donor(curated: Path) -> None:
    rows = rows_of(curated / "out")
    donor_of = dict(zip(rows["cell_id"], rows["donor"], strict=True))
    for row in rows.itertuples():
        near = [n["cell_id"] for n in row.neighbors]
        assert {donor_of.get(n, row.donor) for n in near} <= {row.donor}
    # Of eight neighbours some lose one at the border of the next donor.
    assert 0 < (rows["neighbors"].map(len) < 8).sum() < len(rows) / 2


def test_labels_are_those_of_the_file_and_null_elsewhere(curated: Path, simulated: Path) -> None:
    named = pd.read_csv(curated / "groups.csv").set_index("cell_id")["group"]
    rows = rows_of(curated / "out")
    want = [named.get(cell_id) for cell_id in rows["cell_id"]]
    assert rows["label"].tolist() == want
    assert 0 < want.count(None) < len(want)


def test_the_pages_and_info_tell_the_donors(
    curated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = curated / "out"
    n_pairs = Counter(rows_of(out)["donor"])
    page = (out / "report" / "tma.html").read_text(encoding="utf-8")
    assert "3 donors, 1 in test, 1 in train, 1 in val" in page
    assert "dropped: no donor" in page
    assert "Cells of a donor" in page
    index = (out / "report" / "index.html").read_text(encoding="utf-8")
    for donor, n in n_pairs.items():
        for text in (page, index):
            row = text.split(f"<th>{donor}</th>")[1].split("</tr>")[0]
            assert f'<td class="r">{n}</td>' in row
    tar = next(out.glob("runs/tma/shards/*/*-B-*.tar"))
    assert main(["info", str(tar), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["donor"] == ["B"]


def test_a_csv_of_the_same_donors_makes_the_same_shards(
    curated: Path, simulated: Path, tmp_path: Path
) -> None:
    # Also the cells that the filters drop, so that the totals agree.
    (cells_folder,) = (curated / "out" / "runs" / "tma" / "cells").glob("[0-9a-f]*")
    cells = pd.read_parquet(cells_folder / "cells.parquet")
    points = shapely.points(centres_px(simulated, cells))
    of_cell = {
        cell_id: donor
        for donor, polygon in cores(simulated)
        for cell_id in cells["cell_id"][polygon.contains(points)]
    }
    text = "".join(f"{cell_id},{donor}\n" for cell_id, donor in of_cell.items())
    (tmp_path / "cells.csv").write_text(f"\ufeffcell_id,donor\n{text}", encoding="utf-8")
    assert curate(write_config(tmp_path, simulated, "cells.csv")) == 0
    sets = [next((side / "out").glob("runs/tma/shards/[0-9a-f]*")) for side in (curated, tmp_path)]
    names = sorted(p.name for p in sets[0].iterdir() if p.name != "artifact.json")
    assert len(names) == 7
    for name in names:
        assert (sets[0] / name).read_bytes() == (sets[1] / name).read_bytes(), name
    assert sets[0].name != sets[1].name


def test_the_files_count_by_their_content(curated: Path, simulated: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(curated, work)
    config = write_config(work, simulated)

    def stages() -> Counter[str]:
        return Counter(p.parts[-3] for p in (work / "out" / "runs").rglob("artifact.json"))

    before = stages()
    (work / "cores.geojson").rename(work / "moved.json")
    config.write_text(config.read_text("utf-8").replace("cores.geojson", "moved.json"), "utf-8")
    assert curate(config) == 0
    assert stages() == before
    for change in (
        lambda: write_cores(work / "moved.json", cores(simulated)[1:]),
        lambda: (work / "groups.csv").write_text(
            (work / "groups.csv").read_text().replace("\n", ",\n").replace(",color,", ",color,x")
        ),
    ):
        change()
        assert curate(config) == 0
        before["shards"] += 1
        assert stages() == before
    assert read_dataset(work / "out")[0].donors == {"B": "val", "C": "test"}


def test_donors_without_pairs_and_without_cells_are_told(
    curated: Path, simulated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = tmp_path / "work"
    shutil.copytree(curated, work)
    elsewhere = [("Ä 1", shapely.box(-90, -90, -80, -80)), ("E", shapely.box(-70, -70, -60, -60))]
    write_cores(work / "cores.geojson", [*elsewhere, *cores(simulated)[1:]])
    assert curate(write_config(work, simulated)) == 0
    assert "tma: no pair of donor 'E', of 0 cells" in caplog.text
    assert "[split] assign names donors without a pair: Ä 1" in caplog.text
    page = (work / "out" / "report" / "tma.html").read_text(encoding="utf-8")
    assert '<th>E</th><td>–</td><td class="r">0</td><td class="r">0</td>' in page


def µm_instead_of_pixels(folder: Path, simulated: Path) -> str:
    write_cores(
        folder / "cores.geojson",
        [(d, shapely.transform(p, lambda xy: xy + 1e5)) for d, p in cores(simulated)],
    )
    return "neither µm, nor pixels of another image"


def overlapping(folder: Path, simulated: Path) -> str:
    (_, a), *rest = cores(simulated)
    write_cores(folder / "cores.geojson", [("Ä 1", shapely.buffer(a, 99)), *rest])
    return "px in polygons of Ä 1 and of B"


def of_another_bundle(folder: Path, simulated: Path) -> str:
    (folder / "groups.csv").write_text("cell_id,group\nzzzzzzzz-1,2\n")
    return "1 of 1 ids that the run does not have, such as zzzzzzzz-1"


@pytest.mark.parametrize("fault", [µm_instead_of_pixels, overlapping, of_another_bundle])
def test_faults_of_the_files_are_found_before_the_work(
    simulated: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    fault: Callable[[Path, Path], str],
) -> None:
    write_cores(tmp_path / "cores.geojson", cores(simulated))
    config = write_config(tmp_path, simulated)
    words = fault(tmp_path, simulated)
    assert curate(config) == 2
    assert words in caplog.text
    made = {p.parts[-3] for p in (tmp_path / "out" / "runs").rglob("artifact.json")}
    assert made == {"registration"}


def move_a_shard_to_another_split(out: Path) -> str:
    path = out / json.loads((out / "dataset.json").read_text())["dataset"]
    dataset = json.loads(path.read_text())
    dataset["shards"]["train"] += dataset["shards"]["test"]
    dataset["shards"]["test"] = []
    path.write_text(json.dumps(dataset))
    return "donor 'C' is in test, but the shard is not"


def give_a_sample_a_neighbor_of_another_donor(out: Path) -> str:
    (path,) = out.glob("runs/tma/shards/*/tma-B-*.parquet")
    (other,) = out.glob("runs/tma/shards/*/tma-C-*.parquet")
    table = pq.read_table(path)
    rows: list[dict[str, Any]] = table.to_pylist()
    rows[3]["neighbors"][0]["cell_id"] = pq.read_table(other)["cell_id"][0].as_py()
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    return f"{rows[3]['key']}: a neighbour is of donor 'C', the sample of 'B'"


@pytest.mark.parametrize(
    "damage", [move_a_shard_to_another_split, give_a_sample_a_neighbor_of_another_donor]
)
def test_check_finds_a_donor_that_straddles_splits(
    curated: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    shutil.copytree(curated / "out", tmp_path / "out")
    words = damage(tmp_path / "out")
    assert any(words in fault for fault in validate(tmp_path / "out"))


def test_dapi_patches_take_polygons_in_morphology_pixels(simulated: Path, tmp_path: Path) -> None:
    truth = pd.read_parquet(simulated / "truth" / "cells.parquet")
    middle = float(truth["x_um"].median()) / 0.2125
    write_cores(
        tmp_path / "cores.geojson",
        [("B", shapely.box(0, 0, middle, 1e5)), ("C", shapely.box(middle, 0, 1e5, 1e5))],
    )
    config = write_config(tmp_path, simulated)
    text = config.read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith(("slide", "alignment"))]
    config.write_text("\n".join([*lines, 'image = "morphology"']), "utf-8")
    assert curate(config) == 0
    rows = rows_of(tmp_path / "out")
    left = rows["x_um"] < middle * 0.2125
    assert rows["donor"].tolist() == np.where(left, "B", "C").tolist()


@pytest.mark.parametrize("donors", ["donors.geojson", "donors.csv"])
def test_a_microarray_gives_every_cell_its_own_donor(
    microarray: Path, tmp_path: Path, donors: str
) -> None:
    config = write_config(tmp_path, microarray, str(microarray / "truth" / donors))
    assert curate(config) == 0
    assert validate(tmp_path / "out") == []
    truth = pd.read_parquet(microarray / "truth" / "cells.parquet").set_index("cell_id")
    rows = rows_of(tmp_path / "out")
    assert rows["donor"].tolist() == truth.loc[rows["cell_id"], "donor"].tolist()
    assert read_dataset(tmp_path / "out")[0].donors.keys() == {"D1", "D2", "D3"}
