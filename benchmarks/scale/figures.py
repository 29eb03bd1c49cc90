"""What is measured of a curation, as it is kept for the tables, the cost sheet and fake stages."""

from __future__ import annotations

from shards.schema import Record


class TaskFigures(Record):
    """The blocks of one kind: how many, what they took, and what went through the scheduler.

    `argument_bytes` and `result_bytes` are the largest of a block, pickled; the function with all
    that is bound to it counts as an argument.
    """

    name: str
    n: int
    seconds: tuple[float, ...]  # of each, in the worker
    cpu_s: tuple[float, ...]  # the same, of its process: less where a machine is shared
    argument_bytes: int
    result_bytes: int


class StageFigures(Record):
    """A stage of a run: wall time, time of all cores, peaks of resident memory, what it left."""

    stage: str
    seconds: float
    driver_cpu_s: float  # of the process that curates
    workers_cpu_s: float
    driver_peak_bytes: int
    worker_peak_bytes: int  # of the largest
    n_files: int
    n_bytes: int
    tasks: tuple[TaskFigures, ...]

    @property
    def cpu_s(self) -> float:
        return self.driver_cpu_s + self.workers_cpu_s

    @property
    def peak_bytes(self) -> int:
        return max(self.driver_peak_bytes, self.worker_peak_bytes)


class CurationFigures(Record):
    """One run curated from its raw files by `n_workers` local workers."""

    what: str
    n_cells: int
    n_pairs: int
    n_transcripts: int
    slide_mpx: float
    tissue_mm2: float | None  # looked at for nuclei; None where these were placed
    n_workers: int
    hashing_s: float
    input_bytes: int
    load: float  # of the machine, when it ended
    stages: tuple[StageFigures, ...]

    def stage(self, name: str) -> StageFigures:
        (found,) = (stage for stage in self.stages if stage.stage == name)
        return found
