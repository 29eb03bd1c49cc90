"""`cellpair init`: what lies there is written, what is not clear is marked, nothing is guessed."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from flows.beside import run_ids
from flows.cli import main
from flows.config import CurateConfig, read_curate_config
from flows.toml_text import comment, quoted
from shards.errors import BadInput, BadInputs
from shards.schema import RunId


@pytest.fixture
def bundle(simulated: Path, tmp_path: Path) -> Path:
    """A bundle alone in a folder of its own."""
    (tmp_path / "raw" / "run a").mkdir(parents=True)
    outs = tmp_path / "raw" / "run a" / "outs"
    outs.symlink_to(simulated / "outs")
    return outs


def init(*args: Path | str) -> int:
    return main(["init", *map(str, args)])


def marks(config: Path) -> set[str]:
    """Where `curate` refuses the config, each by a mark."""
    with pytest.raises(BadInputs) as caught:
        read_curate_config(config)
    for fault in caught.value.faults:
        assert (fault.found, fault.remedy) == ("a mark, TODO", "write it in place of the mark")
        assert fault.expected  # what `init` says of it
    return {fault.where.removeprefix(f"{config}: ") for fault in caught.value.faults}


def filled(config: Path, **values: str) -> CurateConfig:
    """The config once a person has replaced its marks."""
    text = config.read_text(encoding="utf-8")
    lines = text.splitlines()
    for i, line in enumerate(lines):
        key = line.partition(" = ")[0]
        if "{ TODO" in line and not line.startswith("#"):
            lines[i] = f"{key} = {values.pop(key)}"
    assert not values
    config.write_text("\n".join(lines), encoding="utf-8")
    return read_curate_config(config)


def comments(config: Path) -> str:
    lines = config.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def test_the_simulators_layout_lacks_a_donor_alone(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "curate.toml"
    assert init(simulated / "outs", "--out", config) == 0
    assert "to fill in: run-1: donor" in capsys.readouterr().out
    assert marks(config) == {"runs.0.donor"}
    assert "300 cells" in comments(config)
    assert "0.2738 µm per pixel" in comments(config)
    assert "he_keypoints.csv" in comments(config)
    (run,) = filled(config, donor='"D1"').runs
    assert (run.id, run.donor, run.mpp) == ("run-1", "D1", None)
    assert run.xenium == simulated / "outs"
    assert run.slide == simulated / "he.ome.tif"
    assert run.alignment == simulated / "he_imagealignment.csv"


def test_nothing_beside_a_bundle_is_nothing_chosen(bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "curate.toml"
    (bundle.parent / "section.svs").touch()
    assert init(bundle, "--out", config) == 0
    assert marks(config) == {"runs.0.slide", "runs.0.donor"}
    assert tomllib.loads(config.read_text("utf-8"))["runs"][0]["alignment"] == "auto"
    assert 'image = "morphology"' in comments(config)
    assert 'slide = "raw/run a/section.svs"' in comments(config)
    assert tomllib.loads(config.read_text("utf-8"))["runs"][0]["xenium"] == "raw/run a/outs"


def test_of_several_slides_none_is_chosen(bundle: Path, simulated: Path, tmp_path: Path) -> None:
    for name in ("a_he_image.ome.tif", "b_he_image.ome.tif"):
        (bundle.parent / name).symlink_to(simulated / "he.ome.tif")
    for name in ("a_he_imagealignment.csv", "b_he_imagealignment.csv"):
        shutil.copy(simulated / "he_imagealignment.csv", bundle.parent / name)
    config = tmp_path / "curate.toml"
    assert init(bundle, "--out", config) == 0
    assert marks(config) == {"runs.0.slide", "runs.0.alignment", "runs.0.donor"}
    for name in ("a_he_image.ome.tif", "b_he_image.ome.tif", "b_he_imagealignment.csv"):
        assert f'"raw/run a/{name}"' in comments(config)


def test_bundles_in_one_folder_are_told_apart_by_name_alone(
    simulated: Path, tmp_path: Path
) -> None:
    for sample in ("s1", "s1_b"):
        shutil.copytree(simulated / "outs", tmp_path / f"{sample}_outs")
    (tmp_path / "s1_he_image.ome.tif").symlink_to(simulated / "he.ome.tif")
    shutil.copy(simulated / "he_imagealignment.csv", tmp_path / "s1_b_he_imagealignment.csv")
    config = tmp_path / "curate.toml"
    assert init(tmp_path / "s1_outs", tmp_path / "s1_b_outs", "--out", config) == 0
    first, second = tomllib.loads(config.read_text("utf-8"))["runs"]
    assert (first["id"], second["id"]) == ("s1", "s1_b")
    assert first["slide"] == "s1_he_image.ome.tif"
    assert second["alignment"] == "s1_b_he_imagealignment.csv"
    assert "TODO" in first["alignment"]  # one lies there, and may be the other's
    assert "TODO" in second["slide"]


def test_a_slide_without_its_pixel_size_is_marked(bundle: Path, tmp_path: Path) -> None:
    pixels = np.full((64, 64, 3), 240, np.uint8)
    tifffile.imwrite(bundle.parent / "he.ome.tif", pixels, photometric="rgb", tile=(32, 32))
    config = tmp_path / "curate.toml"
    assert init(bundle, "--out", config) == 0
    assert marks(config) == {"runs.0.mpp", "runs.0.donor"}
    assert "64 x 64 px" in comments(config)


def test_a_candidate_that_is_no_he_is_not_taken(bundle: Path, tmp_path: Path) -> None:
    tifffile.imwrite(bundle.parent / "he.ome.tif", np.zeros((64, 64), np.uint16), tile=(32, 32))
    (bundle.parent / "he_imagealignment.csv").write_text("1;0;0\n0;1;0\n0;0;1\n")
    config = tmp_path / "curate.toml"
    assert init(bundle, "--out", config) == 0
    assert marks(config) == {"runs.0.slide", "runs.0.alignment", "runs.0.donor"}
    assert "found 1 channel of uint16" in comments(config)
    assert "found semicolons" in comments(config)


@pytest.mark.parametrize(
    "name", ['a"b', "a'b\\n", 'x"\n[[runs]]\nid = "y', "# no", "März 1 é", "组织", "\u202etif.sj"]
)
def test_hostile_names_stay_names(simulated: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for part in ("outs", "he.ome.tif", "he_imagealignment.csv"):
        (folder / part).symlink_to(simulated / part)
    config = tmp_path / "curate.toml"
    assert init(folder / "outs", "--out", config) == 0
    (run,) = filled(config, donor='"D1"').runs
    assert run.xenium == folder / "outs"
    assert run.slide == folder / "he.ome.tif"


@given(st.text())
def test_any_text_survives_the_config(text: str) -> None:
    assert tomllib.loads(f"{comment(text)}\nkey = {quoted(text)}") == {"key": text}


def test_a_name_that_is_no_utf8_is_refused() -> None:
    with pytest.raises(BadInput, match="a name in UTF-8"):
        quoted("a\udcff")


@pytest.mark.parametrize(
    ("bundles", "ids"),
    [
        (["/raw/run-a/outs", "/raw/run-b/outs"], ["run-a", "run-b"]),
        (["/raw/X_V1_breast_outs.zip", "/raw/Y_xe_outs"], ["X_V1_breast", "Y"]),
        (["/a/outs", "/b/a/outs", "/c/a"], ["a", "a-2", "a-3"]),
        (["/raw/store.zarr", "/raw/Gewebe März.1", "/raw/组织"], ["store", "Gewebe-Marz-1", "run"]),
        # Neither the instrument nor the time of the scan goes into ids.
        (["/raw/output-XETG00012__0003392__ROI_1__20240131__120000"], ["0003392-ROI_1"]),
    ],
)
def test_ids_come_from_names(bundles: list[str], ids: list[str]) -> None:
    assert run_ids(map(Path, bundles)) == ids


@given(st.lists(st.text(st.characters(exclude_characters="/\0"), min_size=1), min_size=1))
def test_ids_are_valid_and_unique_whatever_the_names(names: list[str]) -> None:
    ids = run_ids([Path("/raw") / name for name in names])
    assert len(set(ids)) == len(ids)
    for run_id in ids:
        TypeAdapter(RunId).validate_python(run_id)


def test_an_existing_file_is_never_overwritten(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "curate.toml"
    config.write_text("mine")
    assert init(bundle, "--out", config) == 2
    assert config.read_text() == "mine"
    assert "none is overwritten" in capsys.readouterr().err


def test_every_bad_bundle_is_listed_and_nothing_written(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn = tmp_path / "torn.zip"
    torn.write_bytes(b"PK\x03\x04 and no end")
    again = bundle.parent / ".." / bundle.parent.name / "outs"
    code = init(bundle, tmp_path / "none", torn, again, "--out", tmp_path / "curate.toml")
    told = capsys.readouterr().err
    assert code == 2
    for words in (str(tmp_path / "none"), "a zip archive without its end", "several times"):
        assert words in told
    assert not (tmp_path / "curate.toml").exists()


def test_real_bundles(shared_data: Path, tmp_path: Path) -> None:
    config = tmp_path / "curate.toml"
    tiny = shared_data / "xenium" / "mouse_ileum_tiny"
    assert init(tiny, f"{tiny}_nucleus_expansion.zarr", "--out", config) == 0
    wanted = {f"runs.{i}.{key}" for i in (0, 1) for key in ("slide", "donor")}
    assert marks(config) == wanted | {"runs.1.species"}
    assert "36 cells, 5006 genes" in comments(config)
    assert "mouse" in comments(config)
