"""`cellpair curate` on a simulated run: the pairs, what is reused, what is told of failures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tifffile
import webdataset
from scipy.spatial import cKDTree

from flows.cli import main
from pairing.geometry import Affine
from pairing.registration.record import read_registration
from pairing.warp import Warp
from pairing.xenium import open_xenium
from shards.check import validate
from shards.dataset import read_dataset
from shards.remote import Location
from shards.stream import read_stream
from tests.flows.report_page import Page

CONFIG = """
name = "test"
out = "{out}"
[cells]
unit = "{unit}"
neighbors_k = 5
[segmentation]
model = "{model}"
[registration]
refine = {refine}
[filters]
min_counts = {min_counts}
max_registration_error_um = {max_error_um}
[split]
assign = {{ D1 = "{split}" }}
[[runs]]
id = "r1"
xenium = "{run}/outs"
slide = "{slide}"
alignment = "{alignment}"
donor = "D1"
tissue = "simulated"
{more}
"""


def write_config(folder: Path, run: Location, **changes: Any) -> Path:
    values = {
        "out": "out dir",
        "unit": "xenium",
        "model": "none",
        "refine": "true",
        "min_counts": 10,
        "max_error_um": 5.0,
        "split": "train",
        "run": run,
        "slide": run / "he.ome.tif",
        "alignment": run / "he_imagealignment.csv",
        "more": "",
        **changes,
    }
    path = folder / "curate.toml"
    path.write_text(CONFIG.format(**values), encoding="utf-8")
    return path


def curate(folder: Path, run: Location, *options: str, **changes: Any) -> int:
    return main(["curate", str(write_config(folder, run, **changes)), "--workers", "1", *options])


def artifacts(out: Path) -> dict[str, tuple[int, int]]:
    """Every file of every artifact and shard set with its inode and time of change."""
    return {
        str(p.relative_to(out)): (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in (out / "runs").rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }


def samples(out: Path, split: str = "train") -> list[dict[str, Any]]:
    dataset, root = read_dataset(out)
    urls = [str(root / f"{name}.tar") for name in dataset.shards[split]]
    return list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))


def warp_of(out: Path) -> Warp:
    (folder,) = out.glob("runs/r1/registration/*")
    return read_registration(folder)[1]


@pytest.fixture(scope="module")
def curated(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config and what the compact network and all stages made of it."""
    folder = tmp_path_factory.mktemp("curated") / "über é"
    folder.mkdir()
    assert curate(folder, simulated, model="compact") == 0
    return folder


def test_pairs_are_the_cells_of_the_run(curated: Path, simulated: Path) -> None:
    out = curated / "out dir"
    assert validate(out) == []
    with open_xenium(simulated / "outs") as run:
        cells, matrix = run.read_cells(), run.read_matrix()
    assert matrix is not None
    row_of = {f"r1__{cell}": i for i, cell in enumerate(cells["cell_id"])}
    pairs = samples(out)
    dataset, _ = read_dataset(out)
    enough = int((np.asarray(matrix.sum(axis=1)).ravel() >= 10).sum())
    assert dataset.totals.kept == len(pairs)
    assert len(pairs) + dataset.totals.dropped["registration_error"] >= enough
    assert dataset.totals.seen == 300
    for pair in pairs:
        row = matrix[row_of[pair["__key__"]]]
        np.testing.assert_array_equal(pair["counts.npy"][0], row.indices)
        np.testing.assert_array_equal(pair["counts.npy"][1], row.data)
        assert pair["jpg"].shape == (224, 224, 3)
    # Neighbours on the slide are not neighbours in the shard: the order is that of a hash.
    keys = [pair["__key__"] for pair in pairs]
    assert keys != sorted(keys)


def test_neighbors_and_nuclei_of_the_index_are_those_of_the_truth(
    curated: Path, simulated: Path
) -> None:
    table = read_stream([curated / "out dir"], "train").table(
        ["cell_id", "x_um", "y_um", "neighbors", "nucleus", "registration_error_um"]
    )
    rows = table.to_pandas()
    truth = pd.read_parquet(simulated / "truth" / "cells.parquet").set_index("cell_id")
    he_px_from_xenium_um = warp_of(curated / "out dir")
    with open_xenium(simulated / "outs") as run:
        cells = run.read_cells().set_index("cell_id")
    at_um = rows.set_index("cell_id")[["x_um", "y_um"]]
    for row in rows.itertuples():
        assert len(row.neighbors) <= 5
        # Nearest first in the Xenium frame; offsets are those on the slide.
        near = [n["cell_id"] for n in row.neighbors if n["cell_id"] in at_um.index]
        away = np.linalg.norm(at_um.loc[near] - at_um.loc[row.cell_id], axis=1).tolist()
        assert away == sorted(away)
        assert max(away, default=0) <= 50
        for n in row.neighbors:
            assert n["cell_id"] in cells.index
            if n["cell_id"] in at_um.index:
                ends_um = at_um.loc[[row.cell_id, n["cell_id"]]].to_numpy()
                (offset_px,) = np.diff(he_px_from_xenium_um(ends_um), axis=0)
                np.testing.assert_allclose((n["dx_um"], n["dy_um"]), offset_px * 0.2738, atol=1e-6)
    # The H&E nucleus is attached to most cells (some have none on the slide, and the network was
    # trained on easier tissue), lies where the cell's own nucleus does and has
    # about its size.
    matched = rows[rows["nucleus"].notna()]
    assert len(matched) > 0.7 * len(rows)
    iou = np.array([n["iou"] for n in matched["nucleus"]])
    distance_um = np.array([n["distance_um"] for n in matched["nucleus"]])
    area_um2 = np.array([n["area_um2"] for n in matched["nucleus"]])
    true_um2 = truth.loc[matched["cell_id"], "nucleus_area_um2"].to_numpy()
    assert np.median(iou) > 0.6
    assert np.median(distance_um) < 0.8
    assert 0.75 < np.nanmedian(area_um2 / true_um2) < 1.35


def test_every_pair_has_the_error_and_the_place_of_its_cell(curated: Path, simulated: Path) -> None:
    out = curated / "out dir"
    columns = ["cell_id", "x_um", "y_um", "x_px", "y_px", "registration_error_um"]
    rows = read_stream([out], "train").table(columns).to_pandas().set_index("cell_id")
    placed = rows[["x_px", "y_px"]].to_numpy()
    np.testing.assert_array_equal(warp_of(out)(rows[["x_um", "y_um"]].to_numpy()), placed)
    (folder,) = out.glob("runs/r1/registration/*")
    cells = pd.read_parquet(folder / "cells.parquet").set_index("cell_id").loc[rows.index]
    np.testing.assert_array_equal(rows["registration_error_um"], cells["error_um"])
    assert rows["registration_error_um"].between(0, 5).all()
    # The given matrix is exact here: the refinement stays near it.
    transform = json.loads((simulated / "truth" / "transform.json").read_text())
    true_px = Affine.of(transform["xenium_um_from_he_px"]).inverse(
        rows[["x_um", "y_um"]].to_numpy()
    )
    off_um = np.linalg.norm(placed - true_px, axis=1) * 0.2738
    assert np.median(off_um) < 0.5
    dataset, _ = read_dataset(out)
    assert dataset.totals.noted["registration_error_not_assessed"] == 0


def test_a_second_run_redoes_nothing(
    curated: Path, simulated: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = curated / "out dir"
    before, pointer = artifacts(out), (out / "dataset.json").read_bytes()
    with caplog.at_level("INFO", logger="cellpair"):
        assert curate(curated, simulated, model="compact") == 0
    assert artifacts(out) == before
    assert (out / "dataset.json").read_bytes() == pointer
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("r1 ")]
    assert len(told) == 5
    assert all(" reused " in line for line in told)


def test_a_changed_filter_cuts_nothing_again(curated: Path, simulated: Path) -> None:
    out = curated / "out dir"
    before = artifacts(out)
    assert curate(curated, simulated, model="compact", min_counts=60) == 0
    new = set(artifacts(out)) - set(before)
    assert {name.split("/")[2] for name in new} == {"shards"}
    assert {k: v for k, v in artifacts(out).items() if k in before} == before
    dataset, _ = read_dataset(out)
    assert dataset.totals.dropped["low_counts"] > 0
    assert validate(out) == []


def test_a_changed_limit_of_the_error_cuts_nothing_again(curated: Path, simulated: Path) -> None:
    out = curated / "out dir"
    assert curate(curated, simulated, model="compact") == 0
    before = artifacts(out)
    (folder,) = out.glob("runs/r1/registration/*")
    error_um = pd.read_parquet(folder / "cells.parquet")["error_um"]
    limit_um = float(error_um.median())
    assert curate(curated, simulated, model="compact", max_error_um=limit_um) == 0
    assert {name.split("/")[2] for name in set(artifacts(out)) - set(before)} == {"shards"}
    dataset, _ = read_dataset(out)
    assert dataset.totals.dropped["registration_error"] == int((error_um > limit_um).sum())
    assert validate(out) == []


def test_a_changed_split_rewrites_no_shard(curated: Path, simulated: Path) -> None:
    out = curated / "out dir"
    assert curate(curated, simulated, model="compact") == 0
    before = artifacts(out)
    assert curate(curated, simulated, model="compact", split="test") == 0
    assert artifacts(out) == before
    dataset, _ = read_dataset(out)
    assert dataset.donors == {"D1": "test"}
    assert validate(out) == []


def test_two_folders_get_the_same_bytes(simulated: Path, tmp_path: Path) -> None:
    for side in ("a", "b"):
        (tmp_path / side).mkdir()
        assert curate(tmp_path / side, simulated) == 0
    a, b = (tmp_path / side / "out dir" for side in ("a", "b"))
    assert artifacts(a).keys() == artifacts(b).keys()
    for name in artifacts(a):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.fixture(scope="module")
def dotted(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """A slide that shows a dark dot at every true nucleus centre, and the cells that own one."""
    transform = json.loads((simulated / "truth" / "transform.json").read_text())
    with open_xenium(simulated / "outs") as run:
        nuclei, cells = run.read_nuclei(), run.read_cells()
    owned = nuclei[nuclei["cell_index"] >= 0].drop_duplicates("cell_index", keep=False)
    owned = owned.assign(cell_id=cells["cell_id"].to_numpy()[owned["cell_index"]])
    with tifffile.TiffFile(simulated / "he.ome.tif") as tif:
        height, width = tif.series[0].shape[:2]
    mpp = 0.2738
    dark = np.zeros((height, width))
    sigma_px = 0.6 / mpp
    he_px_from_xenium_um = Affine.of(transform["xenium_um_from_he_px"]).inverse
    for x, y in he_px_from_xenium_um(owned[["x_um", "y_um"]].to_numpy()):
        x0, y0 = int(x) - 12, int(y) - 12
        ys, xs = np.mgrid[y0 : y0 + 25, x0 : x0 + 25] + 0.5
        dot = np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * sigma_px**2))
        dark[y0 : y0 + 25, x0 : x0 + 25] += dot
    rgb = (250 - 220 * dark.clip(0, 1)).astype(np.uint8)[..., None].repeat(3, axis=2)
    path = tmp_path_factory.mktemp("dotted") / "dots.ome.tif"
    metadata = {
        "axes": "YXS",
        "PhysicalSizeX": mpp,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": mpp,
        "PhysicalSizeYUnit": "µm",
    }
    tifffile.imwrite(
        path, rgb, tile=(256, 256), photometric="rgb", compression="zlib", metadata=metadata
    )
    return path, owned


@pytest.mark.parametrize("alignment", ["he_imagealignment.csv", "he_keypoints.csv"])
def test_patches_are_centred_on_the_instruments_nucleus(
    simulated: Path, dotted: tuple[Path, pd.DataFrame], tmp_path: Path, alignment: str
) -> None:
    slide, owned = dotted
    assert (
        curate(tmp_path, simulated, slide=slide, alignment=simulated / alignment, min_counts=0) == 0
    )
    alone = cKDTree(owned[["x_um", "y_um"]].to_numpy()).query(
        owned[["x_um", "y_um"]].to_numpy(), k=2
    )[0][:, 1]
    wanted = {f"r1__{cell}" for cell in owned["cell_id"][alone > 5.0]}
    off = []
    for sample in samples(tmp_path / "out dir"):
        if sample["__key__"] in wanted:
            dark = 250.0 - sample["jpg"][102:122, 102:122, 0]  # 5 µm around the centre
            dark[dark < 25] = 0
            ys, xs = np.mgrid[102:122, 102:122] + 0.5
            off.append([(dark * along).sum() / dark.sum() - 112 for along in (xs, ys)])
    assert len(off) >= 200
    # Half a pixel in x and in y, and what the JPEG moves a dot; on the whole to no side.
    assert np.abs(off).max() < 0.55
    assert np.abs(np.mean(off, axis=0)).max() < 0.05


def change_matrix(
    simulated: Path, folder: Path, change: Callable[[np.ndarray], np.ndarray]
) -> Path:
    matrix = np.loadtxt(simulated / "he_imagealignment.csv", delimiter=",")
    path = folder / "changed.csv"
    np.savetxt(path, change(matrix), delimiter=",", fmt="%.12g")
    return path


def mirrored(matrix: np.ndarray) -> np.ndarray:
    width = 2200.0
    return matrix @ np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    ("change", "refine", "words"),
    [
        (np.linalg.inv, "false", "is stated"),
        (mirrored, "false", "variant with r"),
        (lambda m: m @ np.diag([1.06, 1.06, 1.0]), "false", "set mpp = 0.2902"),
        (np.linalg.inv, "true", "is stated"),
        (mirrored, "true", "from where their nuclei lie on the slide"),
    ],
    ids=["inverse", "mirrored", "wrong scale", "inverse, refined", "mirrored, refined"],
)
def test_a_wrong_alignment_fails_and_says_why(
    simulated: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[np.ndarray], np.ndarray],
    refine: str,
    words: str,
) -> None:
    alignment = change_matrix(simulated, tmp_path, change)
    assert curate(tmp_path, simulated, alignment=alignment, refine=refine) == 2
    assert words in caplog.text
    assert not (tmp_path / "out dir" / "dataset.json").exists()


def test_a_slightly_wrong_scale_is_doubtful_and_told(
    simulated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alignment = change_matrix(simulated, tmp_path, lambda m: m @ np.diag([1.03, 1.03, 1.0]))
    assert curate(tmp_path, simulated, alignment=alignment, refine="false") == 0
    assert "r1 registration doubtful" in caplog.text


def test_the_refinement_cures_a_scale_that_is_a_little_wrong(
    simulated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alignment = change_matrix(simulated, tmp_path, lambda m: m @ np.diag([1.03, 1.03, 1.0]))
    assert curate(tmp_path, simulated, alignment=alignment) == 0
    assert "r1 registration" not in caplog.text.replace("r1 registration: made", "")
    (folder,) = (tmp_path / "out dir").glob("runs/r1/registration/*")
    registration, _ = read_registration(folder)
    assert (registration.verdict, registration.refined) == ("pass", True)
    assert registration.implied_mpp == pytest.approx(0.2738, rel=0.005)
    assert registration.moved_um is not None
    assert registration.moved_um[2] > 5


def test_nuclei_that_match_as_predicted_are_not_told(curated: Path) -> None:
    said = (curated / "out dir" / "logs" / "r1.log").read_text()
    assert "cells: made" in said
    assert "matches:" not in said


def test_a_shifted_alignment_that_is_taken_as_given_is_told_by_its_matches(
    curated: Path, simulated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(curated / "out dir", tmp_path / "out dir")  # with the nuclei of the slide
    six_um = np.array([[1, 0, 6 / 0.2738], [0, 1, 0], [0, 0, 1]])
    alignment = change_matrix(simulated, tmp_path, lambda m: m @ six_um)
    shifted = {"model": "compact", "alignment": alignment, "refine": "false"}
    assert curate(tmp_path, simulated, **shifted) == 0
    (told,) = [r.getMessage() for r in caplog.records if "matches:" in r.getMessage()]
    assert told.startswith("r1 matches: ")
    assert "the cells lie farther from their nuclei than that" in told
    assert "let registration.refine be true" in told
    page = Page(tmp_path / "out dir" / "report" / "r1.html")
    (row,) = [row for row in page.tables["checks"] if "Cells with an H&E nucleus" in row]
    assert row[0] == "look"
    assert "Look here: " in page.text
    # What is reused is told again.
    caplog.clear()
    assert curate(tmp_path, simulated, **shifted) == 0
    assert told in caplog.messages


@pytest.mark.parametrize("refine", ["true", "false"])
def test_few_cells_are_taken_as_given_and_told(
    simulated: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    refine: str,
) -> None:
    limit = "automatic.MIN_NUCLEI" if refine == "true" else "stage.MIN_CELLS"
    monkeypatch.setattr(f"pairing.registration.{limit}", 1000)
    monkeypatch.setattr("pairing.registration.gates.MIN_CELLS", 1000)
    assert curate(tmp_path, simulated, refine=refine, max_error_um=0.01) == 0
    assert "r1 registration not_assessable" in caplog.text
    assert "taken as given" in caplog.text
    dataset, _ = read_dataset(tmp_path / "out dir")
    assert dataset.totals.dropped["registration_error"] == 0
    assert dataset.totals.noted["registration_error_not_assessed"] == dataset.totals.kept
    assert validate(tmp_path / "out dir") == []


def test_few_cells_are_never_registered_automatically(
    simulated: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pairing.registration.automatic.MIN_NUCLEI", 1000)
    assert curate(tmp_path, simulated, alignment="auto") == 2
    assert "not_assessable" in caplog.text
    assert not (tmp_path / "out dir" / "dataset.json").exists()


def test_without_an_alignment_the_cells_are_found(simulated: Path, tmp_path: Path) -> None:
    assert curate(tmp_path, simulated, alignment="auto") == 0
    rows = read_stream([tmp_path / "out dir"], "train").table(["x_um", "y_um", "x_px", "y_px"])
    frame = rows.to_pandas()
    transform = json.loads((simulated / "truth" / "transform.json").read_text())
    true_px = Affine.of(transform["xenium_um_from_he_px"]).inverse(frame[["x_um", "y_um"]])
    off_um = np.linalg.norm(frame[["x_px", "y_px"]].to_numpy() - true_px, axis=1) * 0.2738
    assert np.median(off_um) < 0.5
    assert validate(tmp_path / "out dir") == []


def test_a_median_error_above_the_limit_fails_and_makes_nothing_anew(
    simulated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert curate(tmp_path, simulated) == 0
    before = artifacts(tmp_path / "out dir")
    config = tmp_path / "curate.toml"
    text = config.read_text().replace("[filters]", "max_median_error_um = 0.01\n[filters]")
    config.write_text(text)
    assert main(["curate", str(config), "--workers", "1"]) == 2
    assert "µm off in the median, more than 0.01 µm" in caplog.text
    assert artifacts(tmp_path / "out dir") == before


def test_one_failed_run_leaves_the_others_and_the_dataset_where_they_were(
    simulated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert curate(tmp_path, simulated) == 0
    out = tmp_path / "out dir"
    pointer = (out / "dataset.json").read_bytes()
    broken = tmp_path / "broken"
    shutil.copytree(simulated / "outs", broken)
    (broken / "cells.parquet").write_bytes(b"PAR1 cut")
    second = f"""
[[runs]]
id = "r2"
xenium = "{broken}"
image = "morphology"
donor = "D2"
species = "human"
"""
    assert curate(tmp_path, simulated, more=second) == 2
    assert "cells.parquet" in caplog.text
    assert (out / "dataset.json").read_bytes() == pointer
    assert curate(tmp_path, simulated, "--partial", more=second) == 2
    dataset, _ = read_dataset(out)
    assert [run.run for run in dataset.runs] == ["r1"]
    assert curate(tmp_path, simulated, "--only", "r1", more=second) == 0
    assert curate(tmp_path, simulated, "--only", "r9", more=second) == 2


@pytest.mark.parametrize(
    "name",
    [
        "cells.parquet",
        "transcripts.parquet",
        "nucleus_boundaries.parquet",
        "cell_feature_matrix.h5",
        "cells.zarr.zip",
        "experiment.xenium",
    ],
)
def test_a_cut_file_of_the_bundle_is_named(
    simulated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(simulated, run)
    whole = (run / "outs" / name).read_bytes()
    (run / "outs" / name).write_bytes(whole[: len(whole) // 2])
    assert curate(tmp_path, run) == 2
    assert name in caplog.text
    assert not (tmp_path / "out dir" / "dataset.json").exists()


def test_a_cut_slide_is_named(
    simulated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slide = tmp_path / "cut.ome.tif"
    whole = (simulated / "he.ome.tif").read_bytes()
    slide.write_bytes(whole[: len(whole) // 2])
    assert curate(tmp_path, simulated, slide=slide) == 2
    assert "cut.ome.tif" in caplog.text


def test_blocks_on_dask_give_the_same_bytes(simulated: Path, tmp_path: Path) -> None:
    for side, workers in (("a", "1"), ("b", "2")):
        (tmp_path / side).mkdir()
        config = write_config(tmp_path / side, simulated)
        assert main(["curate", str(config), "--workers", workers]) == 0
    a, b = (tmp_path / side / "out dir" for side in ("a", "b"))
    for name in artifacts(a):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_pairs_of_he_nuclei(curated: Path, simulated: Path, tmp_path: Path) -> None:
    """From the same nuclei: each a pair with what lies in it and within 5 µm of it."""
    folder = tmp_path / "nuclei"
    shutil.copytree(curated, folder)
    before = artifacts(folder / "out dir")
    labels = tmp_path / "labels.csv"
    labels.write_text("cell_id,label\nhe-1,first\nhe-2,second\n")
    changes = {"model": "compact", "min_counts": 1, "more": f'labels = "{labels}"'}
    assert curate(folder, simulated, unit="he_nuclei", **changes) == 0
    out = folder / "out dir"
    assert validate(out) == []
    made = {name.split("/")[2] for name in artifacts(out).keys() - before.keys()}
    assert made == {"cells", "patches", "shards"}

    (nuclei_file,) = out.glob("runs/r1/nuclei/*/nuclei.parquet")
    nuclei = pd.read_parquet(nuclei_file).set_index("nucleus_id")
    columns = ["cell_id", "x_px", "y_px", "center", "label", "n_counts", "nucleus", "neighbors"]
    stream = read_stream([out], "train")
    rows = stream.table([*columns, "registration_error_um"]).to_pandas()
    assert 150 < len(rows) < len(nuclei)
    truth = pd.read_parquet(simulated / "truth" / "cells.parquet")
    tree = cKDTree(truth[["x_px", "y_px"]])
    for row in rows.itertuples():
        number = row.nucleus["id"]
        assert row.cell_id == f"he-{number}"
        assert (row.nucleus["iou"], row.nucleus["distance_um"], row.center) == (1, 0, "nucleus")
        nucleus = nuclei.loc[number]
        assert np.hypot(row.x_px - nucleus.x_px, row.y_px - nucleus.y_px) < 1e-3
        assert row.label == {1: "first", 2: "second"}.get(number)
        assert row.registration_error_um <= 5
        assert all(n["cell_id"].startswith("he-") for n in row.neighbors)
    # What lies in the nuclei is, by and large, what the instrument gave to its cells there.
    with open_xenium(simulated / "outs") as run:
        matrix = run.read_matrix()
    assert matrix is not None
    away_px, cell = tree.query(rows[["x_px", "y_px"]])
    near = away_px < 4 / 0.2738
    n_of_instrument = np.asarray(matrix.sum(axis=1)).ravel()[cell[near]]
    assert near.mean() > 0.8
    assert np.corrcoef(np.log1p(rows["n_counts"][near]), np.log1p(n_of_instrument))[0, 1] > 0.6
    page = Page(out / "report" / "r1.html")
    assert "The cells of this run are the H&E nuclei themselves" in page.text
    assert "match" not in page.tables


def test_he_nuclei_need_transcripts(
    simulated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    shutil.copytree(simulated, run)
    (run / "outs" / "transcripts.parquet").unlink()
    assert curate(tmp_path, run, model="compact", unit="he_nuclei") == 2
    assert 'which unit = "he_nuclei" looks up' in caplog.text
    assert not list((tmp_path / "out dir").glob("runs/r1/nuclei/*"))


def test_info_tells_what_a_path_is(
    curated: Path, simulated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = curated / "out dir"
    tar = next(out.glob("runs/*/shards/*/*.tar"))
    kinds = {}
    for path in (simulated / "outs", simulated / "he.ome.tif", tar, out, out / "dataset.json"):
        assert main(["info", str(path), "--json"]) == 0
        kinds[path.name] = json.loads(capsys.readouterr().out)["kind"]
    assert list(kinds.values()) == ["xenium", "slide", "shard", "dataset", "dataset"]
    assert main(["info", str(out / "nothing")]) == 2
    assert os.fspath(out / "nothing") in capsys.readouterr().err
