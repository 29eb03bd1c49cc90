"""`check` finds what was broken, and finds nothing where nothing was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from flows.cli import main
from shards.artifact import sha256_of
from shards.check import describe, validate
from shards.dataset import publish_dataset, read_dataset
from shards.errors import BadInput
from shards.schema import INDEX_SCHEMAS, Dataset
from shards.stream import read_stream
from shards.write import Sample
from tests.shards.tiny import tiny_panel, tiny_samples, write_tiny_dataset


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


def swap_two_shards(root: Path) -> None:
    first, second = sorted(root.glob("runs/*/shards/*/*.tar"))[:2]
    for suffix in (".tar", ".parquet"):
        a, b = first.with_suffix(suffix), second.with_suffix(suffix)
        a.rename(root / "a")
        b.rename(a)
        (root / "a").rename(b)


def swap_a_tar_and_its_table(root: Path) -> None:
    tar = a_tar(root)
    tar.rename(root / "a")
    tar.with_suffix(".parquet").rename(tar)
    (root / "a").rename(tar.with_suffix(".parquet"))


def lose_a_shard_set(root: Path) -> None:
    shutil.rmtree(a_tar(root).parent)


def lose_the_record(root: Path) -> None:
    (a_tar(root).parent / "artifact.json").unlink()


def put_a_folder_for_a_tar(root: Path) -> None:
    tar = a_tar(root)
    tar.unlink()
    tar.mkdir()


def put_a_folder_for_a_manifest(root: Path) -> None:
    manifest = a_tar(root).parent / "manifest.json"
    manifest.unlink()
    manifest.mkdir()


def a_panel(root: Path) -> Path:
    (panel,) = root.glob("panels/*.json")
    return panel


def edit_a_panel(root: Path) -> None:
    a_panel(root).write_text(a_panel(root).read_text().replace("GENE3", "GENE03"))


def lose_a_panel(root: Path) -> None:
    a_panel(root).unlink()


def lose_the_dataset(root: Path) -> None:
    (path,) = root.glob("datasets/*.json")
    path.unlink()


def edit_the_dataset(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    pointer = json.loads((root / "dataset.json").read_text())
    path = root / pointer["dataset"]
    dataset = json.loads(path.read_text())
    change(dataset)
    path.write_text(json.dumps(dataset, indent=1, ensure_ascii=False))


def move_a_donor_to_another_split(root: Path) -> None:
    edit_the_dataset(root, lambda d: d["donors"].update(D1="test"))


def list_a_shard_twice(root: Path) -> None:
    edit_the_dataset(
        root,
        lambda d: d["shards"]["test"].append(d["shards"]["train"][0]),
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_byte_of_a_patch, "sha256"),
        (cut_a_tar, "bytes, the manifest says"),
        (lose_a_table, "missing"),
        (swap_two_tables, "sha256"),
        (swap_two_shards, "000000.tar: sha256"),
        (swap_a_tar_and_its_table, "000000.parquet: sha256"),
        (lose_a_shard_set, "manifest.json: the folder is missing"),
        (lose_the_record, "artifact.json: missing"),
        (put_a_folder_for_a_tar, "000000.tar: not a file"),
        (put_a_folder_for_a_manifest, "manifest.json: Is a directory"),
        (edit_a_panel, "but its genes hash to"),
        (lose_a_panel, ".json: no such file"),
        (lose_the_dataset, ".json, which dataset.json names: no such file"),
        (move_a_donor_to_another_split, "donor 'D1' is in test, but the shard is not"),
        (list_a_shard_twice, "listed in 2 places"),
    ],
)
def test_damage_is_found(
    tmp_path: Path,
    damage: Callable[[Path], None],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_tiny_dataset(tmp_path, {"D1": "train", "D2": "test"}, n_per_donor=8, max_samples=4)
    damage(tmp_path)
    assert any(words in fault for fault in validate(tmp_path))
    assert main(["check", str(tmp_path)]) == 1
    told = capsys.readouterr()
    assert words in told.out
    assert told.err == ""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny")
    return write_tiny_dataset(root, {"D1": "train", "D2": "test"}, n_per_donor=3, max_samples=2)


def files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.data())
def test_a_flipped_byte_anywhere_is_found(tiny: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(files(tiny)))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[at] ^= data.draw(st.integers(1, 255))
    try:
        path.write_bytes(damaged)
        faults = validate(tiny)
    finally:
        path.write_bytes(whole)
    # Another file may be named too, as one that does not fit; the damaged one always is.
    assert any(path.name in fault or path.stem in fault for fault in faults)


def test_every_byte_of_the_small_records_is_looked_at(tiny: Path) -> None:
    for path in (tiny / "dataset.json", next(tiny.glob("datasets/*.json"))):
        whole = path.read_bytes()
        for at in range(0, len(whole), 1 if len(whole) < 300 else 7):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            assert any(path.name in fault or path.stem in fault for fault in validate(tiny)), at
        path.write_bytes(whole)
    assert validate(tiny) == []


def test_a_manifest_edited_to_fit_a_broken_tar_is_found(tiny: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(tiny, root)
    tar = a_tar(root)
    for content, words in ((b"", "does not open"), (b"x" * 700, "does not open")):
        tar.write_bytes(content)
        manifest = tar.parent / "manifest.json"
        record = json.loads(manifest.read_text())
        (shard,) = [s for s in record["shards"] if s["name"] == tar.stem]
        shard |= {"tar_sha256": sha256_of(tar), "tar_bytes": max(len(content), 1)}
        manifest.write_text(json.dumps(record, indent=1))
        faults = validate(root)
        assert any("manifest.json: the manifest is not the one" in fault for fault in faults)
        assert any("artifact.json" in fault and tar.name in fault for fault in faults)
        assert any(words in fault for fault in faults) == bool(content)


def test_an_edited_manifest_is_found(tmp_path: Path) -> None:
    write_tiny_dataset(tmp_path)
    manifest = sorted(tmp_path.glob("runs/*/shards/*/manifest.json"))[0]
    manifest.write_text(manifest.read_text().replace('"test"', '"liver"'))
    assert any("the manifest is not the one" in fault for fault in validate(tmp_path))


def test_a_folder_without_a_dataset_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        validate(tmp_path)


def test_samples_without_an_error_are_as_many_as_the_totals_say(tmp_path: Path) -> None:
    root = write_tiny_dataset(tmp_path / "data", {"D1": "train"}, n_per_donor=3, n_not_assessed=2)
    assert validate(root) == [
        "run0: registration error not assessed: 3 samples, but the totals say 2"
    ]


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


@pytest.mark.parametrize("version", [1, 2])
def test_a_dataset_of_an_earlier_version_is_still_read(tmp_path: Path, version: int) -> None:
    write_tiny_dataset(tmp_path)

    def to_earlier(dataset: dict[str, Any]) -> None:
        dataset["schema_version"] = version
        for key in ("unions", "hold_out", "held_out", *(("aliases",) if version == 1 else ())):
            del dataset[key]
        for run in dataset["runs"]:
            for key in ("source_id", "donors", "section"):
                del run[key]

    edit_the_dataset(tmp_path, to_earlier)
    dataset, _ = read_dataset(tmp_path)
    assert dataset.aliases == {}
    assert validate(tmp_path) == []


def test_shards_of_the_first_version_are_still_read(tmp_path: Path) -> None:
    old = write_tiny_dataset(tmp_path / "old", {"D1": "train"}, version=1)
    new = write_tiny_dataset(tmp_path / "new", {"D2": "train"}, seed=5)
    assert "sharpness" not in INDEX_SCHEMAS[1].names
    for shard in read_dataset(old)[0].shards["train"]:
        assert "sharpness" not in pq.read_schema(old / f"{shard}.parquet").names
    assert validate(old) == []
    columns = ["sharpness", "key", "pen_share"]
    told = read_stream([old], "train").table(columns)
    assert told.column_names == columns
    assert told["sharpness"].null_count == told.num_rows == 50
    assert read_stream([new], "train").table(columns).schema == told.schema
    written = tiny_samples("run0", "D1", 50, tiny_panel(), 0)
    pairs = read_stream([old], "train").read(range(50))
    assert [p.jpeg for p in pairs] == [s.image_jpeg for s in written]


def test_flags_are_borne_by_as_many_samples_as_the_totals_say(tmp_path: Path) -> None:
    def penned(samples: list[Sample]) -> list[Sample]:
        for sample in samples[:4]:
            sample.row["flags"] = ["pen"]
        return samples

    root = write_tiny_dataset(tmp_path / "right", {"D1": "train"}, n_flagged=4, changed=penned)
    assert validate(root) == []
    root = write_tiny_dataset(tmp_path / "wrong", {"D1": "train"}, n_flagged=5, changed=penned)
    assert validate(root) == ["run0: flag pen: 4 samples, but the totals say 5"]


@pytest.mark.parametrize("aliases", [{"D9": "P"}, {"D1": "D2", "D2": "D3"}])
def test_aliases_are_names_of_the_datasets_donors(tmp_path: Path, aliases: dict[str, str]) -> None:
    old, _ = read_dataset(write_tiny_dataset(tmp_path))
    with pytest.raises(ValidationError, match="not names of its donors"):
        Dataset.of(old.name, old.runs, old.panels, old.donors, old.shards, aliases)
