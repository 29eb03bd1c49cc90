"""`check` finds what was broken, and finds nothing where nothing was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from shards.check import describe, validate
from shards.dataset import publish_dataset, read_dataset
from shards.errors import BadInput
from shards.schema import Dataset
from tests.shards.tiny import write_tiny_dataset


def test_a_sound_dataset_has_no_faults(tmp_path: Path) -> None:
    write_tiny_dataset(tmp_path)
    assert validate(tmp_path) == []
    assert validate(tmp_path / "dataset.json") == []
    facts = describe(tmp_path)
    assert facts["samples"] == {"train": 100, "val": 0, "test": 50}
    assert facts["totals"]["seen"] == 153


def a_tar(root: Path) -> Path:
    return sorted(root.glob("runs/*/shards/*/*.tar"))[0]


def flip_a_byte_of_a_patch(root: Path) -> None:
    data = bytearray(a_tar(root).read_bytes())
    data[700] ^= 0xFF
    a_tar(root).write_bytes(data)


def cut_a_tar(root: Path) -> None:
    a_tar(root).write_bytes(a_tar(root).read_bytes()[:-10240])


def lose_a_table(root: Path) -> None:
    a_tar(root).with_suffix(".parquet").unlink()


def swap_two_tables(root: Path) -> None:
    a, b = (p.with_suffix(".parquet") for p in sorted(root.glob("runs/*/shards/*/*.tar"))[:2])
    a_bytes = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(a_bytes)


def edit_the_dataset(root: Path, change: Callable[[dict[str, object]], None]) -> None:
    pointer = json.loads((root / "dataset.json").read_text())
    path = root / pointer["dataset"]
    dataset = json.loads(path.read_text())
    change(dataset)
    path.write_text(json.dumps(dataset, indent=1, ensure_ascii=False))


def move_a_donor_to_another_split(root: Path) -> None:
    edit_the_dataset(root, lambda d: d["donors"].update(D1="test"))  # type: ignore[attr-defined]


def list_a_shard_twice(root: Path) -> None:
    edit_the_dataset(
        root,
        lambda d: d["shards"]["test"].append(d["shards"]["train"][0]),  # type: ignore[index]
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_byte_of_a_patch, "sha256"),
        (cut_a_tar, "sha256"),
        (lose_a_table, "missing"),
        (swap_two_tables, "sha256"),
        (move_a_donor_to_another_split, "donor 'D1' is in test, but the shard is not"),
        (list_a_shard_twice, "listed in 2 places"),
    ],
)
def test_damage_is_found(tmp_path: Path, damage: Callable[[Path], None], words: str) -> None:
    write_tiny_dataset(tmp_path)
    damage(tmp_path)
    assert any(words in fault for fault in validate(tmp_path))


def test_an_edited_manifest_is_found(tmp_path: Path) -> None:
    write_tiny_dataset(tmp_path)
    manifest = sorted(tmp_path.glob("runs/*/shards/*/manifest.json"))[0]
    manifest.write_text(manifest.read_text().replace('"test"', '"liver"'))
    assert any("the manifest is not the one" in fault for fault in validate(tmp_path))


def test_a_folder_without_a_dataset_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        validate(tmp_path)


def test_totals_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    write_tiny_dataset(tmp_path)
    manifest = sorted(tmp_path.glob("runs/*/shards/*/manifest.json"))[0]
    manifest.write_text(manifest.read_text().replace('"seen": 51', '"seen": 52'))
    assert any("52 cells seen" in fault for fault in validate(tmp_path))


def test_a_person_in_two_splits_is_found(tmp_path: Path) -> None:
    write_tiny_dataset(tmp_path, {"D1": "train", "D2": "train", "D3": "test"})
    old, _ = read_dataset(tmp_path)
    for donors, straddles in ((["D1", "D2"], False), (["D2", "D3"], True)):
        aliases = {donors[0]: "P", donors[1]: "P"}
        new = Dataset.of(old.name, old.runs, old.panels, old.donors, old.shards, aliases)
        assert new.fingerprint != old.fingerprint
        publish_dataset(tmp_path, new)
        found = [fault for fault in validate(tmp_path) if "'P' straddles splits" in fault]
        assert bool(found) == straddles


def test_a_dataset_of_the_first_version_is_still_read(tmp_path: Path) -> None:
    write_tiny_dataset(tmp_path)

    def to_version_1(dataset: dict[str, object]) -> None:
        dataset["schema_version"] = 1
        del dataset["aliases"]

    edit_the_dataset(tmp_path, to_version_1)
    dataset, _ = read_dataset(tmp_path)
    assert dataset.aliases == {}
    assert validate(tmp_path) == []


@pytest.mark.parametrize("aliases", [{"D9": "P"}, {"D1": "D2", "D2": "D3"}])
def test_aliases_are_names_of_the_datasets_donors(tmp_path: Path, aliases: dict[str, str]) -> None:
    old, _ = read_dataset(write_tiny_dataset(tmp_path))
    with pytest.raises(ValidationError, match="not names of its donors"):
        Dataset.of(old.name, old.runs, old.panels, old.donors, old.shards, aliases)
