"""`cellpair export`: a whole dataset, or some of its splits and runs, for other tools."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType

from flows.built import cellpair_version
from flows.export.behind_url import copied
from flows.export.bundles import Bundles
from flows.export.record import (
    Export,
    ExportedFile,
    Format,
    Outlines,
    check_new,
    exported,
    publish,
)
from flows.export.sentences import HOUSEKEEPING, TOP_K
from flows.export.source import Source, open_source
from flows.failures import DONE
from shards.errors import BadInput
from shards.remote import Location
from shards.schema import SPLITS, Split

log = logging.getLogger("cellpair")


def export(
    dataset: Location,
    to: Format,
    out: Path,
    *,
    splits: Sequence[Split] = (),
    runs: Sequence[str] = (),
    top_k: int | None = None,
    outlines: Outlines | None = None,
    bundles: Sequence[Path] = (),
) -> int:
    """Write the dataset, or these splits and runs of it, into the new folder `out`.

    `top_k` is how many genes a sentence of openclip has; `outlines` says what the cells of
    spatialdata are drawn by, and `bundles` where bundles lie now. Prints what was written; returns
    the exit code. Raises BadInput where the dataset is not whole and where `out` is there.
    """
    check_new(out)  # before anything is fetched or hashed
    wanted = [s for s in SPLITS if s in splits] or SPLITS
    here = nullcontext(dataset) if isinstance(dataset, Path) else copied(dataset, to, wanted, runs)
    with here as path:
        source = open_source(path, wanted, runs)
        return _export(source, to, out, top_k or TOP_K, outlines or "instrument", bundles)


def _export(
    source: Source, to: Format, out: Path, top_k: int, outlines: Outlines, bundles: Sequence[Path]
) -> int:
    if out.is_relative_to(source.root.resolve()):
        raise BadInput(
            f"--out {out}",
            expected="a folder outside of the dataset's own",
            found=f"one below {source.root}",
            remedy="give another folder",
        )

    def write(folder: Path) -> Export:
        if to == "h5ad":
            return _write_h5ad(folder, source)
        if to == "openclip":
            return _write_openclip(folder, source, top_k)
        return _write_spatialdata(folder, source, outlines, Bundles(source.root, bundles))

    record = publish(out, write)
    for note in record.notes:
        log.warning("%s", note)
    for name, file in record.files.items():
        print(f"{out / name}: {file.n_samples} samples")
    return DONE


def _write_h5ad(folder: Path, source: Source) -> Export:
    from flows.export.h5ad import write_h5ad

    files, notes = {}, []
    for species in dict.fromkeys(part.manifest.species for part in source.parts):
        name = f"{species}.h5ad"
        n_samples, n_genes, n_partial = write_h5ad(folder / name, source, species)
        files[name] = exported(folder / name, n_samples)
        if n_partial:
            notes.append(
                f"{name}: {n_partial} of {n_genes} genes are not measured by all panels, and zeros "
                "of theirs say nothing there: see var['measured_in_all'] and varm['measured']"
            )
    return _record(source, "h5ad", files, notes=notes)


def _write_spatialdata(
    folder: Path, source: Source, outlines: Outlines, bundles: Bundles
) -> Export:
    # Some five seconds of spatialdata that a mistake above need not wait for.
    from flows.export.spatial import write_store

    files, notes = {}, []
    for run, parts in source.runs().items():
        name = f"{run}.zarr"
        placed = write_store(folder / name, source, parts, outlines, bundles)
        files[name] = exported(folder / name, sum(part.shard.n_samples for part in parts))
        median, p95, most = placed.residual_um
        if most > 0:
            notes.append(
                f"{run}: the affine between xenium_um and {placed.frame} leaves out the "
                f"registration's field, which moves cells by {median:.2f} µm in the median, "
                f"{p95:.2f} at the 95th percentile, {most:.2f} at most; cells_he has them in place"
            )
    return _record(source, "spatialdata", files, {"outlines": outlines}, notes)


def _write_openclip(folder: Path, source: Source, top_k: int) -> Export:
    from flows.export.openclip import write_openclip

    files: dict[str, ExportedFile] = {}
    notes = []
    for split in dict.fromkeys(part.split for part in source.parts):
        (folder / split).mkdir()
        n_written = write_openclip(folder / split, source, split, top_k)
        files[split] = exported(folder / split, n_written)
        n_samples = sum(part.shard.n_samples for part in source.parts if part.split == split)
        if n_written < n_samples:
            silent = n_samples - n_written
            notes.append(f"{split}: {silent} samples are left out: no gene is left to say")
    options: dict[str, int | str] = {"top_k": top_k, "left_out": HOUSEKEEPING}
    return _record(source, "openclip", files, options, notes)


def _record(
    source: Source,
    to: Format,
    files: dict[str, ExportedFile],
    options: Mapping[str, int | str] = MappingProxyType({}),
    notes: Sequence[str] = (),
) -> Export:
    samples: Counter[Split] = Counter()
    for part in source.parts:
        samples[part.split] += part.shard.n_samples
    return Export(
        to=to,
        cellpair=cellpair_version(),
        dataset=source.dataset.name,
        fingerprint=source.dataset.fingerprint,
        runs=tuple(source.runs()),
        samples=dict(samples),
        options=dict(options),
        files=files,
        notes=tuple(notes),
    )
