"""A corpus of simulated runs: 12 and a 13th, 3 panels, 7 donors, 2 species, a tissue microarray."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import h5py

from pairing.simulate import PanelParams, SimulationParams, SlideParams, simulate
from pairing.simulate.panel import Species, features


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the corpus; of several donors, one a core, `donor` is None."""

    id: str
    seed: int
    n_genes: int
    donor: str | None
    species: Species = "human"
    donors: tuple[str, ...] = ()
    source_id: str | None = None


SMALL, MEDIUM, LARGE = 313, 377, 5006
# Two names of one donor, a sample of a public benchmark whose donor has another run, a microarray
# whose donors have runs of their own.
RUNS: Final = (
    Run("r01", 1, SMALL, "PAT1001 left"),
    Run("r02", 2, SMALL, "PAT1001 right"),
    Run("r03", 3, SMALL, "PAT2002", source_id="TENX95"),
    Run("r04", 4, LARGE, "PAT2002"),
    Run("r05", 5, SMALL, "PAT3003"),
    Run("r06", 6, LARGE, "PAT3003"),
    Run("tma", 7, SMALL, None, donors=("PAT3003", "PAT4004", "PAT5005")),
    Run("r08", 8, LARGE, "PAT4004"),
    Run("r09", 9, LARGE, "PAT5005"),
    Run("m01", 10, MEDIUM, "MUS1001", "mouse"),
    Run("m02", 11, MEDIUM, "MUS2002", "mouse"),
    Run("m03", 12, MEDIUM, "MUS2002", "mouse"),
)
# Whose donor is somebody else's name with a hyphen, and who comes when the others are there.
LATER: Final = Run("r13", 13, LARGE, "PAT-4004")
ALIASES: Final = {"PAT1001": ("PAT1001 left", "PAT1001 right")}
ASSIGN: Final = {
    "PAT1001": "train",
    "PAT3003": "train",
    "PAT4004": "val",
    "MUS1001": "train",
    "MUS2002": "test",
}
# Of the small panel: a gene under the id of one that only the large panel has, and an id with its
# version.
RENAMED: Final = ("CD68", "SIMG4000")
VERSIONED: Final = ("EPCAM", ".7")


def simulate_runs(folder: Path, n_cells: int, runs: Sequence[Run]) -> None:
    """Each run in a folder of its name, of so many cells a core."""
    for run in runs:
        n_donors = max(len(run.donors), 1)
        params = SimulationParams(
            n_cells=n_cells * n_donors,
            seed=run.seed,
            n_donors=n_donors,
            panel=PanelParams(n_genes=run.n_genes, species=run.species),
            slide=SlideParams(mpp=0.5),
        )
        simulate(folder / run.id, params)
        if run.n_genes == SMALL:
            _change_ids(folder / run.id / "outs" / "cell_feature_matrix.h5")
        if run.donors:
            _name_donors(folder / run.id, run.donors)


def _change_ids(matrix: Path) -> None:
    id_of = {feature.name: feature.id for feature in features(LARGE)}
    (gene, other), (versioned, version) = RENAMED, VERSIONED
    with h5py.File(matrix, "r+") as file:
        names = [name.decode() for name in file["matrix/features/name"][:]]
        ids = file["matrix/features/id"][:].astype("S40")
        ids[names.index(gene)] = id_of[other].encode()
        ids[names.index(versioned)] += version.encode()
        del file["matrix/features/id"]
        file["matrix/features/id"] = ids


def _name_donors(folder: Path, donors: Sequence[str]) -> None:
    with (folder / "truth" / "donors.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    name_of = {f"D{i + 1}": donor for i, donor in enumerate(donors)}
    with (folder / "donors.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["cell_id", "donor"])
        writer.writerows((row["cell_id"], name_of[row["donor"]]) for row in rows)


def cells_of(folder: Path, run: Run, donor: str) -> list[str]:
    """The ids of a donor's cells in a simulated run."""
    if not run.donors:
        with (folder / run.id / "truth" / "donors.csv").open(encoding="utf-8") as file:
            return [row["cell_id"] for row in csv.DictReader(file)] if run.donor == donor else []
    with (folder / run.id / "donors.csv").open(encoding="utf-8") as file:
        return [row["cell_id"] for row in csv.DictReader(file) if row["donor"] == donor]


def write_config(
    folder: Path,
    runs: Sequence[Run],
    *,
    aliases: dict[str, tuple[str, ...]] = ALIASES,
    withdraw: Sequence[str] = (),
) -> Path:
    """`curate.toml` beside the runs."""
    lines = [
        'name = "corpus"\nout = "out"\n[patch]\nfov_um = 32\nsize_px = 64',
        '[segmentation]\nmodel = "none"\n[split]\nhold_out = ["hest-bench"]',
        f"withdraw = {json.dumps(list(withdraw))}",
        f"assign = {{ {', '.join(f'{d} = {json.dumps(s)}' for d, s in ASSIGN.items())} }}",
        f"aliases = {{ {', '.join(f'{d} = {json.dumps(list(n))}' for d, n in aliases.items())} }}",
    ]
    for run in runs:
        lines += [
            f'[[runs]]\nid = "{run.id}"\nxenium = "{run.id}/outs"\nslide = "{run.id}/he.ome.tif"',
            f'alignment = "{run.id}/he_imagealignment.csv"\ntissue = "colon"',
            f'donors = "{run.id}/donors.csv"' if run.donors else f'donor = "{run.donor}"',
            *([f'source_id = "{run.source_id}"'] if run.source_id else []),
        ]
    path = folder / "curate.toml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
