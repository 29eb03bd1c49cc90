"""The options of the console command. Nothing heavy is imported here: help is instant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shards.errors import BadInput, not_there_yet

# Commands of the interface that arrive with a later version, and what to do meanwhile.
_LATER = {
    "predict": "curate a run and use its shards",
}
_BUNDLE = "its folder, zip or SpatialData store"
_ALIGNMENT = "auto (default), or 10x matrix or keypoints of this slide, to be refined"
EXIT_CODES = (
    "Exit codes: 0 done; 1 the check or verdict found faults; 2 bad input or usage; 3 stopped by a "
    "signal, run the same command again to go on."
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options of a command; `command` is its name.

    Exits with 2 and words to stderr on usage that is none. Raises BadInput for what the interface
    names and this version does not have.
    """
    parser, commands = _parsers()
    if argv and not argv[0].startswith("-") and argv[0] not in {*commands, *_LATER}:
        parser.error(f"there is no command {argv[0]}{_nearest(argv[0], commands)}")
    if argv and argv[0] in _LATER:  # whatever options follow
        what = f"the command `cellpair {argv[0]}`"
        raise not_there_yet("command line", what, _LATER[argv[0]])
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        command = commands[args.command]
        options = [o for o in command.format_help().split() if o.startswith("--")]
        near = _nearest(unknown[0], options) if unknown[0].startswith("-") else ""
        command.error(f"unknown here: {' '.join(unknown)}{near}")
    return args


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of all, and that of each command by its name."""
    parser = argparse.ArgumentParser(
        prog="cellpair",
        description="Xenium runs and H&E slides in; per-cell training pairs, a model and a report "
        "out.",
        epilog=EXIT_CODES,
    )
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )

    def add(name: str, text: str) -> argparse.ArgumentParser:
        # No abbreviations: an option that a later version adds must not change what they mean.
        return commands.add_parser(name, help=text, description=text, allow_abbrev=False)

    _add_demo(add("demo", "simulate three donors, curate, train, evaluate"))
    _add_simulate(add("simulate", "a Xenium bundle and its H&E slide with known truth"))
    _add_init(add("init", "look at bundles and write a commented config for them"))
    _add_curate(add("curate", "raw runs to a dataset of shards and its report"))
    _add_register(
        add("register", "where the cells of a Xenium run lie on its slide, and how surely")
    )
    _add_segment(add("segment", "nuclei of a plain slide or picture"))

    p = add(
        "info", "what a bundle, slide, shard, dataset, export, checkpoint or folder of nuclei is"
    )
    p.add_argument("path", type=_location, help="file, folder or URL")
    _add_json(p)

    p = add("check", "every promise of a dataset proved again")
    p.add_argument("dataset", type=_location, help="the folder or URL that `curate` wrote")
    _add_json(p)

    p = add("clean", "remove what no dataset points to, and all that holds a withdrawn donor")
    p.add_argument("out", type=_location, metavar="OUT", help="folder or URL that `curate` wrote")
    p.add_argument("--dry-run", action="store_true", help="only say what would go, and how much")

    p = add("train", "pretrain the contrastive image/gene model")
    p.add_argument("config", type=_local, metavar="CONFIG.toml", help="what to train on, and how")
    how = p.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on exactly where it stopped")
    how.add_argument(
        "--init-from",
        type=_local,
        metavar="CKPT",
        help="start anew with a checkpoint's weights alone",
    )

    p.add_argument(
        "--profile", nargs="?", const="20", metavar="STEPS", help="a few steps, and their time"
    )

    p = add("evaluate", "retrieval on held-out donors, and its page")
    p.add_argument("checkpoint", type=_local, help="a folder below checkpoints/ of a training")
    p.add_argument("dataset", type=_location, help="the folder or URL that `curate` wrote")
    p.add_argument("--out", type=_local, required=True, metavar="DIR", help="for figures and page")

    _add_export(add("export", "a dataset for other tools: scanpy, SpatialData, open_clip"))

    p = add("deploy", "register the Prefect deployments with these configs")
    p.add_argument("curate", type=_local, metavar="CURATE.toml", help="default of curate/xenium")
    p.add_argument("--train", type=_local, metavar="TRAIN.toml", help="train after each curation")

    by_name = dict(commands.choices)
    for name in _LATER:
        commands.add_parser(name, help="not there yet")
    return parser, by_name


def _add_demo(p: argparse.ArgumentParser) -> None:
    p.add_argument("out", nargs="?", type=_local, default=Path("demo"), help="folder (demo)")
    p.add_argument("--cells", type=int, default=7200, help="cells in all, three donors (7200)")
    _add_runtime(p)


def _add_simulate(p: argparse.ArgumentParser) -> None:
    p.add_argument("out", type=_local, metavar="OUT", help="folder for bundle, slide and truth")
    p.add_argument("--cells", type=int, required=True, help="how many")
    p.add_argument("--seed", type=int, default=0, help="of the section (0)")
    p.add_argument("--donor-seed", type=int, help="of the donor, where not that of the section")
    p.add_argument("--donors", type=int, default=1, help="more than one: a tissue microarray (1)")
    p.add_argument("--genes", type=int, help="of the panel (342)")
    p.add_argument(
        "--species", choices=("human", "mouse"), default="human", help="of the panel (human)"
    )
    p.add_argument("--workers", type=_at_least_one, default=1, help="threads (1)")
    bundle = p.add_argument_group("bundle")
    bundle.add_argument("--layout", default="xoa-3.0", help="xoa-1.0, 1.3, 2.0, 3.0 or 4.0")
    bundle.add_argument("--no-cells-zarr", action="store_true", help="without label masks")
    bundle.add_argument("--zip", action="store_true", help="outs.zip instead of outs/")
    bundle.add_argument("--stains", action="store_true", help="four morphology channels")
    bundle.add_argument("--protein", action="store_true", help="protein rows (xoa-4.0)")
    bundle.add_argument("--rnd-version", action="store_true", help='"R&D" for its software')
    slide = p.add_argument_group("slide")
    slide.add_argument("--mpp", type=float, default=0.2738, help="µm per pixel (0.2738)")
    slide.add_argument("--rotation-deg", type=float, help="drawn from the seed where not given")
    slide.add_argument("--mirror", action="store_true", help="turned over")
    slide.add_argument("--warp-um", type=float, default=0.0, help="largest shift of a smooth field")
    slide.add_argument("--tear-um", type=float, default=0.0, help="widest opening of a tear")
    slide.add_argument("--fold-um", type=float, default=0.0, help="width of a doubled strip")
    slide.add_argument("--missing-um", type=float, default=0.0, help="diameter of a lost piece")
    slide.add_argument("--other-pieces", type=int, default=0, help="sections of other tissue (0)")
    slide.add_argument("--serial-section", action="store_true", help="show the section after")
    slide.add_argument("--compression", default="donor", help="jpeg, jpeg2000, or as the donor's")


def _add_init(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "bundles",
        nargs="+",
        type=_local,
        metavar="BUNDLE",
        help="output folder of a Xenium run, a zip of it, or a SpatialData store",
    )
    p.add_argument(
        "--slides",
        type=_local,
        metavar="SHEET.csv",
        help="a line a bundle: bundle (or run), slide, alignment, donor, tissue, species, mpp …",
    )
    p.add_argument(
        "--out",
        type=_local,
        default=Path("curate.toml"),
        metavar="FILE",
        help="the config to write (curate.toml); a file that is there is never overwritten",
    )


def _add_curate(p: argparse.ArgumentParser) -> None:
    p.usage = (
        "cellpair curate CONFIG.toml [options]\n"
        "       cellpair curate --xenium B --slide S --donor D --out DIR [options]"
    )
    p.add_argument(
        "config", nargs="?", type=_local, metavar="CONFIG.toml", help="as `cellpair init` writes it"
    )
    p.add_argument("--plan", action="store_true", help="only say what would be done, and its disk")
    p.add_argument("--only", nargs="+", default=[], metavar="RUN", help="only these runs")
    p.add_argument("--partial", action="store_true", help="publish without the runs that failed")
    p.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask scheduler (default: local)")
    p.add_argument(
        "--runs-at-once",
        type=_at_least_one,
        metavar="N",
        help="so that many workers never wait for one run (1)",
    )
    _add_runtime(p)
    one = p.add_argument_group("one run without a config (what was used is DIR/curate.toml)")
    one.add_argument("--xenium", metavar="BUNDLE", help=_BUNDLE)
    one.add_argument("--slide", help="the H&E of the same section")
    one.add_argument("--image", choices=("morphology",), help="the bundle's DAPI, without a slide")
    one.add_argument("--alignment", metavar="CSV", help=_ALIGNMENT)
    one.add_argument("--mpp", type=float, help="µm per pixel, where the slide does not say")
    one.add_argument("--donor", help="whom the section is of; what splits go by")
    one.add_argument("--donors", metavar="FILE", help="for several: a GeoJSON, or a csv of cells")
    one.add_argument("--labels", metavar="CSV", help="cell_id, label")
    one.add_argument("--tissue", help="as breast")
    one.add_argument("--species", help="human or mouse, where the bundle does not say")
    one.add_argument("--source-id", metavar="ID", help="the public name of the sample")
    one.add_argument("--id", help="of the run (default: from the bundle's folder)")
    one.add_argument(
        "--out", type=_location, metavar="DIR", help="for dataset, report and config; or a URL"
    )


def _add_register(p: argparse.ArgumentParser) -> None:
    p.add_argument("--xenium", type=_local, required=True, metavar="BUNDLE", help=_BUNDLE)
    p.add_argument("--slide", type=_local, required=True, help="the H&E of the same section")
    p.add_argument("--out", type=_local, required=True, metavar="DIR", help="for tables and page")
    p.add_argument("--alignment", default="auto", metavar="CSV", help=_ALIGNMENT)
    p.add_argument("--mpp", type=float, help="µm per pixel, where the slide does not say")


def _add_segment(p: argparse.ArgumentParser) -> None:
    p.add_argument("slide", type=_local, help="a slide, or a PNG or JPEG picture with --mpp")
    p.add_argument(
        "--out", type=_local, required=True, metavar="DIR", help="for tables and picture"
    )
    p.add_argument("--mpp", type=float, help="µm per pixel, where the slide does not say")
    p.add_argument(
        "--model",
        default="compact",
        help="compact, cpsam_v2, cpdino …, or a path to weights of Cellpose 4",
    )
    p.add_argument("--labels", action="store_true", help="the label image as TIFF too")
    _add_runtime(p)


def _add_export(p: argparse.ArgumentParser) -> None:
    p.add_argument("dataset", type=_location, help="the folder or URL that `curate` wrote")
    p.add_argument(
        "--to",
        required=True,
        choices=("spatialdata", "h5ad", "openclip", "bags"),
        help="a store a run, a file a species, tars with gene sentences a split; bags: not there "
        "yet",
    )
    p.add_argument("--out", type=_local, required=True, metavar="DIR", help="a new folder")
    p.add_argument(
        "--split", action="append", choices=("train", "val", "test"), default=[],
        help="this split only; may be repeated",
    )  # fmt: skip
    p.add_argument("--run", action="append", default=[], help="this run only; may be repeated")
    p.add_argument(
        "--top-k", type=_at_least_one, metavar="N", help="openclip: genes of a sentence (50)"
    )
    p.add_argument(
        "--outlines",
        choices=("instrument", "circles"),
        help="spatialdata: of cells, from the bundles (default), or of their areas without them",
    )
    p.add_argument(
        "--xenium", action="append", type=_local, default=[], metavar="BUNDLE",
        help="spatialdata: a bundle that lies elsewhere now, told by its content; may be repeated",
    )  # fmt: skip
    p.add_argument("--checkpoint", type=_local, metavar="C", help="bags: whose features")


def _local(text: str) -> Path:
    """A path of this machine: a URL in its place would be a folder called `s3:`."""
    if "://" in text:
        raise argparse.ArgumentTypeError("a URL, where a file or folder of this machine is needed")
    return Path(text)


def _location(text: str) -> Any:
    """A path, or a URL: in an option a fault has no other way to say its words."""
    from shards.remote import location

    try:
        return location(text)
    except BadInput as fault:
        raise argparse.ArgumentTypeError(str(fault)) from fault


def _add_json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="for programs")


def _add_runtime(p: argparse.ArgumentParser) -> None:
    p.add_argument("--workers", type=_at_least_one, help="processes (default: cores)")
    p.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="for networks (auto)"
    )


def _at_least_one(text: str) -> Any:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value
