"""`split.hold_out`: whole donors of public samples go to test, and what contradicts it is told."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from flows import pipeline
from flows.cluster import BlockMap, Runtime
from flows.config import CurateConfig, read_curate_config
from flows.hold_out import LISTS, held_out_donors, unknown_names
from flows.split import SplitSection, split_of
from shards.artifact import write_atomically
from shards.check import describe, validate
from shards.dataset import dataset_path, publish_dataset, read_dataset
from shards.errors import BadInputs
from shards.schema import Dataset
from tests.flows.ruined import copy_by_links


def test_the_list_of_the_benchmark_is_as_published() -> None:
    assert len(set(LISTS["hest-bench"])) == 15
    assert {"TENX95", "NCBI783", "TENX141"} <= set(LISTS["hest-bench"])


def test_all_names_and_runs_of_a_held_out_donor_are_in_test() -> None:
    section = SplitSection(
        hold_out=("hest-bench", "S7"), aliases={"P": ("P left", "P right")}, withdraw=("W",)
    )
    samples = [
        ("TENX95", ["P left"]),
        (None, ["P right"]),
        ("S7", ["D1", "D2", "W"]),
        ("S8", ["D3"]),
        ("TENX99", ["D1"]),
    ]
    held_out = held_out_donors(samples, section)
    assert held_out == {"D1": ("S7", "TENX99"), "D2": ("S7",), "P": ("TENX95",)}
    for donor in ("P", "P left", "P right", "D1", "D2"):
        assert split_of(donor, section, held_out) == "test"
    assert split_of("D3", section, held_out) == split_of("D3", SplitSection())


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("hest-bench", None),
        ("S7", None),
        ("hest_bench", "hest-bench"),
        ("Hest-Bench", "hest-bench"),
        ("s7", "S7"),
        ("S7 ", "S7"),
        ("S8", ""),  # of a run that is yet to come, for all that is known
        ("TENX95", ""),
    ],
)
def test_names_that_nothing_has_are_told(name: str, found: str | None) -> None:
    misspelt, others = unknown_names([name], ["S7", "TENX1"])
    assert misspelt == ({name: found} if found else {})
    assert others == ([name] if found == "" else [])


CONFIG = """
name = "held"
out = "out"
[patch]
fov_um = 16.0
size_px = 32
[segmentation]
model = "none"
[split]
{split}
[[runs]]
id = "bench"
source_id = "TENX95"
xenium = "bench/outs"
image = "morphology"
donors = "cores.csv"
[[runs]]
id = "left"
xenium = "left/outs"
image = "morphology"
donor = "P left"
[[runs]]
id = "other"
source_id = "S1"
xenium = "other/outs"
image = "morphology"
donor = "D-2"
"""
ALIASES = 'aliases = { P = ["P left", "P right"] }'
ASSIGN = 'assign = { D-2 = "train" }'


def config_of(folder: Path, split: str) -> CurateConfig:
    (folder / "curate.toml").write_text(CONFIG.format(split=split))
    return read_curate_config(folder / "curate.toml")


@pytest.fixture(scope="module")
def folder(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs; of the first, which has a public name, the cells are of P right and of D2."""
    folder = tmp_path_factory.mktemp("held")
    for name in ("bench", "left", "other"):
        copy_by_links(simulated, folder / name)
    cells = pd.read_parquet(simulated / "outs" / "cells.parquet")[["cell_id"]]
    cells["donor"] = ["P right"] * 100 + ["D2"] * 200
    cells.to_csv(folder / "cores.csv", index=False)
    return folder


def curated(folder: Path, split: str, *only: str) -> Dataset:
    with BlockMap(Runtime(workers=1)) as blocks:
        dataset = pipeline.curate(config_of(folder, split), blocks, only=only).dataset
    assert dataset is not None
    return dataset


def test_whole_donors_of_a_listed_sample_are_in_test_and_check_proves_it(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = folder / "out"
    apart = 'assign = { "P left" = "train", D-2 = "train", D2 = "val" }'
    plain = curated(folder, f"{apart}\n{ALIASES}")
    held = curated(folder, f'hold_out = ["hest-bench", "S9"]\n{ASSIGN}\n{ALIASES}')
    assert plain.donors == {"P right": "train", "D2": "val", "P left": "train", "D-2": "train"}
    assert {run.path for run in plain.runs} == {run.path for run in held.runs}
    assert held.donors == {"P right": "test", "D2": "test", "P left": "test", "D-2": "train"}
    assert held.hold_out == {"hest-bench": LISTS["hest-bench"], "S9": ("S9",)}
    assert held.held_out == {"D2": ("TENX95",), "P": ("TENX95",)}
    assert [run.source_id for run in held.runs] == ["TENX95", None, "S1"]
    assert "hold_out names source_ids that no run has: S9" in caplog.text
    alike = "donors 'D-2' and 'D2' are told apart by their names alone: if they are one person, say"
    assert f'{alike} [split] aliases = {{ "D-2" = ["D2"] }}' in caplog.text
    assert "'P left'" not in caplog.text
    assert describe(out)["held_out"] == {"D2": ["TENX95"], "P": ["TENX95"]}
    assert validate(out) == []
    # Runs that are not looked at hold their donors out too.
    assert curated(folder, f'hold_out = ["hest-bench"]\n{ALIASES}', "left").donors == {
        "P left": "test"
    }
    assert validate(out) == []


def test_check_finds_a_held_out_donor_elsewhere(folder: Path) -> None:
    held = curated(folder, f'hold_out = ["hest-bench"]\n{ASSIGN}\n{ALIASES}')
    out = folder / "out"
    shards = {
        "train": (*held.shards["train"], *held.shards["test"]),
        "val": (),
        "test": (),
    }
    donors = dict.fromkeys(held.donors, "train")
    for held_out, words in (
        (held.held_out, "'P left' is held out for TENX95, but in train"),
        ({}, "'D2' is held out for TENX95, which it tells otherwise"),
    ):
        leaking = Dataset.of(
            held.name, held.runs, held.panels, donors, shards, held.aliases,
            unions=held.unions, hold_out=held.hold_out, held_out=held_out,
        )  # fmt: skip
        publish_dataset(out, leaking)
        assert any(words in fault for fault in validate(out))
        (out / dataset_path(leaking.fingerprint)).unlink()
    publish_dataset(out, held)
    assert validate(out) == []


def test_what_contradicts_a_hold_out_is_a_fault(folder: Path) -> None:
    told = {
        'hold_out = ["hest_bench"]': "'hest_bench' is neither a list nor a source_id",
        'hold_out = ["S1"]\nassign = { D-2 = "train" }': "sends 'D-2' to 'train', but split",
    }
    for split, words in told.items():
        with pytest.raises(BadInputs, match=words):
            config_of(folder, split)
    config_of(folder, 'hold_out = ["S1"]\nassign = { D-2 = "test" }')
    # Donors by file are known when it is read.
    config = config_of(folder, f'hold_out = ["hest-bench"]\nassign = {{ P = "val" }}\n{ALIASES}')
    words = "sends 'P' to 'val', but split"
    with BlockMap(Runtime(workers=1)) as blocks, pytest.raises(BadInputs, match=words):
        pipeline.curate(config, blocks)


def test_datasets_of_earlier_versions_are_sound(folder: Path) -> None:
    held = curated(folder, f'hold_out = ["hest-bench"]\n{ALIASES}')
    out = folder / "out"
    runs = [
        run.model_copy(update={"source_id": None, "donors": (), "section": None})
        for run in held.runs
    ]
    aliases = {donor: name for donor, name in held.aliases.items() if donor in held.donors}
    old = Dataset.of(held.name, runs, held.panels, held.donors, held.shards, aliases)
    old = old.model_copy(update={"schema_version": 2})
    path = out / dataset_path(old.fingerprint)
    write_atomically(path, old.model_dump_json(indent=1, exclude=old.unsaid).encode())
    assert b"section" not in path.read_bytes()
    assert read_dataset(path)[0] == old
    assert validate(path) == []
    path.unlink()
