"""`cellpair simulate`: every option arrives, and a bad one is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.cli import main


def test_every_option_arrives_in_the_simulation(tmp_path: Path) -> None:
    command = (
        f"simulate {tmp_path / 's'} --cells 40 --seed 5 --donor-seed 3 --donors 2 --workers 2 "
        "--layout xoa-4.0 --no-cells-zarr --zip --stains --protein --rnd-version "
        "--mpp 1.0 --rotation-deg 30 --mirror --warp-um 5 --tear-um 10 --fold-um 8 "
        "--missing-um 40 --other-pieces 1 --serial-section --compression jpeg2000 "
        "--genes 350 --species mouse"
    )
    assert main(command.split()) == 0
    params = json.loads((tmp_path / "s/truth/simulation.json").read_text())["params"]
    assert params == {
        "n_cells": 40, "seed": 5, "donor_seed": 3, "n_donors": 2,
        "panel": {"n_genes": 350, "species": "mouse"},
        "bundle": {
            "layout": "xoa-4.0", "cells_zarr": False, "zipped": True, "stains": True,
            "protein": True, "rnd_version": True,
        },
        "slide": {
            "mpp": 1.0, "rotation_deg": 30.0, "mirror": True, "warp_um": 5.0, "tear_um": 10.0,
            "fold_um": 8.0, "missing_um": 40.0, "other_pieces": 1, "serial_section": True,
            "compression": "jpeg2000",
        },
    }  # fmt: skip
    assert (tmp_path / "s/outs.zip").is_file()
    assert not (tmp_path / "s/outs").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--cells 10", "n_cells"),
        ("--cells 50 --donors 3", "for each donor"),
        ("--cells 50 --layout xoa-9.9", "layout"),
        ("--cells 50 --layout xoa-1.0 --stains", "since 2.0"),
        ("--cells 50 --mpp 0", "mpp"),
    ],
)
def test_a_bad_option_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, named: str
) -> None:
    assert main(["simulate", str(tmp_path / "s"), *options.split()]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
