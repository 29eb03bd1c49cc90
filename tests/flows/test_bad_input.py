"""Rubbish through `cellpair curate`, end to end: each run says what is wrong, the good one goes on.

Two dozen ruined runs and a whole one share one config and one curation; each test reads the log of
its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flows import pipeline
from flows.built import Built
from flows.cli import main
from flows.cluster import BlockMap, Runtime
from flows.config import read_curate_config
from shards.check import validate
from shards.dataset import read_dataset
from tests.flows import ruined
from tests.flows.ruined import HE_MPP, Ruin
from tests.shards.tiny import write_tiny_dataset

IN_BUNDLE = (
    "experiment.xenium",
    "gene_panel.json",
    "cells.parquet",
    "transcripts.parquet",
    "nucleus_boundaries.parquet",
    "cells.zarr.zip",
    "cell_feature_matrix.h5",
    "morphology_focus/morphology_focus_0000.ome.tif",
)


@dataclass(frozen=True)
class Case:
    """What is ruined, the words that tell it, and the keys of its run; paths are its folder's."""

    ruin: Ruin
    words: str
    xenium: str = "outs"
    slide: str | None = None
    donors: str | None = None
    more: dict[str, str] = field(default_factory=dict)

    def table(self, run: str) -> str:
        keys = {"xenium": f"{run}/{self.xenium}"}
        if self.slide is None:
            keys["image"] = "morphology"
        else:
            keys |= {"slide": f"{run}/{self.slide}", "alignment": f"{run}/he_imagealignment.csv"}
        if self.donors is None:
            keys["donor"] = f"donor of {run}"
        else:
            keys["donors"] = f"{run}/{self.donors}"
        keys |= {key: f"{run}/{name}" for key, name in self.more.items()}
        return f'[[runs]]\nid = "{run}"\n' + "".join(f'{k} = "{v}"\n' for k, v in keys.items())


def on_slide(ruin: Ruin, words: str, slide: str = "he.ome.tif") -> Case:
    return Case(ruin, words, slide=slide)


def named(path: str, words: str) -> str:
    return rf"{re.escape(path)}.*\n  expected: .*\n  found: .*{words}"


CASES: dict[str, Case] = {
    # A bundle that is not whole.
    "a file still being copied": Case(
        ruined.filled("outs/transcripts.parquet.part", b"x"),
        named("outs", "transcripts.parquet.part, the name of a file that is still being copied"),
    ),
    "a file that rsync writes": Case(
        ruined.filled("outs/.transcripts.parquet.aB3dE6", b"x"),
        named("outs", r"\.transcripts.parquet.aB3dE6, the name of a file that is still"),
    ),
    **{
        f"empty {name}": Case(ruined.emptied(f"outs/{name}"), named(name, "0 bytes"))
        for name in IN_BUNDLE
    },
    **{f"half of {name}": Case(ruined.cut(f"outs/{name}"), named(name, "")) for name in IN_BUNDLE},
    **{
        f"junk for {name}": Case(
            ruined.filled(f"outs/{name}", b"junk\0\xff" * 50), named(name, "")
        )
        for name in IN_BUNDLE
    },
    **{
        f"a folder for {name}": Case(ruined.made_a_folder(f"outs/{name}"), named(name, "a folder"))
        for name in IN_BUNDLE[1:]
    },
    "a folder for experiment.xenium": Case(
        ruined.made_a_folder("outs/experiment.xenium"), named("outs", "a folder without either")
    ),
    "a link to itself in the bundle": Case(
        ruined.made_a_loop("outs/cells.parquet"),
        named("cells.parquet", "Too many levels of symbolic links"),
    ),
    "transcripts.csv.gz cut short": Case(
        ruined.transcripts_of_a_cut_csv_gz, named("transcripts.csv.gz", "Truncated")
    ),
    # A bundle that says what can't be.
    "a missing column": Case(
        ruined.table("transcripts.parquet", lambda rows: rows.drop_columns("qv")),
        named("transcripts.parquet, column qv", "no such column"),
    ),
    "two cells with one id": Case(
        ruined.table("cells.parquet", ruined.with_value("cell_id", 1, ruined.FIRST)),
        named("cells.parquet, cell_id", "more than once"),
    ),
    "NaN positions": Case(
        ruined.table("cells.parquet", ruined.with_value("x_centroid", 3, float("nan"))),
        named("cells.parquet, column x_um", "nan in row 3"),
    ),
    "zero transcripts": Case(
        ruined.table("transcripts.parquet", lambda rows: rows.slice(0, 0)),
        named("outs", "a table of transcripts without a row"),
    ),
    "zero cells": Case(
        ruined.table("cells.parquet", lambda rows: rows.slice(0, 0)),
        r"cells.parquet.*\n  expected: at least one cell",
    ),
    "no pixel size": Case(
        ruined.experiment(pixel_size=None), named("experiment.xenium", "None")
    ),
    "pixels without end": Case(
        ruined.experiment(pixel_size=float("inf")), named("experiment.xenium", "inf")
    ),
    "an unknown organism": Case(
        ruined.experiment(panel_organism="Klingon"), 'remedy:   set species = "human"'
    ),
    "a panel nested without end": Case(
        ruined.filled("outs/gene_panel.json", b"[" * 100_000), named("gene_panel.json", "recursion")
    ),
    # Archives and stores.
    "a zip with a member outside": Case(
        ruined.member("outs/../../evil"), named("outs.zip", "'outs/../../evil'"), "outs.zip"
    ),
    "a zip with a member at the root": Case(
        ruined.member("/evil"), named("outs.zip", "'/evil'"), "outs.zip"
    ),
    "a zip with a link": Case(
        ruined.zipped(ruined.link_member), named("outs.zip", "a link, 'outs/analysis"), "outs.zip"
    ),
    "an empty zip": Case(
        ruined.emptied("outs.zip"), named("outs.zip", "a file that is no zip archive"), "outs.zip"
    ),
    "a store of another version": Case(
        ruined.a_store_of_another_version, named("store.zarr", "version 9.9"), "store.zarr"
    ),
    # Alignments.
    "semicolons": on_slide(
        ruined.alignment("1;0;0\n0;1;0\n0;0;1\n"), named("he_imagealignment.csv", "semicolons")
    ),
    "2 rows": on_slide(
        ruined.alignment("1,0,0\n0,1,0\n"), named("he_imagealignment.csv", "3 x 3.*2, 3")
    ),
    "no alignment": on_slide(ruined.alignment(""), named("he_imagealignment.csv", "an empty file")),
    "a picture for the alignment": on_slide(
        ruined.filled("he_imagealignment.csv", bytes(range(256))), "expected: a csv file"
    ),
    "a field without end": on_slide(
        ruined.alignment("1" * 200_000), named("he_imagealignment.csv", "field larger")
    ),
    "a singular matrix": on_slide(
        ruined.alignment("1e99,0,0\n0,1e99,0\n0,0,1\n"),
        named("he_imagealignment.csv", "singular"),
    ),
    "2 keypoints": on_slide(
        ruined.keypoints((0, 0), (500, 400)), named("he_imagealignment.csv", "2 keypoints")
    ),
    "keypoints on a line": on_slide(
        ruined.keypoints((0, 0), (5, 5), (1000, 1000), (20, 20)),
        named("he_imagealignment.csv", "4 keypoints, on one line"),
    ),
    # Slides.
    "one channel": on_slide(
        ruined.slide(lambda image: image[..., 0]), named("he.ome.tif", "1 channel of uint8")
    ),
    "no pixel size of the slide": on_slide(
        ruined.slide(lambda image: image, mpp=None),
        r"he.ome.tif(?s:.*)remedy: .*`mpp = …` of the run in the config",
    ),
    "mpp wrong by 10 %": on_slide(
        ruined.slide(lambda image: image, mpp=1.1 * HE_MPP), "if the alignment is right, set mpp"
    ),
    "mpp wrong by 50 %": on_slide(
        ruined.slide(lambda image: image, mpp=1.5 * HE_MPP), "if the alignment is right, set mpp"
    ),
    "the .tif beside the .ome.tif": on_slide(
        ruined.with_the_right_slide_beside,
        "he.ome.tif beside it says 0.2738: the alignment is of that file",
        "he.tif",
    ),
    "an empty slide": on_slide(ruined.emptied("he.ome.tif"), named("he.ome.tif", "not a TIFF")),
    "half a slide": on_slide(ruined.cut("he.ome.tif"), named("he.ome.tif", "")),
    **{
        f"junk for he.{suffix}": on_slide(
            ruined.filled(f"he.{suffix}", head + b"junk" * 99),
            named(f"he.{suffix}", ""),
            f"he.{suffix}",
        )
        for suffix, head in {
            "svs": b"", "mrxs": b"", "ndpi": b"II*\0", "txt": b"",
            "png": b"\x89PNG\r\n\x1a\n", "jpg": b"\xff\xd8\xff",
        }.items()
    },
    # Donors and labels.
    "an empty geojson": Case(
        ruined.filled("cores.geojson", b""),
        named("cores.geojson", "line 1"),
        donors="cores.geojson",
    ),
    "a geojson nested without end": Case(
        ruined.filled("cores.json", b"[" * 100_000), named("cores.json", ""), donors="cores.json"
    ),
    "a csv of donors that is none": Case(
        ruined.filled("cores.csv", bytes(range(256))), named("cores.csv", ""), donors="cores.csv"
    ),
    "an empty csv of labels": Case(
        ruined.filled("groups.csv", b""),
        named("groups.csv", "an empty file"),
        more={"labels": "groups.csv"},
    ),
}  # fmt: skip
RUN_OF = {case: f"run-{i:02d}" for i, case in enumerate(CASES)}
HEAD = 'name = "bad"\nout = "out"\n[segmentation]\nmodel = "none"\n'
GOOD = '[[runs]]\nid = "good"\nxenium = "good/outs"\nimage = "morphology"\ndonor = "G"\n'


@pytest.fixture(scope="module")
def ended(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """Exit code and output of one curation of a good run and all cases."""
    folder = tmp_path_factory.mktemp("bad")
    ruined.copy_by_links(simulated, folder / "good")
    tables = [GOOD]
    for name, case in CASES.items():
        case.ruin(ruined.copy_by_links(simulated, folder / RUN_OF[name]))
        tables.append(case.table(RUN_OF[name]))
    config = folder / "curate.toml"
    config.write_text(HEAD + "\n".join(tables), encoding="utf-8")
    yield main(["curate", str(config), "--workers", "1"]), folder / "out"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def curated(ended: tuple[int, Path]) -> Path:
    return ended[1]


@pytest.mark.parametrize("name", CASES)
def test_each_run_says_what_is_wrong_with_it(curated: Path, name: str) -> None:
    run = RUN_OF[name]
    told = (curated / "logs" / f"{run}.log").read_text(encoding="utf-8")
    _, _, message = told.partition(f"{run}: failed: ")
    assert re.search(CASES[name].words, message), told
    for word in ("\n  expected: ", "\n  found:    ", "\n  remedy:   "):
        assert message.count(word) == 1
    assert "Traceback" not in told
    assert not list(curated.glob(f"runs/{run}/shards/*/manifest.json"))


def test_the_good_run_goes_on_and_nothing_is_published(ended: tuple[int, Path]) -> None:
    code, curated = ended
    assert code == 2
    assert len(list(curated.glob("runs/good/shards/*/manifest.json"))) == 1
    assert not (curated / "dataset.json").exists()
    assert not list(curated.glob("datasets/*"))
    assert (curated / "report" / "index.html").exists()


# ---------------------------------------------------------------- one config a test


def curate(folder: Path, *tables: str, more: str = "", options: tuple[str, ...] = ()) -> int:
    config = folder / "curate.toml"
    config.write_text(HEAD + more + "\n".join(tables), encoding="utf-8")
    return main(["curate", str(config), "--workers", "1", *options])


def he_run(run: str, donor: str, folder: str, more: str = "") -> str:
    return (
        f'[[runs]]\nid = "{run}"\nxenium = "{folder}/outs"\nslide = "{folder}/he.ome.tif"\n'
        f'alignment = "{folder}/he_imagealignment.csv"\ndonor = "{donor}"\n{more}'
    )


@pytest.fixture
def two(simulated: Path, tmp_path: Path) -> Path:
    """A folder with two copies of one run, `a` and `b`, whose bundles differ by a note."""
    for name in "ab":
        ruined.copy_by_links(simulated, tmp_path / name)
    return tmp_path


def test_one_bundle_under_two_donors(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    tables = (he_run("a", "D1", "a"), he_run("b", "D2", "a"))
    assert curate(two, *tables, GOOD.replace("good/", "b/")) == 2
    for run in "ab":
        assert f"{run}: failed: run {run}, xenium = " in caplog.text
    assert "run a and run b have the same bundle, byte by byte, but the donors 'D1' and 'D2'" in (
        caplog.text
    )
    assert list((two / "out" / "runs").iterdir()) == [two / "out" / "runs" / "good"]
    assert not (two / "out" / "dataset.json").exists()


def test_one_bundle_that_files_part_in_two_ways(
    two: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cells = pq.read_table(two / "a" / "outs" / "cells.parquet")["cell_id"].to_pylist()
    for name, n in (("he", 100), ("dapi", 103)):
        rows = [f"{cell},{'D1' if i < n else 'P right'}" for i, cell in enumerate(cells)]
        (two / f"{name}.csv").write_text("\n".join(["cell_id,donor", *rows]))
    he = he_run("he", "D", "a").replace('donor = "D"', 'donors = "he.csv"')
    dapi = '[[runs]]\nid = "dapi"\nxenium = "a/outs"\nimage = "morphology"\ndonors = "dapi.csv"\n'
    assert curate(two, he, dapi, more='[split]\naliases = { P = ["P right"] }\n') == 2
    assert "he: failed: run he, xenium = " in caplog.text
    assert "dapi: failed: run dapi, xenium = " in caplog.text
    assert f"3 of 300 cells have other donors, the first is {min(cells[100:103])}" in caplog.text
    assert "'P' and 'D1'" in caplog.text
    assert not list(two.glob("out/runs/*/shards"))


def test_two_runs_overlap_on_one_slide(two: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert curate(two, he_run("a", "D1", "a"), he_run("b", "D2", "b")) == 2
    assert "run a and run b overlap: 300 of 300 cells of" in caplog.text
    made = {p.parts[-3] for p in (two / "out" / "runs").rglob("artifact.json")}
    assert made == {"registration"}
    assert not (two / "out" / "dataset.json").exists()


CONFIG_FAULTS = {
    "an unknown key": ("", "colour = 3\n", "curate.toml: runs.0.colour", "remove it, or mend"),
    "a misspelt key": ("", "tisue = 3\n", "curate.toml: runs.0.tisue", "did you mean tissue?"),
    "an alias cycle": (
        '[split]\naliases = { A = ["B"], B = ["A"] }\n', "",
        "curate.toml: split", "aliases go in a circle: 'B' → 'A' → 'B'",
    ),
    "all withdrawn": (
        '[split]\nwithdraw = ["D1"]\n', "", "curate.toml", "split.withdraw leaves no run",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIG_FAULTS)
def test_faults_of_the_config(two: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    more, in_run, where, words = CONFIG_FAULTS[name]
    assert curate(two, he_run("a", "D1", "a", in_run), more=more) == 2
    told = capsys.readouterr().err
    assert f"{where}\n" in told
    assert words in told
    assert not (two / "out").exists()


@pytest.mark.parametrize("run", ["a.b", "../x", "<script>", "a\\nb", "index", "curate"])
def test_hostile_ids_of_runs(two: Path, run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert curate(two, he_run(run, "D1", "a")) == 2
    assert "curate.toml: runs.0.id\n  expected: " in capsys.readouterr().err
    assert not (two / "out").exists()


def test_two_runs_with_one_id(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert curate(two, he_run("a", "D1", "a"), he_run("a", "D2", "b")) == 2
    assert "run ids are used twice: a" in capsys.readouterr().err


def test_a_donor_with_a_line_break(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert curate(two, he_run("a", "D\\n1", "a")) == 2
    assert "runs.0.donor\n  expected: text without line breaks" in capsys.readouterr().err


def test_hostile_names_of_donors_and_genes_name_no_file_and_are_escaped(two: Path) -> None:
    ruined.other_names_of_genes("../<img src=x onerror=alert(1)>\n")(two / "a")
    donor = "../../<script>alert(1)</script>"
    table = f'[[runs]]\nid = "a"\nxenium = "a/outs"\nimage = "morphology"\ndonor = "{donor}"\n'
    assert curate(two, table) == 0
    out = two / "out"
    assert validate(out) == []
    dataset, _ = read_dataset(out)
    assert list(dataset.donors) == [donor]
    assert any("<img src=x" in p.read_text() for p in (out / "panels").iterdir())
    for page in (out / "report").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert "<script>alert" not in text
        assert "<img src=x" not in text
    assert {p.name for p in two.iterdir()} == {"a", "b", "out", "curate.toml"}
    assert all(re.fullmatch(r"[\w.-]+", p.name) for p in out.rglob("*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
@pytest.mark.parametrize("name", ["outs/cells.parquet", "he.ome.tif", "he_imagealignment.csv"])
def test_a_file_without_the_right_to_read(
    two: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    content = (two / "a" / name).read_bytes()
    ruined.replace(two / "a" / name, content)
    (two / "a" / name).chmod(0)
    assert curate(two, he_run("a", "D1", "a")) == 2
    assert "Permission denied" in caplog.text
    assert name in caplog.text


def test_inputs_that_are_links_to_themselves_or_of_the_wrong_kind(
    two: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ruined.made_a_loop("he.ome.tif")(two / "a")
    ruined.made_a_folder("he_imagealignment.csv")(two / "a")
    assert curate(two, he_run("a", "D1", "a")) == 2
    told = capsys.readouterr().err
    assert re.search(r"runs.0.slide\n.*\n  found:    Too many levels of symbolic links", told)
    assert re.search(r"runs.0.alignment\n.*\n  found:    a folder", told)


def test_a_bundle_that_changes_while_it_is_read(two: Path) -> None:
    path = two / "curate.toml"
    path.write_text(HEAD + GOOD.replace("good/", "a/") + GOOD.replace("good", "b"))
    config = read_curate_config(path)

    def call(name: str, make: Callable[[], Built]) -> Built:
        if name == "good/cells":
            ruined.replace(two / "a" / "outs" / "copy.txt", "another")
        return make()

    with BlockMap(Runtime(workers=1)) as blocks:
        curated = pipeline.curate(config, blocks, call=call)
    assert [run.config.id for run in curated.runs] == ["b"]
    told = str(curated.failures["good"])
    assert "a/outs/copy.txt\n  expected: an input that stays as it is" in told
    assert not list(two.glob("out/runs/good/*/*/artifact.json"))
    assert curated.dataset is None


def test_evaluation_on_an_empty_test_split(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = write_tiny_dataset(tmp_path / "data", {"D1": "train"}, n_per_donor=3)
    checkpoint = tmp_path / "step-0"
    checkpoint.mkdir()
    meta = {
        "step": 1,
        "cursor": 1,
        "n_bad_samples": 0,
        "stream": "s",
        "val_r5": None,
        "fingerprint": "f",
        "files": {},
    }
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    arguments = ["evaluate", str(checkpoint), str(dataset), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    told = capfd.readouterr().err
    assert f"{dataset}\n  expected: at least 64 samples in the test split" in told
    assert "remedy:   assign a donor to test with [split] assign" in told


def test_what_is_only_a_little_off_goes_through(
    two: Path, caplog: pytest.LogCaptureFixture
) -> None:
    matrix = (two / "a" / "he_imagealignment.csv").read_text()
    ruined.alignment(f"\ufeff{matrix}")(two / "a")
    for name, off in (("a", 1.01), ("b", 1.03)):
        ruined.slide(lambda image: image, mpp=off * HE_MPP)(two / name)
    assert curate(two, he_run("a", "D1", "a"), he_run("b", "D2", "b")) == 0
    assert "a registration doubtful" not in caplog.text
    assert re.search(r"b registration doubtful: the alignment implies 0\.27[34]", caplog.text)
