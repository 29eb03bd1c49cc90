"""F1 of the compact network on stains it never saw, beside Otsu + watershed, with limits.

`python -m benchmarks.nuclei --data DIR --folds DIR` trains what is missing of the four fold
networks (ten to twenty CPU minutes each), scores each on the stain group it was trained without,
and the shipped weights on simulated slides of donors of their own seeds; prints one table, the
speed in the same run, and each limit beside its figure. Exit code 1 where a limit is not kept.
`--further DIR` adds real tiles that no network was trained on, for the shipped weights; `--record`
writes the scores into the metadata of the shipped weights.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.calibration.slides import read_slide
from benchmarks.nuclei_scores import Row, labels_like, large_enough, scored
from benchmarks.registration.limits import Limits
from pairing.simulate import SimulationParams, simulate
from segmentation.config import COMPACT_PATH
from segmentation.network import CompactUNet, load_model, read_metadata
from segmentation.tiles import LabelledTile, content_sha256, read_tiles, resampled
from segmentation.train_compact import MPP, Recipe, real_tiles, stain_group_of_tile, train_and_save
from shards.errors import BadInput

SLIDE_SEEDS = (90_001, 90_002, 90_003)  # of sections and donors alike; no tile was drawn from them
SLIDE_CELLS = 1500
MIN_F1 = 0.72
MIN_ABOVE_OTSU = 0.12
MIN_SLIDE_F1 = 0.90
HEAD = "| tiles | nuclei | F1@0.5 | AP@0.5 | AP@0.75 | Otsu + watershed, F1@0.5 | difference |"
_SPEED_PX = 512
_SPEED_RUNS = 5


def fold_weights(data: Path, folds: Path, group: int) -> Path:
    """Weights trained without a group, made where they are missing.

    Raises BadInput where a file is there that was trained on other tiles or in another way.
    """
    path = folds / f"fold-{group}.pt"
    if not path.is_file():
        train_and_save(path, data, Recipe(), group)
    metadata, shipped = read_metadata(path), read_metadata(COMPACT_PATH)
    same = all(
        getattr(metadata, name) == getattr(shipped, name)
        for name in ("widths", "mpp", "seed", "n_steps", "simulated_tiles_sha256")
    )
    kept = content_sha256(real_tiles(data, group))
    if metadata.left_out_group != group or metadata.real_tiles_sha256 != kept or not same:
        raise BadInput(
            path,
            expected=f"weights trained like those that ship, without group {group} of {data}",
            found=metadata.command,
            remedy="remove it, to train it again",
        )
    return path


def scored_tiles(tiles: list[LabelledTile], weights: Path) -> Row:
    """Tiles at the network's pixel size, pooled."""
    network = load_model(str(weights), "cpu")
    return sum((scored(tile, lambda rgb: network.find(rgb)[0]) for tile in tiles), Row())


def further_tiles(folder: Path, data: Path) -> list[LabelledTile]:
    """Labelled tiles of another folder. Raises BadInput where one was trained on."""
    known = {tile.rgb.tobytes() for tile in read_tiles(data)}
    tiles = read_tiles(folder)
    for tile in tiles:
        if tile.rgb.tobytes() in known:
            raise BadInput(
                folder / f"{tile.tile_id}_he.png",
                expected="a tile that the shipped weights were not trained on",
                found="one of the training tiles",
                remedy="remove it from the folder",
            )
    return tiles


def simulated_slide(folder: Path, seed: int) -> LabelledTile:
    """A whole hard slide of a donor of its own, simulated where it is missing, and its nuclei."""
    params = SimulationParams(n_cells=SLIDE_CELLS, seed=seed)
    if not folder.exists():
        simulate(folder, params)
    rgb = read_slide(folder / "he.ome.tif", params.slide.mpp)
    labels = large_enough(labels_like(folder / "truth" / "he_nuclei.tif", rgb), MPP)
    return LabelledTile(folder.name, rgb, labels, MPP)


def network_mpx_per_s() -> float:
    """Megapixels a second of CPU time through the shipped network alone: the best of a few."""
    net = CompactUNet(read_metadata(COMPACT_PATH).widths).eval()
    x_BCHW = torch.rand(1, 3, _SPEED_PX, _SPEED_PX)
    took_s = []
    with torch.inference_mode():
        for _ in range(_SPEED_RUNS):
            started_s = time.process_time()
            net(x_BCHW)
            took_s.append(time.process_time() - started_s)
    return _SPEED_PX**2 / min(took_s) * 1e-6


def find_mpx_per_s(slides: list[LabelledTile]) -> float:
    """The same for all of finding nuclei on slides, glass included: network and dynamics."""
    network = load_model("compact", "cpu")
    started_s = time.process_time()
    for slide in slides:
        network.find(slide.rgb)
    took_s = time.process_time() - started_s
    return sum(slide.labels.size for slide in slides) / took_s * 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled tiles")
    parser.add_argument("--folds", type=Path, required=True, help="fold networks and slides")
    parser.add_argument("--further", type=Path, help="labelled tiles that were not trained on")
    parser.add_argument(
        "--record", action="store_true", help="write the scores into the shipped weights' metadata"
    )
    given = parser.parse_args()
    further = [] if given.further is None else further_tiles(given.further, given.data)
    group_of_tile = stain_group_of_tile()
    tiles = [resampled(tile, MPP) for tile in read_tiles(given.data)]
    groups: dict[str, Row] = {}
    for group in sorted(set(group_of_tile.values())):
        chosen = [tile for tile in tiles if group_of_tile[tile.tile_id] == group]
        groups[str(group)] = scored_tiles(chosen, fold_weights(given.data, given.folds, group))
    groups["all"] = sum(groups.values(), Row())
    slides = [
        simulated_slide(given.folds / f"slide-{SLIDE_CELLS}-seed-{s}", s) for s in SLIDE_SEEDS
    ]
    rows = {f"group {name}" if name != "all" else "all groups": r for name, r in groups.items()}
    for seed, slide in zip(SLIDE_SEEDS, slides, strict=True):
        rows[f"simulated slide, seed {seed}"] = scored_tiles([slide], COMPACT_PATH)
    if further:
        rows["further tiles"] = scored_tiles([resampled(t, MPP) for t in further], COMPACT_PATH)
    print(f"| what {HEAD}\n|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row} |")

    limits = Limits()
    limits.head("figure")
    for name, row in rows.items():
        if name.startswith("simulated"):
            limits.line(f"{name}: F1@0.5", row.compact.f1, "≥", MIN_SLIDE_F1)
        elif not name.startswith("group"):
            limits.line(f"{name}: F1@0.5", row.compact.f1, "≥", MIN_F1)
            above = row.compact.f1 - row.otsu.f1
            limits.line(f"{name}: above Otsu + watershed", above, "≥", MIN_ABOVE_OTSU)
    limits.told("Mpx/s of a core, network alone", f"{network_mpx_per_s():.2f}")
    limits.told("Mpx/s of a core, network and dynamics", f"{find_mpx_per_s(slides):.2f}")
    if given.record:
        scores = {name: round(row.compact.f1, 4) for name, row in groups.items()}
        shipped = read_metadata(COMPACT_PATH).model_copy(update={"scores": scores})
        COMPACT_PATH.with_suffix(".json").write_text(shipped.model_dump_json(indent=1) + "\n")
    sys.exit(0 if limits.met else 1)


if __name__ == "__main__":
    main()
