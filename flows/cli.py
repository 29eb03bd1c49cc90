"""The console command: thin; heavy imports happen inside the commands, so that help is instant."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from flows.failures import DONE, FAULTS_FOUND, exit_code_of, words_of
from flows.options import parse
from flows.stopping import done_with, end_at_once, stopping_on_signals
from shards.errors import BadInput, not_there_yet

log = logging.getLogger("cellpair")


# What a stop may take. A trainer that is told to stop saves a checkpoint first.
_STOPS_WITHIN_S = 8.0
_TRAINER_STOPS_WITHIN_S = 120.0
_WITH_TRAINER = {"demo", "train", "evaluate"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 1 faults, 2 bad input, 3 stopped).

    Without `argv` it is this process's own command, and a stop ends the process.
    """
    if argv is not None:
        return _run(argv, is_process=False)
    code = _run(sys.argv[1:], is_process=True)
    done_with(code)
    return code


def _run(argv: Sequence[str], *, is_process: bool) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    trains = bool(set(argv[:1]) & _WITH_TRAINER)
    with stopping_on_signals(_TRAINER_STOPS_WITHIN_S if trains else _STOPS_WITHIN_S):
        written_to = None
        try:
            args = parse(argv)
            written_to = getattr(args, "out", None)
            code = _COMMANDS[args.command](args)
            _flush_output()
            return code
        except (KeyboardInterrupt, Exception) as error:  # the edge of the program
            log.debug("", exc_info=True)  # a traceback helps nobody at a prompt
            with suppress(OSError):
                _flush_output()
            if is_process and isinstance(error, KeyboardInterrupt):
                end_at_once()
            if not isinstance(error, BrokenPipeError):  # then nobody reads
                print(f"cellpair: {words_of(error, written_to)}", file=sys.stderr)
            return exit_code_of(error)


def _flush_output() -> None:
    """Write what was printed; where that fails it goes nowhere, lest Python try at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _runtime(args: argparse.Namespace) -> Any:
    from flows.cluster import Runtime

    given = {"workers": args.workers, "device": args.device}
    given |= {key: getattr(args, key, None) for key in ("scheduler", "runs_at_once")}
    return Runtime(**{key: value for key, value in given.items() if value is not None})


def _demo(args: argparse.Namespace) -> int:
    from flows.demo import run_demo

    return run_demo(args.out.resolve(), args.cells, _runtime(args))


def _simulate(args: argparse.Namespace) -> int:
    from pydantic import ValidationError

    from pairing.simulate import (
        BundleParams,
        PanelParams,
        SimulationParams,
        SlideParams,
        simulate,
    )

    bundle = {
        "layout": args.layout,
        "cells_zarr": not args.no_cells_zarr,
        "zipped": args.zip,
        **{name: getattr(args, name) for name in ("stains", "protein", "rnd_version")},
    }
    slide = {name: getattr(args, name) for name in SlideParams.model_fields}
    given = {"n_genes": args.genes, "species": args.species}
    panel = {key: value for key, value in given.items() if value is not None}
    try:
        params = SimulationParams(
            n_cells=args.cells,
            seed=args.seed,
            donor_seed=args.donor_seed,
            n_donors=args.donors,
            panel=PanelParams(**panel),
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


def _init(args: argparse.Namespace) -> int:
    from flows.init import init

    return init(args.bundles, args.slides, args.out)


# Options that stand for the keys of a `[[runs]]`.
_RUN_KEYS = (
    *("id", "xenium", "slide", "image", "alignment", "mpp", "donor", "donors", "labels"),
    *("tissue", "species", "source_id"),
)


def _curate(args: argparse.Namespace) -> int:
    run = {key: getattr(args, key) for key in _RUN_KEYS if getattr(args, key) is not None}
    _check_how_curate_is_called(args, run)
    from flows.config import read_curate_config
    from flows.local import curate_locally
    from flows.one_run import keep_config, read_one_run

    only, path = tuple(args.only), args.config
    if path is None:
        config, text = read_one_run(run, args.out)
    elif args.plan:
        config = read_curate_config(path)
    if args.plan:
        from flows.plan import print_plan

        return print_plan(config, only)
    if path is None:
        path = keep_config(config, text)
    return curate_locally(path, _runtime(args), only=only, partial_dataset=args.partial)


def _check_how_curate_is_called(args: argparse.Namespace, run: dict[str, Any]) -> None:
    """Either a config, or one run by options with --xenium and --out."""
    named = [f"--{key.replace('_', '-')}" for key in run]
    if args.config is not None:
        if named or args.out is not None:
            raise BadInput(
                "cellpair curate",
                expected="either CONFIG.toml or one run by options",
                found=f"{args.config} and {', '.join([*named, *(['--out'] if args.out else [])])}",
                remedy="write the options into the config, or leave the config out",
            )
        if args.config.is_dir() or args.config.suffix == ".zip":
            raise BadInput(
                args.config,
                expected="CONFIG.toml",
                found="a folder" if args.config.is_dir() else "an archive",
                remedy="write a config for bundles by `cellpair init`, or name one by --xenium",
            )
        return
    if args.only and any(word.endswith(".toml") for word in args.only):
        raise BadInput(
            "cellpair curate --only",
            expected="ids of runs",
            found=", ".join(args.only),
            remedy="name the config first: cellpair curate CONFIG.toml --only RUN …",
        )
    if "xenium" not in run or args.out is None:
        raise BadInput(
            "cellpair curate",
            expected="CONFIG.toml, or for one run at least --xenium and --out",
            found=", ".join([*named, *(["--out"] if args.out else [])]) or "neither",
            remedy="write a config with `cellpair init BUNDLE`; see cellpair curate --help",
        )


def _register(args: argparse.Namespace) -> int:
    from flows.register import register

    return register(args.xenium, args.slide, args.out.resolve(), args.alignment, args.mpp)


def _segment(args: argparse.Namespace) -> int:
    from flows.report.nuclei_page import PAGE_FILE
    from flows.segment import segment_slide

    n_nuclei = segment_slide(
        args.slide, args.out.resolve(), mpp=args.mpp, model=args.model, labels=args.labels,
        runtime=_runtime(args),
    )  # fmt: skip
    print(f"{n_nuclei} nuclei: {args.out / PAGE_FILE}")
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
        told = {
            "dataset": facts and facts["fingerprint"],
            "faults": faults,
            "gene_names": facts and facts["gene_names"],
        }
        print(json.dumps(told, indent=1))
    elif facts is None:
        print("\n".join(faults))
    else:
        print(f"no faults: {sum(facts['samples'].values())} samples")
        if facts["gene_names"]:
            print(f"{len(facts['gene_names'])} genes that panels name differently: see info")
    return FAULTS_FOUND if faults else DONE


def _clean(args: argparse.Namespace) -> int:
    from flows.clean import clean

    return clean(args.out, dry_run=args.dry_run)


def _train(args: argparse.Namespace) -> int:
    from flows.training import train

    how = ["--resume"] if args.resume else []
    if args.init_from is not None:
        how = ["--init-from", str(args.init_from)]
    if args.profile is not None:
        how += ["--profile", args.profile]
    return train(args.config, *how)


def _evaluate(args: argparse.Namespace) -> int:
    from flows.training import evaluate

    page = evaluate(args.checkpoint, args.dataset, args.out.resolve())
    print(page)
    return DONE


# Options of `export` that say something of one layout alone.
_OF_LAYOUT = {"top_k": "openclip", "outlines": "spatialdata", "xenium": "spatialdata"}


def _export(args: argparse.Namespace) -> int:
    if args.to == "bags" or args.checkpoint is not None:
        what = "bags of patch features by a checkpoint"
        raise not_there_yet("cellpair export", what, "export the patches by --to openclip")
    for name, layout in _OF_LAYOUT.items():
        if getattr(args, name) and args.to != layout:
            raise BadInput(
                f"--{name.replace('_', '-')}",
                expected=f"with --to {layout}",
                found=f"--to {args.to}",
                remedy="leave the option out",
            )
    from flows.export.command import export

    return export(
        args.dataset,
        args.to,
        args.out.resolve(),
        splits=args.split,
        runs=args.run,
        top_k=args.top_k,
        outlines=args.outlines,
        bundles=args.xenium,
    )


def _deploy(args: argparse.Namespace) -> int:
    from flows.deploy import deploy

    deploy(args.curate.resolve(), args.train.resolve() if args.train else None)
    return DONE


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "simulate": _simulate,
    "init": _init,
    "curate": _curate,
    "register": _register,
    "segment": _segment,
    "info": _info,
    "check": _check,
    "clean": _clean,
    "train": _train,
    "evaluate": _evaluate,
    "export": _export,
    "deploy": _deploy,
}


if __name__ == "__main__":
    sys.exit(main())
