"""The console command: thin; heavy imports happen inside the commands, so that help is instant."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from shards.errors import BadInput, BadInputs, not_there_yet

DONE, FAULTS_FOUND, BAD_INPUT, STOPPED = 0, 1, 2, 3

# Commands of the interface that arrive with a later version.
_LATER = {
    "init": "write the config by hand: the README shows one",
    "register": "give an alignment csv to `cellpair curate`; its report shows the gates",
    "predict": "curate a run and use its shards",
    "export": "read the shards with webdataset and the .parquet beside each tar",
    "clean": "remove folders below OUT/runs that no datasets/*.json names",
}
# The same for options, by command.
_LATER_OPTIONS = {
    ("curate", "--plan"): "run it: what is there already is not made again",
    ("curate", "--xenium"): "write a config: the README shows one",
    ("segment", "--labels"): "rasterise the outlines of nuclei.parquet",
    ("train", "--init-from"): "give the image weights by model.image_weights, or start anew",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 faults, 2 bad input, 3 stopped)."""
    argv = sys.argv[1:] if argv is None else argv
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("cellpair").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(argv)
    except (BadInput, BadInputs) as error:
        print(f"cellpair: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("cellpair: stopped; run the same command again to go on", file=sys.stderr)
        return STOPPED
    except Exception as error:  # the edge of the program: a traceback helps nobody at a prompt
        logging.getLogger("cellpair").debug("", exc_info=True)
        print(f"cellpair: {type(error).__name__}: {error}", file=sys.stderr)
        return FAULTS_FOUND


def _run(argv: Sequence[str]) -> int:
    for (name, option), instead in _LATER_OPTIONS.items():
        if argv[:1] == [name] and option in argv:
            raise not_there_yet("command line", f"`cellpair {name} {option}`", instead)
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not args.later:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    command: Callable[[argparse.Namespace], int] = args.command
    return command(args)


def _stop(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cellpair",
        description="Xenium runs and H&E slides in; per-cell training pairs, a model and a report "
        "out.",
        epilog="Exit codes: 0 done; 1 faults found; 2 bad input or usage; 3 stopped, can resume.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=run, later=False)
        return sub

    p = add("demo", _demo, "simulate three donors, curate, train, evaluate")
    p.add_argument("out", nargs="?", type=Path, default=Path("demo"), help="folder (demo)")
    p.add_argument("--cells", type=int, default=7200, help="cells in all, three donors (7200)")
    _add_runtime(p)

    p = add("simulate", _simulate, "a Xenium bundle and its H&E slide with known truth")
    p.add_argument("out", type=Path)
    p.add_argument("--cells", type=int, required=True)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--donor-seed", type=int, help="of the donor, where not that of the section")
    p.add_argument("--donors", type=int, default=1, help="more than one: a tissue microarray (1)")
    p.add_argument("--workers", type=int, default=1, help="threads (1)")
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
    slide.add_argument("--mirror", action="store_true")
    slide.add_argument("--warp-um", type=float, default=0.0, help="largest shift of a smooth field")
    slide.add_argument("--tear-um", type=float, default=0.0, help="widest opening of a tear")
    slide.add_argument("--fold-um", type=float, default=0.0, help="width of a doubled strip")
    slide.add_argument("--missing-um", type=float, default=0.0, help="diameter of a lost piece")
    slide.add_argument("--other-pieces", type=int, default=0, help="sections of other tissue (0)")
    slide.add_argument("--serial-section", action="store_true", help="show the section after")
    slide.add_argument("--compression", default="donor", help="jpeg, jpeg2000, or as the donor's")

    p = add("curate", _curate, "raw runs to a dataset of shards and its report")
    p.add_argument("config", type=Path, metavar="CONFIG.toml")
    p.add_argument("--only", nargs="+", default=[], metavar="RUN", help="only these runs")
    p.add_argument("--partial", action="store_true", help="publish without the runs that failed")
    p.add_argument("--scheduler", metavar="ADDRESS", help="of a Dask scheduler (default: local)")
    _add_runtime(p)

    p = add("segment", _segment, "nuclei of a plain slide or picture")
    p.add_argument("slide", type=Path)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--mpp", type=float, help="µm per pixel, where the slide does not say")
    p.add_argument("--model", default="compact", help="compact, or a path to Cellpose 4 weights")
    _add_runtime(p)

    p = add("info", _info, "what a bundle, slide, shard, dataset or checkpoint is")
    p.add_argument("path", type=Path)
    p.add_argument("--json", action="store_true")

    p = add("check", _check, "every promise of a dataset proved again")
    p.add_argument("dataset", type=Path)
    p.add_argument("--json", action="store_true")

    p = add("train", _train, "pretrain the contrastive image/gene model")
    p.add_argument("config", type=Path, metavar="CONFIG.toml")
    p.add_argument("--resume", action="store_true", help="go on exactly where it stopped")

    p = add("evaluate", _evaluate, "retrieval on held-out donors, and its page")
    p.add_argument("checkpoint", type=Path)
    p.add_argument("dataset", type=Path)
    p.add_argument("--out", type=Path, required=True)

    p = add("deploy", _deploy, "register the Prefect deployments with these configs")
    p.add_argument("curate", type=Path, metavar="CURATE.toml")
    p.add_argument("--train", type=Path, metavar="TRAIN.toml", help="train after each curation")

    for name, instead in _LATER.items():
        p = commands.add_parser(name, help="not there yet", description="Not there yet.")
        # Whatever options follow, the answer is that the command is not there yet.
        p.set_defaults(command=_later(name, instead), later=True)
    return parser


def _add_runtime(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=_at_least_one, help="processes (default: cores)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _later(name: str, instead: str) -> Callable[[argparse.Namespace], int]:
    def refuse(args: argparse.Namespace) -> int:
        raise not_there_yet("command line", f"the command `cellpair {name}`", instead)

    return refuse


def _runtime(args: argparse.Namespace) -> Any:
    from flows.cluster import Runtime

    given = {"workers": args.workers, "device": args.device}
    given["scheduler"] = getattr(args, "scheduler", None)
    return Runtime(**{key: value for key, value in given.items() if value is not None})


def _demo(args: argparse.Namespace) -> int:
    from flows.demo import run_demo

    return run_demo(args.out.resolve(), args.cells, _runtime(args))


def _simulate(args: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from pairing.simulate import BundleParams, SimulationParams, SlideParams, simulate

    bundle = {
        "layout": args.layout,
        "cells_zarr": not args.no_cells_zarr,
        "zipped": args.zip,
        **{name: getattr(args, name) for name in ("stains", "protein", "rnd_version")},
    }
    slide = {name: getattr(args, name) for name in SlideParams.model_fields}
    try:
        params = SimulationParams(
            n_cells=args.cells,
            seed=args.seed,
            donor_seed=args.donor_seed,
            n_donors=args.donors,
            bundle=BundleParams(**bundle),
            slide=SlideParams(**slide),
        )
    except ValidationError as error:
        raise BadInput(
            "cellpair simulate",
            expected="options of simulate, each within its range",
            found="; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'options'} = {e['input']}: {e['msg']}"
                for e in error.errors()
            ),
            remedy="see cellpair simulate --help",
        ) from error
    simulate(args.out.resolve(), params, args.workers)
    print(args.out)
    return DONE


def _curate(args: argparse.Namespace) -> int:
    from flows.local import curate_locally

    return curate_locally(
        args.config, _runtime(args), only=tuple(args.only), partial_dataset=args.partial
    )


def _segment(args: argparse.Namespace) -> int:
    from flows.cluster import BlockMap
    from segmentation.segment import segment_slide_to

    runtime = _runtime(args)
    with BlockMap(runtime) as blocks:
        n_nuclei = segment_slide_to(
            args.out.resolve(),
            args.slide,
            mpp=args.mpp,
            model=args.model,
            device=runtime.device,
            map_blocks=blocks.on_gpu,
        )
    print(f"{n_nuclei} nuclei: {args.out / 'overview.png'}")
    return DONE


def _info(args: argparse.Namespace) -> int:
    from flows.info import describe_path

    facts = describe_path(args.path)
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        for key, value in facts.items():
            print(f"{key:<16}{value if isinstance(value, str) else json.dumps(value)}")
    return DONE


def _check(args: argparse.Namespace) -> int:
    from shards.check import describe, validate

    faults = validate(args.dataset)
    facts = None if faults else describe(args.dataset)  # which needs a sound dataset
    if args.json:
        print(json.dumps({"dataset": facts and facts["fingerprint"], "faults": faults}, indent=1))
    else:
        print(
            "\n".join(faults)
            if facts is None
            else f"no faults: {sum(facts['samples'].values())} samples"
        )
    return FAULTS_FOUND if faults else DONE


def _train(args: argparse.Namespace) -> int:
    from flows.training import run_trainer

    return run_trainer("train", str(args.config), *(["--resume"] if args.resume else []))


def _evaluate(args: argparse.Namespace) -> int:
    from flows.training import evaluate

    page = evaluate(args.checkpoint, args.dataset, args.out.resolve())
    print(page)
    return DONE


def _deploy(args: argparse.Namespace) -> int:
    from flows.deploy import deploy

    deploy(args.curate.resolve(), args.train.resolve() if args.train else None)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
