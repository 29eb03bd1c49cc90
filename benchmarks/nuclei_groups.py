"""Groups the real labelled tiles by stain, once, before any network is trained on them.

`python -m benchmarks.nuclei_groups DATA` writes `segmentation/nuclei_groups.json`: the folds in
which networks are scored on tiles of a stain that they never saw.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans

from segmentation.tiles import LabelledTile, read_tiles

N_GROUPS = 4
SEED = 0
GROUPS_PATH = Path(__file__).parents[1] / "segmentation" / "nuclei_groups.json"


def stain_groups(tiles: list[LabelledTile]) -> dict[str, int]:
    """Tile id to group: k-means on the mean optical density of each colour channel.

    Groups are numbered by falling size, so that a relabelling by k-means changes nothing.
    """
    density = np.array(
        [-np.log10(np.maximum(tile.rgb, 1) / 255.0).mean(axis=(0, 1)) for tile in tiles]
    )
    found = KMeans(N_GROUPS, random_state=SEED, n_init=10).fit_predict(density)
    order = np.argsort(-np.bincount(found, minlength=N_GROUPS), kind="stable")
    rank = {int(group): i for i, group in enumerate(order)}
    return {tile.tile_id: rank[int(group)] for tile, group in zip(tiles, found, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with <id>_he.png and <id>_labels.png")
    groups = stain_groups(read_tiles(parser.parse_args().data))
    GROUPS_PATH.write_text(json.dumps(groups, indent=1) + "\n")


if __name__ == "__main__":
    main()
