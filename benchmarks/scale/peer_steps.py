"""A step of others on a Xenium bundle, in their own Python; prints JSON of seconds and a count.

Run by `benchmarks.peers_curate`, as `PYTHON benchmarks/scale/peer_steps.py STEP ARGUMENT …`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

N_TILES = 300
FOV_UM = 56.0
TILE_PX = 224


def read(bundle: str, store: str) -> int:
    """spatialdata-io's reader, and what it read written as a SpatialData store."""
    from spatialdata_io import xenium

    sdata = xenium(bundle, cells_labels=False, nucleus_labels=False, n_jobs=1)
    sdata.write(store)
    return len(sdata.tables["table"])


def aggregate(store: str) -> int:
    """sopa's counts of transcripts in the outlines of cells."""
    import sopa
    import spatialdata

    sdata = spatialdata.read_zarr(store)
    sopa.aggregate(
        sdata, gene_column="feature_name", shapes_key="cell_boundaries", min_transcripts=0
    )
    return int(sdata.tables["table"].X.sum())


def tiles(bundle: str, slide: str, alignment: str) -> int:
    """spatialdata's tile of the H&E around each of the first cells."""
    import spatialdata
    from spatialdata.dataloader import ImageTilesDataset
    from spatialdata_io import xenium, xenium_aligned_image

    sdata = xenium(
        bundle, cells_labels=False, nucleus_labels=False, morphology_mip=False,
        morphology_focus=False, transcripts=False, cells_boundaries=False,
        nucleus_boundaries=False, cells_as_circles=True, n_jobs=1,
    )  # fmt: skip
    sdata["he"] = xenium_aligned_image(slide, alignment)
    circles = next(iter(sdata.shapes))
    sdata[circles] = sdata[circles].iloc[:N_TILES]
    sdata = spatialdata.SpatialData(images={"he": sdata["he"]}, shapes={circles: sdata[circles]})
    dataset = ImageTilesDataset(
        sdata, regions_to_images={circles: "he"}, regions_to_coordinate_systems={circles: "global"},
        tile_dim_in_units=FOV_UM, rasterize=True,
        rasterize_kwargs={"target_unit_to_pixels": TILE_PX / FOV_UM},
    )  # fmt: skip
    for i in range(len(dataset)):
        dataset[i]
    return len(dataset)


def main() -> None:
    steps: dict[str, Callable[..., int]] = {"read": read, "aggregate": aggregate, "tiles": tiles}
    step, *arguments = sys.argv[1:]
    start_s = time.perf_counter()
    n = steps[step](*arguments)
    told: dict[str, Any] = {"seconds": time.perf_counter() - start_s, "n": n}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
