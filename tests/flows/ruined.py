"""Ways to ruin a run: each gets a folder with a whole simulated one, and breaks one thing in it.

The folder is made of hard links, so that what is changed is replaced, never written into.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import tifffile

HE_MPP = 0.2738
FIRST = object()  # the value of the first row
Ruin = Callable[[Path], None]


def copy_by_links(simulated: Path, folder: Path) -> Path:
    """A copy whose bundle has content of its own, so that no two are the same bundle."""
    for name in ("outs", "he.ome.tif", "he_imagealignment.csv", "he_keypoints.csv"):
        source = simulated / name
        folder.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, folder / name, copy_function=os.link)
        else:
            os.link(source, folder / name)
    (folder / "outs" / "copy.txt").write_text(folder.name)
    return folder


def replace(path: Path, content: bytes | str) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def emptied(name: str) -> Ruin:
    return lambda folder: replace(folder / name, b"")


def cut(name: str) -> Ruin:
    def ruin(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        replace(folder / name, whole[: len(whole) // 2])

    return ruin


def filled(name: str, content: bytes | str) -> Ruin:
    return lambda folder: replace(folder / name, content)


def made_a_folder(name: str) -> Ruin:
    def ruin(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return ruin


def made_a_loop(name: str) -> Ruin:
    def ruin(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / name)

    return ruin


def table(name: str, change: Callable[[pa.Table], pa.Table]) -> Ruin:
    """A Parquet file of the bundle, changed."""

    def ruin(folder: Path) -> None:
        path = folder / "outs" / name
        changed = change(pq.read_table(path))
        path.unlink()
        pq.write_table(changed, path)

    return ruin


def with_value(column: str, row: int, new: Any) -> Callable[[pa.Table], pa.Table]:
    """The first rows stay; a new value in one row of a column."""

    def change(rows: pa.Table) -> pa.Table:
        values = rows[column].to_pylist()
        values[row] = values[0] if new is FIRST else new
        i = rows.schema.get_field_index(column)
        return rows.set_column(i, rows.schema.field(i), pa.array(values, rows.schema.types[i]))

    return change


def experiment(**changes: Any) -> Ruin:
    def ruin(folder: Path) -> None:
        path = folder / "outs" / "experiment.xenium"
        told = {**json.loads(path.read_text()), **changes}
        replace(path, json.dumps({k: v for k, v in told.items() if v is not None}))

    return ruin


def slide(change: Callable[[np.ndarray], np.ndarray], mpp: float | None = HE_MPP) -> Ruin:
    """The slide with its pixels changed, of a stated pixel size."""

    def ruin(folder: Path) -> None:
        path = folder / "he.ome.tif"
        image = change(tifffile.imread(path, level=0))
        path.unlink()
        size = {} if mpp is None else {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
        photometric = "rgb" if image.shape[-1] == 3 else "minisblack"
        axes = "YXS" if image.ndim == 3 else "YX"
        tifffile.imwrite(
            path, image, photometric=photometric, tile=(256, 256), compression="zlib",
            metadata={"axes": axes, **size},
        )  # fmt: skip

    return ruin


def alignment(text: str) -> Ruin:
    return lambda folder: replace(folder / "he_imagealignment.csv", text)


def keypoints(*points: tuple[float, float]) -> Ruin:
    """Keypoints in pixels of the morphology image, each on the same place of the slide."""
    rows = "".join(f"{x},{y},{x},{y}\n" for x, y in points)
    return alignment(f"fixedX,fixedY,alignmentX,alignmentY\n{rows}")


def with_the_right_slide_beside(folder: Path) -> None:
    """An export at three quarters of the resolution, called as the slide is, and given for it."""
    whole = tifffile.imread(folder / "he.ome.tif", level=0)
    ys, xs = (np.arange(0, n - 1, 4 / 3).astype(int) for n in whole.shape[:2])
    mpp = HE_MPP * 4 / 3
    tifffile.imwrite(
        folder / "he.tif", whole[ys][:, xs], photometric="rgb", tile=(256, 256), metadata=None,
        resolution=(1e4 / mpp, 1e4 / mpp), resolutionunit="CENTIMETER",
    )  # fmt: skip


def transcripts_of_a_cut_csv_gz(folder: Path) -> None:
    path = folder / "outs" / "transcripts.parquet"
    text = io.BytesIO()
    pa.csv.write_csv(pq.read_table(path), text)
    path.unlink()
    whole = gzip.compress(text.getvalue())
    (folder / "outs" / "transcripts.csv.gz").write_bytes(whole[: len(whole) // 2])


def zipped(change: Callable[[zipfile.ZipFile], None]) -> Ruin:
    """The bundle as outs.zip, with what `change` adds to the archive."""

    def ruin(folder: Path) -> None:
        with zipfile.ZipFile(folder / "outs.zip", "w") as archive:
            for path in sorted((folder / "outs").rglob("*")):
                if path.is_file():
                    archive.write(path, path.relative_to(folder))
            change(archive)

    return ruin


def member(name: str) -> Ruin:
    return zipped(lambda archive: archive.writestr(name, b"x"))


def link_member(archive: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("outs/analysis.parquet")
    info.create_system = 3
    info.external_attr = 0o120777 << 16
    archive.writestr(info, b"/etc/passwd")


def a_store_of_another_version(folder: Path) -> None:
    store = folder / "store.zarr"
    for name in ("tables/table", "points/transcripts", "labels"):
        (store / name).mkdir(parents=True)
    attributes = {"spatialdata_attrs": {"version": "9.9", "spatialdata_software_version": "9"}}
    told = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (store / "zarr.json").write_text(json.dumps(told))


def other_names_of_genes(new: str) -> Ruin:
    """The first gene of the panel, its matrix and the transcripts under another name."""

    def ruin(folder: Path) -> None:
        outs = folder / "outs"
        with h5py.File(outs / "cell_feature_matrix.h5") as file:
            old = file["matrix/features/name"].asstr()[0]
        panel = outs / "gene_panel.json"
        replace(panel, panel.read_text().replace(f'"{old}"', json.dumps(new)))
        shutil.rmtree(outs / "cell_feature_matrix", ignore_errors=True)
        matrix = outs / "cell_feature_matrix.h5"
        content = matrix.read_bytes()
        replace(matrix, content)
        with h5py.File(matrix, "r+") as file:
            names = file["matrix/features/name"].asstr()[:]
            del file["matrix/features/name"]
            file["matrix/features/name"] = [(new if n == old else n).encode() for n in names]

        def rename(rows: pa.Table) -> pa.Table:
            names = rows["feature_name"].cast(pa.string())
            renamed = pc.if_else(pc.equal(names, old), new, names)
            i = rows.schema.get_field_index("feature_name")
            return rows.set_column(i, "feature_name", renamed)

        table("transcripts.parquet", rename)(folder)

    return ruin
