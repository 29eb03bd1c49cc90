"""The `[[runs]]` that `cellpair init` writes for a bundle: what was found, marks for the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.beside import Candidate, look_beside
from flows.config_faults import MARK
from flows.sheet import SheetRow
from flows.toml_text import comment, path_from, quoted
from pairing.registration.gates import implied_mpp_of
from pairing.registration.given import read_alignment
from pairing.slide import open_slide
from pairing.xenium import open_xenium
from shards.errors import BadInput

log = logging.getLogger("cellpair")

# What `curate` must know of a run and no file may say.
_NEEDED = {
    "slide": "the H&E of this very section",
    "alignment": 'the 10x matrix csv or the keypoints csv that Xenium Explorer exports, or "auto"',
    "mpp": "µm per pixel of the slide at full resolution, as the scanner has it",
    "donor": "whom the section is of; of several: donors = a GeoJSON or csv instead",
    "species": "human or mouse; the bundle does not say",
}
_MAX_LISTED = 10


@dataclass(frozen=True, slots=True)
class Bundle:
    """What an opened bundle says that a config wants; `words` are for a person."""

    path: Path
    words: tuple[str, ...]
    species: str | None
    pixel_size_um: float


def look_at(path: Path) -> Bundle:
    """Open a bundle. Raises BadInput where it is none or damaged."""
    log.info("looking at %s", path)
    with open_xenium(path) as run:
        facts = [run.layout, f"{run.n_cells} cells", f"{len(run.genes())} genes"]
        facts.append(f"{run.pixel_size_um:g} µm per pixel")
        if not run.has_transcripts:
            facts.append("no transcripts: counts come from its matrix")
        return Bundle(path, (", ".join(facts), *run.notes), run.species, run.pixel_size_um)


def run_table(bundle: Bundle, run_id: str, row: SheetRow, folder: Path) -> str:
    """One `[[runs]]` of a config in `folder`; what `row` says overrules what was found.

    Raises BadInput where a slide or an alignment that the row names is none.
    """
    return "".join(f"{line}\n" for line in _lines(bundle, run_id, row, folder))


def _lines(bundle: Bundle, run_id: str, row: SheetRow, folder: Path) -> Iterator[str]:
    given = row.values
    yield ""
    yield from map(comment, bundle.words)
    yield "[[runs]]"
    yield f"id = {quoted(given.get('id', run_id))}"
    yield f"xenium = {quoted(path_from(folder, bundle.path))}"
    if "image" in given:
        yield f"image = {quoted(given['image'])}"
    if "image" not in given or "slide" in given:
        candidates = look_beside(bundle.path)
        yield from _slide_lines(candidates, row, folder)
        yield from _alignment_lines(bundle, candidates, row, folder)
    for key in ("donors", "labels"):
        if key in given:
            yield f"{key} = {quoted(path_from(folder, Path(given[key])))}"
    if not given.keys() & {"donor", "donors"}:
        yield _mark("donor")
    for key in ("donor", "source_id", "tissue", "species"):
        if key in given:
            yield f"{key} = {quoted(given[key])}"
    if "tissue" not in given:
        yield '# tissue = "breast"'
    if bundle.species is not None:
        yield comment(f"The bundle says of its species: {bundle.species}.")
    elif "species" not in given:
        yield _mark("species")


def _slide_lines(candidates: list[Candidate], row: SheetRow, folder: Path) -> Iterator[str]:
    mpp = float(row.values["mpp"]) if "mpp" in row.values else None
    says_mpp = True

    def look(path: Path) -> str:
        nonlocal says_mpp
        words, says_mpp = _slide_words(path, mpp)
        return words

    if "slide" in row.values:
        slide = Path(row.values["slide"])
        yield comment(f"As the sheet says: {look(slide)}.")
        yield f"slide = {quoted(path_from(folder, slide))}"
    else:
        yield from _found("slide", [c for c in candidates if c.kind == "slide"], look, folder)
        others = [c.path for c in candidates if c.kind == "other"]
        if others:
            yield from _listed("slide", "Other pictures beside the bundle:", others, folder)
        yield comment(
            'Without H&E, of the bundle\'s own DAPI: image = "morphology" instead of slide, '
            "alignment and mpp."
        )
    if mpp is not None:
        yield f"mpp = {mpp!r}"
    elif not says_mpp:
        yield _mark("mpp")


def _alignment_lines(
    bundle: Bundle, candidates: list[Candidate], row: SheetRow, folder: Path
) -> Iterator[str]:
    def look(path: Path) -> str:
        method, he_px_from_xenium_um, _ = read_alignment(path, bundle.pixel_size_um)
        implied_mpp = implied_mpp_of(he_px_from_xenium_um)
        return f"{method}, by which the slide has {implied_mpp:.4g} µm per pixel"

    given = row.values.get("alignment")
    if given is not None:
        if given != "auto":
            yield comment(f"As the sheet says: {look(Path(given))}.")
            given = path_from(folder, Path(given))
        yield f"alignment = {quoted(given)}"
        return
    # Explorer writes the keypoints too from which a matrix was made: they stand for it only where
    # there is none.
    matrices = [c for c in candidates if c.kind == "matrix"]
    keypoints = [c for c in candidates if c.kind == "keypoints"]
    if not matrices and not keypoints:
        yield comment("None lies there: found from the nuclei of run and slide.")
        yield 'alignment = "auto"'
        return
    yield from _found("alignment", matrices or keypoints, look, folder)
    if matrices and keypoints:
        told = "Keypoints lie there too, from which the matrix may have been made:"
        yield from _listed("alignment", told, [c.path for c in keypoints], folder)


def _found(
    key: str, candidates: list[Candidate], look: Callable[[Path], str], folder: Path
) -> Iterator[str]:
    """The one candidate, if it is one and clear and can be read; else a mark, and all named."""
    paths = [c.path for c in candidates]
    fault = ""
    if len(clear := [c.path for c in candidates if c.clear]) == 1:
        try:
            words = look(clear[0])
        except BadInput as error:
            fault = f" It cannot be: expected {error.expected}; found {error.found}."
        else:
            yield comment(f"The only one by its name that lies there: {words}.")
            yield f"{key} = {quoted(path_from(folder, clear[0]))}"
            return
    if paths:
        several = "several may be it" if len(paths) > 1 else "it may be another bundle's"
        told = f"None was chosen:{fault or f' {several}.'}"
        yield from _listed(key, told, paths, folder)
    yield _mark(key)


def _listed(key: str, told: str, paths: Sequence[Path], folder: Path) -> Iterator[str]:
    yield comment(told)
    for path in paths[:_MAX_LISTED]:
        yield comment(f"  {key} = {quoted(path_from(folder, path))}")
    if len(paths) > _MAX_LISTED:
        yield comment(f"  and {len(paths) - _MAX_LISTED} more")


def _slide_words(path: Path, mpp: float | None) -> tuple[str, bool]:
    """What an H&E is, and whether its pixel size is known.

    Raises BadInput where it is none, whatever its pixel size.
    """
    try:
        with open_slide(path, mpp=mpp) as slide:
            slide.require_rgb()
            facts = f"{slide.size_px[0]} x {slide.size_px[1]} px"
            said = f"{slide.mpp:.4g} µm per pixel"
            return "; ".join([f"{facts}, {said}", *slide.notes]), True
    except BadInput as fault:
        if mpp is not None:
            raise
        # Is that all that is wrong with it? Then it opens with any pixel size.
        with open_slide(path, mpp=1.0) as slide:
            slide.require_rgb()
            facts = f"{slide.size_px[0]} x {slide.size_px[1]} px"
        return f"{facts}, of its pixel size the file says {fault.found}", False


def _mark(key: str) -> str:
    return f"{key} = {{ {MARK} = {quoted(_NEEDED[key])} }}"
