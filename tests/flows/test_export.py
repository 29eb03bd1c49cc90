"""`cellpair export`: h5ad and open_clip's tars hold what the shards hold, whole or not at all."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image
from scipy import sparse

from flows.cli import main
from flows.export.genes import JoinedGenes
from flows.export.h5ad import index_type
from flows.export.openclip import write_openclip
from flows.export.sentences import Sentences
from flows.export.source import open_source
from flows.outfolder import OUT_FILE, OutFolder
from shards.dataset import read_dataset, read_panels
from shards.schema import Gene, Panel
from shards.write import Sample
from tests.shards.tiny import tiny_panel, write_tiny_dataset

# Another order than that of the first panel, one gene of it, one by another symbol, one of its own.
OTHER = Panel.of(
    "human",
    [
        Gene(symbol="OWN", ensembl="ENSG99999999999"),
        Gene(symbol="RENAMED", ensembl=f"ENSG{7:011d}"),
        Gene(symbol="GENE3"),
        *(Gene(symbol=f"GENE{i}", ensembl=f"ENSG{i:011d}") for i in range(39, 9, -1)),
    ],
)
MOUSE = Panel.of("mouse", [Gene(symbol=f"Gene{i}") for i in range(40)])


def as_neighbors(samples: list[Sample]) -> list[Sample]:
    """Each sample's neighbours are the one before and one that is in no shard; flags differ."""
    changed = []
    for i, sample in enumerate(samples):
        near = [{"cell_id": "elsewhere-1", "dx_um": 1.0, "dy_um": 1.0}]
        near += [{"cell_id": s.cell_id, "dx_um": 3.0, "dy_um": -4.0} for s in samples[i - 1 : i]]
        flags = ["edge"] if i % 3 == 0 else []
        changed.append(replace(sample, row={**sample.row, "neighbors": near, "flags": flags}))
    return changed


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs of 50 samples in shards of 20, of three panels and two species."""
    return write_tiny_dataset(
        tmp_path_factory.mktemp("dataset") / "é out",
        {"D1": "train", "D2": "train", "D3": "test", "M": "val"},
        panels={"D2": OTHER, "M": MOUSE},
        changed=as_neighbors,
    )


def export(dataset: Path, to: str, out: Path, *options: str) -> int:
    return main(["export", str(dataset), "--to", to, "--out", str(out), *options])


def pairs(dataset: Path) -> dict[str, dict[str, Any]]:
    """All samples by key, as plain webdataset reads them, with their rows of the tables."""
    record, root = read_dataset(dataset)
    found: dict[str, dict[str, Any]] = {}
    for split, names in record.shards.items():
        for name in names:
            rows = pq.read_table(root / f"{name}.parquet").to_pylist()
            samples = webdataset.WebDataset(str(root / f"{name}.tar"), shardshuffle=False)
            for row, sample in zip(rows, samples, strict=True):
                assert row["key"] == sample["__key__"]
                counts = np.load(io.BytesIO(sample["counts.npy"]))
                found[row["key"]] = {**sample, "counts": counts, "row": row, "split": split}
    return found


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def as_h5ad(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("h5ad") / "new" / "export"
    assert export(dataset, "h5ad", out) == 0
    assert os.listdir(out.parent) == ["export"]
    return out


def test_h5ad_holds_the_counts_of_the_shards(dataset: Path, as_h5ad: Path) -> None:
    known, panels = pairs(dataset), read_panels(*read_dataset(dataset))
    assert sorted(os.listdir(as_h5ad)) == ["export.json", "human.h5ad", "mouse.h5ad"]
    n_rows = 0
    for species in ("human", "mouse"):
        data = anndata.read_h5ad(as_h5ad / f"{species}.h5ad")
        assert isinstance(data.X, sparse.csr_matrix)
        assert data.X.has_canonical_format
        assert (data.X.dtype, data.X.indices.dtype, data.X.indptr.dtype) == (np.int32,) * 3
        n_rows += data.n_obs
        for i, key in enumerate(data.obs_names):
            counts, row = known[key]["counts"], known[key]["row"]
            genes = panels[row["panel"]].genes
            name = {"RENAMED": "GENE7"}
            said = {
                name.get(genes[g].symbol, genes[g].symbol): int(n)
                for g, n in zip(*counts.tolist(), strict=True)
            }
            found = data.X[i]
            assert dict(zip(data.var_names[found.indices], found.data, strict=True)) == said
            assert data.obs["n_counts"].iloc[i] == found.sum() == row["n_counts"]
    assert n_rows == len(known) == 200


def test_h5ad_tells_what_a_panel_did_not_measure(as_h5ad: Path) -> None:
    data = anndata.read_h5ad(as_h5ad / "human.h5ad")
    assert list(data.var_names) == [f"GENE{i}" for i in range(40)] + ["OWN"]
    measured = data.varm["measured"]
    first, other = tiny_panel().panel_id, OTHER.panel_id
    assert list(measured.columns) == [first, other]
    assert measured[first].tolist() == [True] * 40 + [False]
    assert [i for i in range(41) if not measured[other].iloc[i]] == [0, 1, 2, 4, 5, 6, 8, 9]
    assert data.var["measured_in_all"].sum() == 32
    notes = json.loads((as_h5ad / "export.json").read_text())["notes"]
    assert [note.partition(" are")[0] for note in notes] == ["human.h5ad: 9 of 41 genes"]
    of_panel = data.obs["panel"] == other
    assert set(data.obs.loc[of_panel, "run"]) == {"run1"}
    assert data[of_panel, ~measured[other].to_numpy()].X.nnz == 0


def test_h5ad_rows_are_those_of_the_index_tables(dataset: Path, as_h5ad: Path) -> None:
    known = pairs(dataset)
    data = anndata.read_h5ad(as_h5ad / "human.h5ad")
    fingerprint = read_dataset(dataset)[0].fingerprint
    assert data.uns["cellpair"]["fingerprint"] == fingerprint
    assert data.uns["cellpair"]["patch"]["run0"]["fov_um"] == 32.0
    rows = [known[key]["row"] for key in data.obs_names]
    for name in ("cell_id", "run", "donor", "tissue", "label", "panel", "center", "x_um", "mpp"):
        assert data.obs[name].tolist() == [row[name] for row in rows], name
    assert data.obs["split"].tolist() == [known[key]["split"] for key in data.obs_names]
    assert data.obs["split"].cat.categories.tolist() == ["train", "test"]
    assert data.obs["flag_edge"].tolist() == ["edge" in row["flags"] for row in rows]
    for field in ("id", "iou", "area_um2"):
        said = [row["nucleus"] and row["nucleus"][field] for row in rows]
        pd.testing.assert_series_equal(
            data.obs[f"nucleus_{field}"].astype(float),
            pd.Series(said, data.obs_names, float, name=f"nucleus_{field}"),
        )
    assert data.obs["nucleus_id"].dtype == "Int64"
    assert data.obs["registration_error_um"].isna().all()
    np.testing.assert_array_equal(data.obsm["spatial"], data.obs[["x_um", "y_um"]])
    np.testing.assert_array_equal(data.obsm["spatial_px"], data.obs[["x_px", "y_px"]])
    # Each sample's one neighbour that is a sample is the one before it in its run.
    row_of_cell = {cell: i for i, cell in enumerate(data.obs["cell_id"])}
    graph = data.obsp["spatial_distances"].tocoo()
    near = {
        (i, row_of_cell[f"run{run}{n - 1:05d}-1"])
        for run in range(3)
        for n in range(1, 50)
        for i in [row_of_cell[f"run{run}{n:05d}-1"]]
    }
    assert set(zip(graph.row.tolist(), graph.col.tolist(), strict=True)) == near
    assert set(graph.data) == {5.0}
    connected = data.obsp["spatial_connectivities"]
    assert (connected.nnz, set(connected.data)) == (len(near), {1.0})
    assert data.uns["spatial_neighbors"]["distances_key"] == "spatial_distances"


def many_counts(samples: list[Sample]) -> list[Sample]:
    counts = np.array([[2, 9], [70_000, 1]], np.uint32)
    row = {**samples[0].row, "n_counts": 70_001}
    return [replace(samples[0], counts=counts, row=row), *samples[1:]]


def test_counts_beyond_16_bits_are_whole(tmp_path: Path) -> None:
    root = write_tiny_dataset(tmp_path / "in", {"D": "train"}, n_per_donor=3, changed=many_counts)
    assert export(root, "h5ad", tmp_path / "out") == 0
    data = anndata.read_h5ad(tmp_path / "out" / "human.h5ad")
    assert data["run0__run000000-1"].X.toarray().nonzero()[1].tolist() == [2, 9]
    assert data.X.max() == 70_000


def test_h5ad_is_what_anndata_itself_writes(as_h5ad: Path, tmp_path: Path) -> None:
    data = anndata.read_h5ad(as_h5ad / "human.h5ad")
    data.write_h5ad(tmp_path / "again.h5ad")
    again = anndata.read_h5ad(tmp_path / "again.h5ad")
    pd.testing.assert_frame_equal(data.obs, again.obs)
    pd.testing.assert_frame_equal(data.var, again.var)
    assert (data.X != again.X).nnz == 0
    backed = anndata.read_h5ad(as_h5ad / "human.h5ad", backed="r")
    assert (backed[100:120].to_memory().X != data[100:120].X).nnz == 0
    backed.file.close()


def test_more_entries_than_32_bits_count_have_wider_indices() -> None:
    assert (index_type(2**31 - 1), index_type(2**31)) == (np.int32, np.int64)


def test_exports_are_the_same_bytes_and_say_what_they_are(
    dataset: Path, as_h5ad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(dataset, "h5ad", tmp_path / "again") == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("human.h5ad: 150 samples")
    assert listing(tmp_path / "again") == listing(as_h5ad)
    record = json.loads((as_h5ad / "export.json").read_text())
    assert record["fingerprint"] == read_dataset(dataset)[0].fingerprint
    assert record["samples"] == {"train": 100, "val": 50, "test": 50}
    assert record["files"]["mouse.h5ad"] == {
        "n_samples": 50,
        "n_bytes": (as_h5ad / "mouse.h5ad").stat().st_size,
    }


def test_info_tells_what_an_export_is(as_h5ad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(as_h5ad), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kind"], facts["to"], facts["runs"][0]) == ("export", "h5ad", "run0")


def test_splits_and_runs_can_be_chosen(dataset: Path, tmp_path: Path) -> None:
    assert export(dataset, "h5ad", tmp_path / "a", "--split", "train", "--run", "run1") == 0
    data = anndata.read_h5ad(tmp_path / "a" / "human.h5ad")
    assert (data.n_obs, data.n_vars) == (50, len(OTHER.genes))
    assert data.obs["run"].cat.categories.tolist() == ["run1"]
    assert export(dataset, "openclip", tmp_path / "b", "--split", "test", "--split", "val") == 0
    assert sorted(os.listdir(tmp_path / "b")) == ["export.json", "test", "val"]


@pytest.fixture(scope="module")
def as_openclip(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("openclip") / "export"
    assert export(dataset, "openclip", out, "--top-k", "5") == 0
    return out


def test_open_clip_reads_patches_and_gene_sentences(dataset: Path, as_openclip: Path) -> None:
    known, panels = pairs(dataset), read_panels(*read_dataset(dataset))
    record = json.loads((as_openclip / "export.json").read_text())
    n_read = 0
    for split in ("train", "val", "test"):
        sizes = json.loads((as_openclip / split / "sizes.json").read_text())
        assert sorted(sizes) == sorted(p.name for p in (as_openclip / split).glob("*.tar"))
        urls = [str(as_openclip / split / name) for name in sizes]
        # The steps of open_clip's own pipeline, in its order.
        samples = list(
            webdataset.DataPipeline(
                webdataset.SimpleShardList(urls),
                webdataset.tarfile_to_samples(),
                webdataset.select(lambda sample: "txt" in sample and "jpg" in sample),
                webdataset.decode("pilrgb"),
                webdataset.rename(image="jpg;png;jpeg;webp", text="txt", key="__key__", row="json"),
                webdataset.to_tuple("image", "text", "key", "row"),
            )
        )
        assert sum(sizes.values()) == len(samples) == record["files"][split]["n_samples"]
        for image, text, key, row in samples:
            pair = known[key]
            assert pair["split"] == split
            assert isinstance(image, Image.Image)
            symbols = [gene.symbol for gene in panels[pair["row"]["panel"]].genes]
            ranked = sorted(zip(*pair["counts"].tolist(), strict=True), key=lambda p: (-p[1], p[0]))
            assert text == " ".join(symbols[g] for g, _ in ranked[:5])
            assert row == {name: pair["row"][name] for name in row}
            assert {"donor", "x_um", "nucleus", "flags", "mpp", "panel"} <= row.keys()
        n_read += len(samples)
    assert n_read == len(known)


def test_patches_are_the_bytes_of_the_shards_and_donors_are_mixed(
    dataset: Path, as_openclip: Path
) -> None:
    known = pairs(dataset)
    with tarfile.open(as_openclip / "train" / "train-000000.tar") as tar:
        members = [(m.name, m.mtime, m.uid) for m in tar.getmembers()]
        images = {m.name: tar.extractfile(m) for m in tar.getmembers() if m.name.endswith("jpg")}
        for name, file in images.items():
            assert file is not None
            assert file.read() == known[name.removesuffix(".jpg")]["jpg"]
    assert {(mtime, uid) for _, mtime, uid in members} == {(0, 0)}
    donors = [known[name.removesuffix(".jpg")]["row"]["donor"] for name in images]
    for start in range(0, 100, 20):
        assert 6 <= donors[start : start + 20].count("D1") <= 14


def test_open_clip_tars_are_the_same_bytes(
    dataset: Path, as_openclip: Path, tmp_path: Path
) -> None:
    assert export(dataset, "openclip", tmp_path / "again", "--top-k", "5") == 0
    assert listing(tmp_path / "again") == listing(as_openclip)


def test_tars_end_where_they_are_full(dataset: Path, tmp_path: Path) -> None:
    source = open_source(dataset, ["train"], [])
    assert write_openclip(tmp_path, source, "train", 50, tar_samples=30) == 100
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert sizes == {f"train-{i:06d}.tar": n for i, n in enumerate((30, 30, 30, 10))}


def only_housekeeping(samples: list[Sample]) -> list[Sample]:
    """The first sample has counts of the first gene alone."""
    counts = np.array([[0], [9]], np.uint16)
    return [replace(samples[0], counts=counts, row={**samples[0].row, "n_counts": 9}), *samples[1:]]


def test_samples_without_a_sentence_are_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    panel = Panel.of("human", [Gene(symbol="MT-CO1"), *tiny_panel().genes[1:]])
    root = write_tiny_dataset(tmp_path / "in", panel=panel, changed=only_housekeeping)
    assert export(root, "openclip", tmp_path / "out") == 0
    assert "train: 98 samples" in capsys.readouterr().out
    assert "train: 2 samples are left out: no gene is left to say" in caplog.text
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["files"]["train"]["n_samples"] == 98
    assert len(record["notes"]) == 2


@pytest.mark.parametrize(
    ("symbol", "is_said"),
    [
        *((symbol, False) for symbol in ("RPL10A", "RPLP0", "RPS4Y1", "RPSA", "RPL36AL", "RPL7L1")),
        *((symbol, False) for symbol in ("Rps27l", "MT-ND4L", "mt-Co1", "RPS3A", "RPL22L1")),
        *((symbol, True) for symbol in ("RPS6KA1", "RPS6KB2", "RPS19BP1", "MTOR", "MRPL12")),
        *((symbol, True) for symbol in ("ARPS1", "MT1X", "RPE65", "EPCAM")),
    ],
)
def test_housekeeping_genes_are_told_by_whole_symbols(symbol: str, is_said: bool) -> None:
    panel = Panel.of("human", [Gene(symbol=symbol)])
    assert Sentences(panel, 3).of(np.array([[0], [4]], np.uint16)) == (symbol if is_said else "")


def test_genes_of_equal_counts_are_said_in_the_order_of_the_panel() -> None:
    panel = Panel.of("human", [Gene(symbol=s) for s in ("D", "C", "RPL3", "B", "A")])
    counts = np.array([[0, 1, 2, 3, 4], [1, 70_000, 99_999, 2, 2]], np.uint32)
    assert Sentences(panel, 3).of(counts) == "C B A"
    assert Sentences(panel, 50).of(counts) == "C B A D"


def test_genes_are_joined_by_ensembl_id_else_by_symbol() -> None:
    a = Panel.of("human", [Gene(symbol="A", ensembl="E1"), Gene(symbol="B"), Gene(symbol="C")])
    b = Panel.of(
        "human",
        [
            Gene(symbol="A", ensembl="E2"),  # another gene of that symbol
            Gene(symbol="OLD", ensembl="E1"),
            Gene(symbol="B", ensembl="E3"),
        ],
    )
    joined = JoinedGenes.of([a, b])
    assert joined.var().index.tolist() == ["A-E1", "B", "C", "A-E2"]
    assert joined.places[b.panel_id].tolist() == [3, 0, 1]
    assert joined.measured()[b.panel_id].tolist() == [True, True, False, True]
    assert joined.var()["n_panels"].tolist() == [2, 2, 1, 1]


def shard_of(root: Path, run: str, suffix: str) -> Path:
    return max(root.glob(f"runs/{run}/shards/*/*{suffix}"))


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize("to", ["h5ad", "openclip"])
def test_a_damaged_dataset_leaves_nothing(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write_tiny_dataset(tmp_path / "in"), tmp_path / "new" / "out"
    tar, table = shard_of(root, "run1", ".tar"), shard_of(root, "run1", ".parquet")
    whole = {path: path.read_bytes() for path in (tar, table)}
    row = pq.read_table(table).to_pylist()[3]
    for path, at, words in [
        (tar, row["counts_offset"] + row["counts_size"] - 1, tar.name),
        (table, 100, "the table that the manifest names"),
    ]:
        damage(path, at)
        assert export(root, to, out) == 2
        assert words in capsys.readouterr().err
        path.write_bytes(whole[path])
    tar.write_bytes(whole[tar][:-512])
    assert export(root, to, out) == 2
    assert f"{len(whole[tar])} bytes" in capsys.readouterr().err
    assert not out.exists()
    assert list(out.parent.glob("*")) + list(out.parent.glob(".*")) == []


def test_what_a_killed_export_left_is_not_taken_for_one(dataset: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.export.partial"
    left.mkdir()
    (left / "human.h5ad").write_bytes(b"half")
    assert export(dataset, "h5ad", tmp_path / "out", "--run", "run0") == 0
    assert os.listdir(tmp_path) == ["out"]
    assert sorted(os.listdir(tmp_path / "out")) == ["export.json", "human.h5ad"]


def killed_at_work(command: list[str], aside: Path) -> bool:
    """Whether the command was killed after it began to write, and before it was done."""
    process = subprocess.Popen([sys.executable, "-m", "flows.cli", *command])
    try:
        while process.poll() is None and not list(aside.glob("*/*.tar")):
            time.sleep(0.001)
    finally:
        process.kill()
    return process.wait() == -signal.SIGKILL


def test_a_killed_export_is_made_again(tmp_path: Path) -> None:
    root, out = write_tiny_dataset(tmp_path / "in", n_per_donor=500), tmp_path / "new" / "out"
    command = ["export", str(root), "--to", "openclip", "--out", str(out)]
    for _ in range(5):  # it may be done before it is seen at work
        if killed_at_work(command, out.parent / ".out.export.partial"):
            break
        shutil.rmtree(out)
    assert not out.exists()
    assert main(command) == 0
    assert os.listdir(out.parent) == ["out"]
    assert main([*command[:-1], str(tmp_path / "other")]) == 0
    assert listing(out) == listing(tmp_path / "other")


@pytest.mark.parametrize(
    ("to", "options", "words"),
    [
        ("bags", ["--checkpoint", "c"], "not there yet"),
        ("h5ad", ["--checkpoint", "c"], "not there yet"),
        ("h5ad", ["--top-k", "3"], "--top-k\n  expected: with --to openclip"),
        ("openclip", ["--outlines", "circles"], "expected: with --to spatialdata"),
        ("h5ad", ["--run", "run9"], "runs of the dataset: run0, run1"),
        ("h5ad", ["--run", "run0", "--split", "test"], "at least one sample to export"),
    ],
)
def test_bad_usage_has_words(
    to: str,
    options: list[str],
    words: str,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert export(dataset, to, tmp_path / "out", *options) == 2
    assert words in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_folders_that_are_in_use_are_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(dataset, "h5ad", tmp_path) == 2
    assert "expected: a folder that is not there yet" in capsys.readouterr().err
    assert export(dataset, "h5ad", dataset / "export") == 2
    assert "outside of the dataset's own" in capsys.readouterr().err
    assert not (dataset / "export").exists()


def test_a_dataset_with_a_withdrawn_donor_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_tiny_dataset(tmp_path / "in")
    (root / OUT_FILE).write_text(OutFolder(name="tiny", withdrawn=("D2",)).model_dump_json())
    assert export(root, "h5ad", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "1 of them in dataset" in err
    assert "D2" not in err
