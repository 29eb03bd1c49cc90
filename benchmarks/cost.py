"""The cost sheet: what a corpus takes of cores, GPUs, disk and time, from what was measured.

    python -m benchmarks.cost --figures FULL.json [--pairs N …] [--workers N …]

Pure arithmetic on the figures that `python -m benchmarks.scale full` leaves: every stage's time
on cores, files and bytes are taken as proportional to the cells. Figures of GPUs are estimates.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.scale.figures import CurationFigures, StageFigures

# Of the workers' time, that they have a block at work: `python -m benchmarks.scheduler corpus`.
UTILISATION = 0.9

# Cellpose-SAM at 8 / 30 µm a pixel in windows of 256 px every 192: ViT-L of 305 million weights
# over 32 × 32 tokens, and its attention (24 layers of width 1024).
_SAM_STRIDE_MM = 192 * 8 / 30 / 1000
_SAM_TOKENS = 1024
_SAM_TFLOP = (2 * 305e6 * _SAM_TOKENS + 24 * 4 * _SAM_TOKENS**2 * 1024) / 1e12
# Of an A100's 312 TFLOP/s in bfloat16, what such a network is taken to reach.
_GPU_TFLOP_S = 0.4 * 312


@dataclass(frozen=True, slots=True)
class Rate:
    """What a stage takes, for each cell of a run."""

    stage: str
    worker_core_s: float
    driver_core_s: float
    n_bytes: float
    n_files: float

    @classmethod
    def of(cls, figures: StageFigures, n_cells: int) -> Rate:
        return cls(
            stage=figures.stage,
            worker_core_s=figures.workers_cpu_s / n_cells,
            driver_core_s=figures.driver_cpu_s / n_cells,
            n_bytes=figures.n_bytes / n_cells,
            n_files=figures.n_files / n_cells,
        )

    @property
    def core_s(self) -> float:
        return self.worker_core_s + self.driver_core_s


@dataclass(frozen=True, slots=True)
class Measured:
    """Rates of every stage, and what a run of the corpus is like."""

    rates: tuple[Rate, ...]
    cells_a_run: int
    pairs_a_cell: float
    transcripts_a_cell: float
    cells_a_mm2: float
    input_bytes_a_cell: float

    @classmethod
    def of(cls, figures: CurationFigures) -> Measured:
        n = figures.n_cells
        assert figures.tissue_mm2 is not None, "figures of a run whose nuclei were looked for"
        return cls(
            rates=tuple(Rate.of(stage, n) for stage in figures.stages),
            cells_a_run=n,
            pairs_a_cell=figures.n_pairs / n,
            transcripts_a_cell=figures.n_transcripts / n,
            cells_a_mm2=n / figures.tissue_mm2,
            input_bytes_a_cell=figures.input_bytes / n,
        )


@dataclass(frozen=True, slots=True)
class Cost:
    """What a corpus of so many pairs takes."""

    n_pairs: int
    n_cells: int
    n_runs: int
    core_hours: dict[str, float]  # by stage
    driver_hours: float  # of them, in the process that curates
    gpu_hours: float
    input_tb: float
    output_tb: dict[str, float]  # by stage
    n_files: int

    @classmethod
    def of(cls, measured: Measured, n_pairs: int) -> Cost:
        n_cells = math.ceil(n_pairs / measured.pairs_a_cell)
        windows = n_cells / measured.cells_a_mm2 / _SAM_STRIDE_MM**2
        return cls(
            n_pairs=n_pairs,
            n_cells=n_cells,
            n_runs=math.ceil(n_cells / measured.cells_a_run),
            core_hours={r.stage: r.core_s * n_cells / 3600 for r in measured.rates},
            driver_hours=sum(r.driver_core_s for r in measured.rates) * n_cells / 3600,
            gpu_hours=windows * _SAM_TFLOP / _GPU_TFLOP_S / 3600,
            input_tb=measured.input_bytes_a_cell * n_cells / 1e12,
            output_tb={r.stage: r.n_bytes * n_cells / 1e12 for r in measured.rates},
            n_files=math.ceil(sum(r.n_files for r in measured.rates) * n_cells),
        )

    def wall_hours(self, n_workers: int, n_drivers: int) -> float:
        """Hours on so many workers, with so many cores for what only drivers do.

        Registrations come first, one block a run. Then runs at once and in turn keep workers and
        drivers busy, so that the slower of the two decides.
        """
        first = self.core_hours["registration"]
        rounds = math.ceil(self.n_runs / n_workers)
        registering = max(rounds * first / self.n_runs, first / n_workers / UTILISATION)
        rest = sum(self.core_hours.values()) - first - self.driver_hours
        return registering + max(rest / n_workers / UTILISATION, self.driver_hours / n_drivers)


def print_rates(measured: Measured) -> None:
    print(
        f"A run of {measured.cells_a_run:,} cells, {measured.cells_a_mm2:,.0f} a mm², "
        f"{measured.transcripts_a_cell:.0f} transcripts each; {measured.pairs_a_cell:.3f} pairs a "
        "cell.\n"
    )
    print("| stage | ms of a core a cell | cells/s of a core | of it in the driver | kB a cell |")
    print("|---|---|---|---|---|")
    for r in measured.rates:
        print(
            f"| {r.stage} | {r.core_s * 1e3:.2f} | {1 / r.core_s:,.0f} | "
            f"{r.driver_core_s / r.core_s:.2f} | {r.n_bytes / 1e3:.2f} |"
        )
    total_s = sum(r.core_s for r in measured.rates)
    total_bytes = sum(r.n_bytes for r in measured.rates)
    print(f"| all | {total_s * 1e3:.2f} | {1 / total_s:,.0f} | | {total_bytes / 1e3:.2f} |")


def print_costs(costs: Sequence[Cost], workers: Sequence[int], drivers: Sequence[int]) -> None:
    rows = [
        ("cells", [f"{c.n_cells:,}" for c in costs]),
        ("runs", [f"{c.n_runs:,}" for c in costs]),
        *(
            (f"core-hours, {stage}", [f"{c.core_hours[stage]:,.1f}" for c in costs])
            for stage in costs[0].core_hours
        ),
        ("core-hours, all", [f"{sum(c.core_hours.values()):,.0f}" for c in costs]),
        ("of them in the driver", [f"{c.driver_hours:,.1f}" for c in costs]),
        (
            "GPU-hours of an A100 with Cellpose-SAM (estimate)",
            [f"{c.gpu_hours:,.1f}" for c in costs],
        ),
        ("raw runs and slides, TB", [f"{c.input_tb:.2f}" for c in costs]),
        *(
            (f"{stage}, TB", [f"{c.output_tb[stage]:.3f}" for c in costs])
            for stage in costs[0].output_tb
        ),
        ("artifacts, TB", [f"{sum(c.output_tb.values()):.2f}" for c in costs]),
        ("files", [f"{c.n_files:,}" for c in costs]),
        *(
            (f"hours, {n} workers, driver cores: {m}", [f"{c.wall_hours(n, m):.2f}" for c in costs])
            for n in workers
            for m in drivers
        ),
    ]
    print(f"\n| | {' | '.join(f'{c.n_pairs:,} pairs' for c in costs)} |")
    print(f"|{'---|' * (len(costs) + 1)}")
    for name, cells in rows:
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--pairs", type=int, nargs="+", default=[20_000_000, 100_000_000])
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 64, 200])
    parser.add_argument("--drivers", type=int, nargs="+", default=[1, 8], help="cores")
    args = parser.parse_args()
    figures = [CurationFigures.model_validate(f) for f in json.loads(args.figures.read_text())]
    measured = Measured.of(max(figures, key=lambda f: f.n_cells))
    print_rates(measured)
    print_costs([Cost.of(measured, n) for n in args.pairs], args.workers, args.drivers)


if __name__ == "__main__":
    main()
