"""`cellpair curate --xenium`: one run by options, and the config that they leave in the output."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows.cli import main
from flows.config import read_curate_config
from flows.one_run import read_one_run
from shards.dataset import read_dataset


def curate(run: Path, out: Path, *more: str, **changes: str | None) -> int:
    """One run of DAPI patches, which needs no network."""
    options = {"xenium": str(run / "outs"), "image": "morphology", "donor": "D1", **changes}
    words = [w for k, v in options.items() if v is not None for w in (f"--{k}", v)]
    return main(["curate", *words, "--out", str(out), "--workers", "1", *more])


def of_slide(run: Path) -> dict[str, str | None]:
    alignment = str(run / "he_imagealignment.csv")
    return {"image": None, "slide": str(run / "he.ome.tif"), "alignment": alignment}


@pytest.fixture(scope="module")
def curated(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("one run") / "out é"
    assert curate(simulated, out, "--tissue", 'a "b"') == 0
    return out


def test_one_run_needs_no_config_and_leaves_one(curated: Path, simulated: Path) -> None:
    dataset, _ = read_dataset(curated)
    assert dataset.totals.seen == 300
    assert [(run.run, run.tissue) for run in dataset.runs] == [("run-1", 'a "b"')]
    config = read_curate_config(curated / "curate.toml")
    (run,) = config.runs
    assert config.out == curated
    assert (run.id, run.xenium, run.image, run.donor, run.tissue) == (
        "run-1", simulated / "outs", "morphology", "D1", 'a "b"',
    )  # fmt: skip


def test_the_same_command_and_its_config_go_on(
    curated: Path, simulated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p: p.stat().st_ino for p in (curated / "runs").rglob("*.tar")}
    monkeypatch.chdir(simulated)  # another folder to start from, the same bundle
    relative = os.path.relpath(simulated / "outs")
    assert curate(simulated, curated, "--tissue", 'a "b"', xenium=relative) == 0
    assert main(["curate", str(curated / "curate.toml"), "--workers", "1"]) == 0
    assert {p: p.stat().st_ino for p in (curated / "runs").rglob("*.tar")} == before


def test_other_options_on_its_output_are_refused_by_name(
    curated: Path, simulated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (curated / "curate.toml").read_bytes()
    assert curate(simulated, curated, "--species", "mouse", donor="D2") == 2
    told = capsys.readouterr().err
    assert "runs.0.donor is 'D1' there, and 'D2' here" in told
    assert "runs.0.species is nothing there, and 'mouse' here" in told
    assert "runs.0.tissue is 'a \"b\"' there, and nothing here" in told
    assert "another --out" in told
    assert (curated / "curate.toml").read_bytes() == before


def test_a_plan_writes_no_config(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert curate(simulated, tmp_path / "out", "--plan") == 0
    assert "run-1  shards        to build" in capsys.readouterr().out
    assert not (tmp_path / "out" / "curate.toml").exists()


def test_every_fault_is_told_by_its_option_and_nothing_written(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = of_slide(simulated) | {"slide": "none.tif", "donor": "", "id": "a.b", "mpp": "-1"}
    assert curate(simulated, tmp_path / "out", **changes) == 2
    told = capsys.readouterr().err
    for option in ("--slide", "--donor", "--id", "--mpp"):
        assert f"{option}\n" in told
    assert not (tmp_path / "out").exists()


def test_without_an_alignment_it_is_found_and_told_what_could_be_given(
    simulated: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = of_slide(simulated) | {"alignment": None}
    assert curate(simulated, tmp_path / "out", "--plan", **changes) == 0
    assert "registered automatically" in caplog.text
    assert str(simulated / "he_imagealignment.csv") in caplog.text
    config, text = read_one_run(
        {"xenium": str(simulated / "outs"), "slide": str(simulated / "he.ome.tif"), "donor": "D1"},
        tmp_path / "out",
    )
    assert config.runs[0].alignment == "auto"
    assert 'alignment = "auto"' in text


def test_a_folder_of_something_else_stays_as_it_was(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.docx").touch()
    assert curate(simulated, tmp_path) == 2
    assert "thesis.docx" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["thesis.docx"]


def test_a_folder_with_a_config_that_is_no_toml(
    simulated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "curate.toml").write_text("name = ")
    assert curate(simulated, tmp_path) == 2
    assert str(tmp_path / "curate.toml") in capsys.readouterr().err
    assert (tmp_path / "curate.toml").read_text() == "name = "


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("curate", "CONFIG.toml, or for one run at least --xenium and --out"),
        ("curate --xenium outs", "found:    --xenium"),
        ("curate --out o --donor D", "found:    --donor, --out"),
        ("curate curate.toml --xenium outs --out o", "curate.toml and --xenium, --out"),
        ("curate --only run-a curate.toml", "name the config first"),
        ("curate .", "cellpair init"),
    ],
)
def test_either_a_config_or_one_run(
    capsys: pytest.CaptureFixture[str], command: str, words: str
) -> None:
    assert main(command.split()) == 2
    assert words in capsys.readouterr().err
