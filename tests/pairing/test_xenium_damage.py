"""Bundles that are not whole: still being copied, cut off, damaged."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

import pytest

from pairing.simulate import SimulationParams, simulate
from pairing.simulate.params import BundleParams
from pairing.xenium import open_xenium
from shards.errors import BadInput
from tests.pairing.handmade import Bundle, read_all, zipped


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle(tmp_path / "outs")


@pytest.mark.parametrize(
    "name",
    [
        "transcripts.parquet.part", "morphology.ome.tif.filepart", "cells.zarr.zip.crdownload",
        ".transcripts.parquet.k3Jd9a", "morphology_focus/ch0000_dapi.ome.tif.partial",
    ],
)  # fmt: skip
@pytest.mark.parametrize("in_zip", [False, True])
def test_a_bundle_that_is_still_being_copied(name: str, in_zip: bool, bundle: Bundle) -> None:
    path = bundle.write()
    (path / name).write_bytes(b"x")
    if in_zip:
        path = zipped(path.with_name("outs.zip"), path)
    words = rf"(?s)copied whole.*{re.escape(name)}, the name of.*wait until"
    with pytest.raises(BadInput, match=words), open_xenium(path):
        pass


def test_names_that_only_look_unfinished(bundle: Bundle) -> None:
    path = bundle.write()
    for name in (".end-of-run", ".DS_Store", "._cells.parquet.part", "notes.part2.txt"):
        (path / name).write_text("x")
    read_all(path)


@pytest.mark.parametrize(
    "name", ["experiment.xenium", "cells.parquet", "transcripts.parquet", "cell_feature_matrix.h5"]
)
@pytest.mark.parametrize("in_zip", [False, True])
def test_files_without_content(name: str, in_zip: bool, bundle: Bundle) -> None:
    path = bundle.write()
    (path / name).write_bytes(b"")
    if in_zip:
        path = zipped(path.with_name("outs.zip"), path)
    with pytest.raises(BadInput, match=rf"(?s){re.escape(name)}\n.*0 bytes.*wait until"):
        read_all(path)


@pytest.mark.parametrize("stem", ["cells", "transcripts"])
def test_files_that_are_needed(stem: str, bundle: Bundle) -> None:
    bundle.features = None
    path = bundle.write()
    (path / f"{stem}.parquet").unlink()
    with pytest.raises(BadInput, match=stem):
        read_all(path)


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that has every kind of file."""
    run = tmp_path_factory.mktemp("old") / "run"
    simulate(run, SimulationParams(n_cells=30, bundle=BundleParams(layout="xoa-1.3")))
    return run / "outs"


CUT = {
    "transcripts.parquet": [],
    "cells.parquet": [],
    "nucleus_boundaries.parquet": [],
    "cell_boundaries.parquet": [],
    "cells.zarr.zip": [],
    "gene_panel.json": ["cell_feature_matrix.h5", "cell_feature_matrix/matrix.mtx.gz"],
    "cell_feature_matrix.h5": [],
    "cell_feature_matrix/matrix.mtx.gz": ["cell_feature_matrix.h5"],
    "cell_feature_matrix/features.tsv.gz": ["cell_feature_matrix.h5"],
    "cell_feature_matrix/barcodes.tsv.gz": ["cell_feature_matrix.h5"],
    "transcripts.csv.gz": ["transcripts.parquet"],
    "cells.csv.gz": ["cells.parquet"],
    "nucleus_boundaries.csv.gz": ["nucleus_boundaries.parquet"],
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_files_that_are_cut_off(name: str, share: float, old_run: Path, tmp_path: Path) -> None:
    """Without what would be read in its place, each is refused by name wherever it ends."""
    path = tmp_path / "outs"
    shutil.copytree(old_run, path)
    for other in CUT[name]:
        (path / other).unlink()
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: max(1, int(share * len(content)))])
    with pytest.raises(BadInput, match=re.escape(name)):
        read_all(path)


def test_a_zip_that_is_cut_off(bundle: Bundle, tmp_path: Path) -> None:
    path = zipped(tmp_path / "outs.zip", bundle.write())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match="without its end"), open_xenium(path):
        pass


def test_a_zip_that_is_damaged(bundle: Bundle, tmp_path: Path) -> None:
    path = zipped(tmp_path / "outs.zip", bundle.write())
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        first = file.getinfo("transcripts.parquet").header_offset
    content[first + 200] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"(?s)transcripts\.parquet.*a member that unpacks"):
        read_all(path)


def test_a_zip_packed_in_a_way_that_is_not_read(bundle: Bundle, tmp_path: Path) -> None:
    path = zipped(tmp_path / "outs.zip", bundle.write())
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        central = file.start_dir
    # Method 9, deflate64, of the first member in the directory and in its own header.
    content[central + 10] = content[8] = 9
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"(?s)compression method.*unpack it and give the folder"):
        read_all(path)
