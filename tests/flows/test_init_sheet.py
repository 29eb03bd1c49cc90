"""`cellpair init --slides`: a sheet says what no file does, and every fault of it is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flows.cli import main
from flows.config import read_curate_config


@pytest.fixture
def folder(simulated: Path, tmp_path: Path) -> Path:
    """Two bundles `a` and `b`, and in `slides` what a sheet may name."""
    (tmp_path / "slides").mkdir()
    for name in ("a", "b"):
        shutil.copytree(simulated / "outs", tmp_path / name / "outs")
    (tmp_path / "slides" / "1.ome.tif").symlink_to(simulated / "he.ome.tif")
    shutil.copy(simulated / "he_imagealignment.csv", tmp_path / "slides" / "1.csv")
    return tmp_path


def init(folder: Path, sheet: str | bytes) -> int:
    path = folder / "slides" / "sheet.csv"
    path.write_bytes(sheet if isinstance(sheet, bytes) else sheet.encode())
    bundles = [str(folder / name / "outs") for name in ("a", "b")]
    return main(["init", *bundles, "--slides", str(path), "--out", str(folder / "curate.toml")])


@pytest.mark.parametrize("sign", [",", ";", "\t"])
def test_a_full_sheet_makes_a_config_that_is_valid_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str], sign: str
) -> None:
    lines = [
        "Bundle,slide,alignment,image,donor,tissue,species,mpp,source_id,id",
        "../a/outs,1.ome.tif,1.csv,,D1,breast,human,0.27,TENX1,first",
        f'{folder}/b/outs,,,morphology,D"2,,mouse,,,',
    ]
    sheet = "\ufeff" + "\r\n".join(lines).replace(",", sign).replace('D"2', '"D""2"')
    assert init(folder, sheet) == 0
    assert "nothing to fill in" in capsys.readouterr().out
    a, b = read_curate_config(folder / "curate.toml").runs
    assert (a.id, a.donor, a.tissue, a.species, a.mpp) == ("first", "D1", "breast", "human", 0.27)
    assert a.source_id == "TENX1"
    assert a.slide == folder / "slides" / "1.ome.tif"
    assert a.alignment == folder / "slides" / "1.csv"
    assert (b.id, b.image, b.donor, b.species) == ("b", "morphology", 'D"2', "mouse")
    assert (b.slide, b.alignment, b.mpp) == (None, None, None)


def test_a_bundle_without_a_line_keeps_its_marks(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(folder, "run,slide,alignment,donor\na,1.ome.tif,1.csv,D1\n") == 0
    told = capsys.readouterr().out
    assert "to fill in: b: donor" in told
    assert "to fill in: a:" not in told


@pytest.mark.parametrize(
    ("sheet", "words"),
    [
        ("bundle,slide,colour\n../a/outs,1.ome.tif,red\n", ["the column 'colour'"]),
        ("slide,donor\n1.ome.tif,D1\n", ["a column bundle or run"]),
        ("run,donor,donor\na,D1,D1\n", ["'donor' 2 times"]),
        ("run,donor\n", ["a header alone"]),
        ("", ["an empty file"]),
        ("run,donor\na,März\n".encode("latin-1"), ["save the sheet as csv in UTF-8"]),
        ("run,donor\nc,D1\n", ["line 2", "run = 'c'"]),
        ("run,donor\na,D1\na,D2\n", ["line 3", "line 2 is of already"]),
        ("run,bundle,donor\na,../b/outs,D1\n", ["line 2", "run = 'a'"]),
        ("run,donor\na,D1,x\n", ["line 2", "2 values, as the header has"]),
        ("run;mpp;donor\na;0,27;D1\n", ["line 2, mpp", "0,27"]),
        ("run,mpp,donor\na,-1,D1\n", ["line 2, mpp", "-1"]),
        ("run,slide,donor\na,none.tif,D1\n", ["line 2, slide", "no file at"]),
        ("run,image,donor\na,dapi,D1\n", ["image", "dapi"]),
        ("run,id,donor\na,b,D1\n", ["used twice: b"]),
        # All at once.
        ("run,slide,donor\na,x.tif,D1\nb,y.tif,D2\nc,,\n", ["x.tif", "y.tif", "run = 'c'"]),
    ],
)
def test_a_faulty_sheet_is_told_and_nothing_written(
    folder: Path, capsys: pytest.CaptureFixture[str], sheet: str | bytes, words: list[str]
) -> None:
    assert init(folder, sheet) == 2
    told = capsys.readouterr().err
    for word in words:
        assert word in told
    assert not (folder / "curate.toml").exists()
