"""`cellpair demo`: three simulated donors through every room, scored on the third.

D1 and D2 train, D3 is only ever scored: nothing is chosen on it, and the number of steps is fixed.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from scipy.stats import rankdata

from flows.built import CuratedRun
from flows.clean import wait_for_clean
from flows.cluster import BlockMap, Runtime
from flows.config import read_curate_config
from flows.local import curate_and_remember
from flows.log import logged_to
from flows.outfolder import claim_out
from flows.report import write_report
from flows.report.evaluation import (
    DIRECTIONS,
    Direction,
    EvaluationRecord,
    RetrievalLine,
    Scope,
)
from flows.scratch import scratch
from flows.training import EVALUATION_FILE, METRICS_FILE, newest_checkpoint, run_trainer, train
from pairing.cells import PANEL_FILE, read_cells, read_counts
from pairing.simulate import SimulationParams, simulate
from pairing.simulate.oracle import pointwise_mutual_information
from pairing.simulate.truth import SIMULATOR_VERSION
from shards.artifact import write_atomically
from shards.dataset import read_record
from shards.errors import BadInput
from shards.schema import Panel, Record, sample_key

log = logging.getLogger("cellpair")

# Donor, seed of its simulation, split.
DONORS = (("D1", 1, "train"), ("D2", 2, "train"), ("D3", 3, "test"))
MIN_CELLS = 600
BATCHES_FILE = "batches.parquet"
FIGURES_FILE = "figures.json"

_CURATE = """# Written by `cellpair demo`.
name = "demo"
out = "curated"

[patch]
fov_um = 32.0
size_px = 96

[split]
assign = {{ {assign} }}
{runs}"""
_RUN = """
[[runs]]
id = "{donor}"
xenium = "raw/{folder}/outs"
slide = "raw/{folder}/he.ome.tif"
alignment = "raw/{folder}/he_imagealignment.csv"
donor = "{donor}"
tissue = "simulated"
"""
_TRAIN = """# Written by `cellpair demo`.
preset = "small"
data = "curated/dataset.json"

[optim]
steps = 900

[run]
out = "model"
device = "{device}"
"""


def run_demo(out: Path, n_cells: int, runtime: Runtime) -> int:
    """Simulate, curate, train, evaluate; prints the figures and the report's path.

    What is there already is not done again. Returns an exit code.
    """
    if n_cells < MIN_CELLS:
        raise BadInput(
            "--cells",
            expected=f"at least {MIN_CELLS}, so that the held-out donor fills batches of 64",
            found=str(n_cells),
            remedy="ask for more cells",
        )
    started_s = time.monotonic()
    with scratch(out), BlockMap(runtime) as blocks:
        folders = simulate_donors(out, -(-n_cells // len(DONORS)), blocks)
        config = read_curate_config(_write_configs(out, folders, runtime))
        claim_out(config.out, config.name, config.split.withdrawn_names)
        with logged_to(config.out), scratch(config.out):
            wait_for_clean(config.out)
            curated = curate_and_remember(config, blocks, device=runtime.device)
    if curated.dataset is None:
        raise next(iter(curated.failures.values()))
    log.info("curated after %.0f s", time.monotonic() - started_s)

    if code := train(out / "train.toml", "--resume"):
        return code
    log.info("trained after %.0f s", time.monotonic() - started_s)
    evaluation = out / "evaluation"
    checkpoint = newest_checkpoint(out / "model")
    if code := run_trainer("evaluate", str(checkpoint), str(config.out), "--out", str(evaluation)):
        return code
    held_out = {run.config.id: run for run in curated.runs}[DONORS[-1][0]]
    oracle = oracle_lines(held_out, folders[DONORS[-1][0]] / "truth", evaluation / BATCHES_FILE)
    page = write_report(
        config,
        curated,
        evaluation_json=evaluation / EVALUATION_FILE,
        metrics_csv=out / "model" / METRICS_FILE,
        extra_lines=oracle,
    )
    trainers = read_record(evaluation / EVALUATION_FILE, EvaluationRecord).retrieval
    figures = figures_of([*trainers, *oracle], curated.dataset.totals.kept)
    write_atomically(out / FIGURES_FILE, figures.model_dump_json(indent=1).encode())
    _print_figures(figures)
    print(f"report: {page} ({time.monotonic() - started_s:.0f} s)")
    return 0


def simulate_donors(out: Path, n_cells: int, blocks: BlockMap) -> dict[str, Path]:
    """Each donor's simulated run below `out/raw`; those that are there are kept."""
    folders = {
        donor: out / "raw" / f"{donor}-{n_cells}-cells-seed-{seed}" for donor, seed, _ in DONORS
    }
    missing = [
        (folders[donor], SimulationParams(n_cells=n_cells, seed=seed))
        for donor, seed, _ in DONORS
        if not folders[donor].exists()
    ]
    for folder in blocks(_simulate_one, missing):
        log.info("simulated %s", folder)
    return folders


def _simulate_one(job: tuple[Path, SimulationParams]) -> Path:
    simulate(*job)
    return job[0]


def _write_configs(out: Path, folders: dict[str, Path], runtime: Runtime) -> Path:
    assign = ", ".join(f'{donor} = "{split}"' for donor, _, split in DONORS)
    runs = "".join(_RUN.format(donor=donor, folder=f.name) for donor, f in folders.items())
    write_atomically(out / "curate.toml", _CURATE.format(assign=assign, runs=runs).encode())
    write_atomically(out / "train.toml", _TRAIN.format(device=runtime.device).encode())
    return out / "curate.toml"


def oracle_lines(run: CuratedRun, truth: Path, batches: Path) -> list[RetrievalLine]:
    """Retrieval with each image replaced by the truth of its cell and of what spills into it.

    Scored by the simulator's own likelihood of the observed counts, on the batches that the
    trainer scored: the best that any image model could do on these counts.
    """
    folder = run.built["cells"].folder
    panel = read_record(folder / PANEL_FILE, Panel)
    cells = read_cells(folder)
    row_of_key = {sample_key(run.config.id, c): i for i, c in enumerate(cells["cell_id"])}
    tables = sorted(run.built["shards"].folder.glob("*.parquet"))
    keys = [key for t in tables for key in pq.read_table(t, columns=["key"])["key"].to_pylist()]
    rows = np.array([row_of_key[key] for key in keys])
    score_cell_by_image = pointwise_mutual_information(
        truth,
        read_counts(folder, len(panel.genes))[rows],
        [gene.symbol for gene in panel.genes],
        cells["cell_id"].to_numpy()[rows].tolist(),
    )
    place = {key: i for i, key in enumerate(keys)}
    scored = pq.read_table(batches).to_pandas().groupby("batch")["key"]
    scopes: dict[Scope, list[npt.NDArray[np.int64]]] = {
        "batch": [np.array([place[key] for key in batch]) for _, batch in scored],
        "all": [np.arange(len(keys))],
    }
    directions: dict[Direction, npt.NDArray[np.float64]] = {
        "image_to_genes": score_cell_by_image.T,
        "genes_to_image": score_cell_by_image,
    }
    lines = []
    for scope, groups in scopes.items():
        for direction, score in directions.items():
            rank = np.concatenate([own_ranks(score[np.ix_(g, g)]) for g in groups])
            lines.append(
                RetrievalLine(
                    method="oracle",
                    scope=scope,
                    direction=direction,
                    n_queries=len(rank),
                    n_candidates=len(groups[0]),
                    r_at_1=float((rank <= 1).mean()),
                    r_at_5=float((rank <= 5).mean()),
                    r_at_10=float((rank <= 10).mean()),
                    median_rank=float(np.median(rank)),
                )
            )
    return lines


def own_ranks(score: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rank of candidate i for query i; candidates that score the same share their mean rank."""
    ranks: npt.NDArray[np.float64] = np.diagonal(rankdata(-score, method="average", axis=1))
    return ranks


class Figures(Record):
    """`figures.json`: R@5 on the held-out donor in batches of 64, by method and direction."""

    simulator_version: int
    n_cells: int
    r_at_5: dict[str, dict[Direction, float]]

    def ratio(self, method: str, other: str) -> dict[Direction, float]:
        return {d: self.r_at_5[method][d] / self.r_at_5[other][d] for d in DIRECTIONS}


def figures_of(lines: list[RetrievalLine], n_cells: int) -> Figures:
    return Figures(
        simulator_version=SIMULATOR_VERSION,
        n_cells=n_cells,
        r_at_5={
            method: {
                x.direction: x.r_at_5 for x in lines if (x.method, x.scope) == (method, "batch")
            }
            for method in ("model", "oracle", "ridge", "shuffled_pairs", "chance")
        },
    )


def _print_figures(figures: Figures) -> None:
    print(f"simulator version {figures.simulator_version}, {figures.n_cells} cells")
    print(f"{'R@5 on D3, in batches of 64':<30}{'image to genes':>16}{'genes to image':>16}")
    for method, by_direction in figures.r_at_5.items():
        values = "".join(f"{by_direction[d]:>16.3f}" for d in DIRECTIONS)
        print(f"{method.replace('_', ' '):<30}{values}")
    for method, other in (("model", "oracle"), ("model", "ridge"), ("ridge", "oracle")):
        ratios = " and ".join(f"{r:.2f}" for r in figures.ratio(method, other).values())
        print(f"{method} / {other}: {ratios}")
