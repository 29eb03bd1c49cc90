"""The curate config: every fault at once, paths from its own folder, refusals with words."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flows.config import read_curate_config
from shards.errors import BadInputs


def write(folder: Path, text: str) -> Path:
    (folder / "raw" / "a").mkdir(parents=True, exist_ok=True)
    for name in ("he.ome.tif", "alignment.csv"):
        (folder / "raw" / name).touch()
    path = folder / "curate.toml"
    path.write_text(text)
    return path


RUN = """
[[runs]]
id = "a"
xenium = "raw/a"
slide = "raw/he.ome.tif"
alignment = "raw/alignment.csv"
donor = "D1"
"""


def faults(path: Path) -> dict[str, str]:
    with pytest.raises(BadInputs) as caught:
        read_curate_config(path)
    return {f.where.removeprefix(f"{path}: "): str(f) for f in caught.value.faults}


def test_relative_paths_start_at_the_config(tmp_path: Path) -> None:
    config = read_curate_config(write(tmp_path, f'name = "n"\nout = "o"\n{RUN}'))
    assert config.out == tmp_path / "o"
    assert config.runs[0].xenium == tmp_path / "raw" / "a"
    assert config.runs[0].slide == tmp_path / "raw" / "he.ome.tif"
    assert config.patch.spec("he").mpp == 0.25
    assert config.segmentation.model == "compact"


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    text = f"""
name = "n"
out = "o"
colour = "blue"
[patch]
fov_um = -1
[cells]
unit = "nuclei"
[registration]
refine = "yes please"
max_median_error_um = 0
[filters]
drop_flags = ["edge", "crooked"]
pen_above = 1.5
[split]
fractions = {{ train = 0.5, val = 0.1, test = 0.1 }}
hold_out = ["hest-bench"]
{RUN}
[[runs]]
id = "b b"
xenium = "raw/none"
slide = "raw/he.ome.tif"
alignment = 3
donor = ""
"""
    found = faults(write(tmp_path, text))
    assert set(found) == {
        "colour",
        "patch.fov_um",
        "cells.unit",
        "registration.refine",
        "registration.max_median_error_um",
        "filters.drop_flags.1",
        "filters.pen_above",
        "split",
        "runs.1.id",
        "runs.1.xenium",
        "runs.1.alignment",
        "runs.1.donor",
    }
    assert "an unknown key" in found["colour"]
    assert "not a valid path" in found["runs.1.alignment"]


def test_an_alignment_may_be_found_automatically(tmp_path: Path) -> None:
    run = RUN.replace('"raw/alignment.csv"', '"auto"')
    (found,) = read_curate_config(write(tmp_path, f'name = "n"\nout = "o"\n{run}')).runs
    assert found.alignment == "auto"


def test_missing_inputs_are_all_named(tmp_path: Path) -> None:
    path = write(tmp_path, f'name = "n"\nout = "o"\n{RUN}'.replace("raw/a", "raw/none"))
    (tmp_path / "raw" / "alignment.csv").unlink()
    assert set(faults(path)) == {"runs.0.xenium", "runs.0.alignment"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('alignment = "raw/alignment.csv"', "alignment is missing"),
        ('slide = "raw/he.ome.tif"', "either slide"),
        ('donor = "D1"', 'give either donor = "…" or'),
        ('xenium = "raw/a"', "no such key"),
    ],
)
def test_a_run_without_what_it_needs(tmp_path: Path, change: str, words: str) -> None:
    path = write(tmp_path, f'name = "n"\nout = "o"\n{RUN.replace(change, "")}')
    assert words in str(faults(path))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ('donors = "raw/cores.geojson"', 'give either donor = "…" or'),
        ('labels = "raw/groups.txt"', "labels = 'groups.txt' does not end in .csv"),
        ('image = "morphology"', "give either slide"),
    ],
)
def test_keys_of_a_run_that_do_not_go_together(tmp_path: Path, more: str, words: str) -> None:
    path = write(tmp_path, f'name = "n"\nout = "o"\n{RUN}{more}\n')
    assert words in str(faults(path))


def test_a_run_tells_all_that_does_not_go_together_at_once(tmp_path: Path) -> None:
    run = RUN.replace('donor = "D1"', 'donors = "cores.zip"\nlabels = "groups.xlsx"')
    run = run.replace('slide = "raw/he.ome.tif"\n', "")
    told = faults(write(tmp_path, f'name = "n"\nout = "o"\n{run}'))["runs.0"]
    for words in ("give either slide", "donors = 'cores.zip' does not end in .geojson or .json or",
                  "labels = 'groups.xlsx' does not end in .csv"):  # fmt: skip
        assert words in told


def test_he_nuclei_need_a_slide_and_its_nuclei(tmp_path: Path) -> None:
    head = 'name = "n"\nout = "o"\n[cells]\nunit = "he_nuclei"\n'
    second = RUN.replace('id = "a"', 'id = "b"').replace('donor = "D1"', 'donors = "raw/d.csv"')
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "d.csv").touch()
    third = '[[runs]]\nid = "c"\nxenium = "raw/a"\nimage = "morphology"\ndonor = "D3"\n'
    apart = '[segmentation]\nmodel = "none"\n[patch]\ncenter = "cell"\n'
    assert read_curate_config(write(tmp_path, head + RUN)).cells.expansion_um == 5.0
    found = faults(write(tmp_path, f"{head}{apart}{RUN}{second}{third}"))
    assert set(found) == {"cells.unit"}
    for words in (
        'segmentation.model = "none" does not find',
        'patch.center = "cell" has no meaning',
        "d.csv of run b names",
        'run c has image = "morphology"',
    ):
        assert words in found["cells.unit"]


def test_a_file_is_no_donor(tmp_path: Path) -> None:
    path = write(tmp_path, f'name = "n"\nout = "o"\n{RUN.replace("D1", "cores.geojson")}')
    assert "write donors for several donors" in str(faults(path))


def test_files_of_donors_and_labels_start_at_the_config_and_must_exist(tmp_path: Path) -> None:
    run = RUN.replace('donor = "D1"', 'donors = "raw/cores.GeoJSON"\nlabels = "raw/groups.csv"')
    path = write(tmp_path, f'name = "n"\nout = "o"\n{run}')
    assert set(faults(path)) == {"runs.0.donors", "runs.0.labels"}
    (tmp_path / "raw" / "cores.GeoJSON").touch()
    (tmp_path / "raw" / "groups.csv").touch()
    (run_config,) = read_curate_config(path).runs
    assert run_config.donor is None
    assert run_config.donors == tmp_path / "raw" / "cores.GeoJSON"
    assert run_config.labels == tmp_path / "raw" / "groups.csv"


def test_run_ids_are_unique(tmp_path: Path) -> None:
    assert "used twice: a" in str(faults(write(tmp_path, f'name = "n"\nout = "o"\n{RUN}{RUN}')))


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    assert "readable TOML" in str(faults(write(tmp_path, "name = ")))


def test_three_faults_in_three_places(tmp_path: Path) -> None:
    text = f"""
name = "n"
out = "o"
[patch]
fov = 56.0
[split]
by = "cell"
fractions = {{ train = 0.5, val = 0.1, test = 0.1 }}
{RUN.replace('"raw/a"', '"raw/none"')}
"""
    found = faults(write(tmp_path, text))
    assert set(found) == {"patch.fov", "split.by", "split", "runs.0.xenium"}
    assert "did you mean fov_um?" in found["patch.fov"]
    assert "add up to 0.7" in found["split"]
    assert "nothing at" in found["runs.0.xenium"]


def test_a_wrong_value_hides_no_fault_of_another_kind(tmp_path: Path) -> None:
    second = RUN.replace('donor = "D1"', "").replace('slide = "raw/he.ome.tif"', "")
    text = f"""
name = "n"
out = "raw/a/out"
min_counts = 3
[split]
fractions = {{ train = 2.0 }}
aliases = {{ A = ["B"], B = ["A"] }}
{RUN}{second}
"""
    path = write(tmp_path, text)
    found = faults(path)
    assert set(found) == {"min_counts", "split.fractions.train", "split", "runs.1", str(path)}
    assert "did you mean min_counts of [filters]?" in found["min_counts"]
    assert "aliases go in a circle" in found["split"]
    assert "run ids are used twice: a; out lies in the bundle of run a" in found[str(path)]
    assert "give either slide" in found["runs.1"]
    assert "give either donor" in found["runs.1"]


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        ("", 'nam = "n"', "did you mean name?"),
        ("[cells]", "qv_minimum = 3", "did you mean qv_min?"),
        ("[filters]", "qv_min = 3", "did you mean qv_min of [cells]?"),
        ("[split]", 'out = "o"', "did you mean out of the top?"),
        ("[patch]", "shininess = 3", "remove it, or mend its spelling"),
        ("[[runs]]", 'slides = "x"', "did you mean slide?"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest(
    tmp_path: Path, section: str, key: str, words: str
) -> None:
    head = 'name = "n"\nout = "o"\n'
    parts = [head, RUN, section, key] if section else [key, head, RUN]
    path = write(tmp_path, "\n".join(parts))
    assert words in str(faults(path))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("a.b", "letters, digits, _ and - only"),
        ("../x", "letters, digits, _ and - only"),
        ("<script>alert(1)</script>", "letters, digits, _ and - only"),
        ("a\\n", "letters, digits, _ and - only"),
        ("", "letters, digits, _ and - only"),
        ("Index", "an id other than index and curate"),
        ("x" * 101, "at most 100 characters"),
    ],
)
def test_ids_of_runs_that_could_not_name_files(tmp_path: Path, run: str, words: str) -> None:
    named = RUN.replace('id = "a"', f'id = "{run}"')
    assert words in faults(write(tmp_path, f'name = "n"\nout = "o"\n{named}'))["runs.0.id"]


def test_inputs_of_the_wrong_kind_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, f'name = "n"\nout = "o"\n[segmentation]\nmodel = "raw/weights"\n{RUN}')
    raw = tmp_path / "raw"
    (raw / "he.ome.tif").unlink()
    (raw / "he.ome.tif").mkdir()
    (raw / "alignment.csv").unlink()
    (raw / "alignment.csv").symlink_to(raw / "alignment.csv")
    (raw / "a").rmdir()
    os.mkfifo(raw / "a")
    found = faults(path)
    assert "a folder: " in found["runs.0.slide"]
    assert "Too many levels of symbolic links" in found["runs.0.alignment"]
    assert "neither file nor folder" in found["runs.0.xenium"]
    assert "nothing at" in found["segmentation.model"]


def test_a_path_that_no_file_can_have(tmp_path: Path) -> None:
    run = RUN.replace("raw/alignment.csv", "raw/\\u0000").replace("raw/he.ome.tif", "x" * 5000)
    found = faults(write(tmp_path, f'name = "n"\nout = "o"\n{run}'))
    assert set(found) == {"runs.0.alignment", "runs.0.slide"}


def test_inputs_of_withdrawn_donors_may_be_gone(tmp_path: Path) -> None:
    gone = SECOND_RUN.replace('"raw/a"', '"raw/gone"')
    path = write(tmp_path, f'name = "n"\nout = "o"\n[split]\nwithdraw = ["D2"]\n{RUN}{gone}')
    assert [run.id for run in read_curate_config(path).active_runs] == ["a"]


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    path = write(tmp_path, f'\ufeffname = "n"\nout = "o"\n{RUN}')
    assert read_curate_config(path).name == "n"


@pytest.mark.parametrize(
    "text",
    [
        "runs = 3",
        "runs = [3, []]",
        "split = 3\npatch = []\nruns = {}",
        "[split]\nfractions = 1\naliases = { A = 1 }\nassign = []",
        "[split]\naliases = { A = [1, {}] }\nassign = { A = [] }\nwithdraw = 3",
        "[[runs]]\nid = []\nxenium = 1\nslide = {}\ndonor = 4\ndonors = []\nlabels = 1.5",
        "[filters]\ndrop_flags = 3",
        "[filters]\ndrop_flags = [[], 3]",
        "[segmentation]\nmodel = 3",
        "out = 3\nname = []",
    ],
)
def test_values_of_another_kind_are_told(tmp_path: Path, text: str) -> None:
    assert faults(write(tmp_path, text))


SECOND_RUN = RUN.replace('id = "a"', 'id = "b"').replace("D1", "D2")


def test_runs_of_withdrawn_donors_are_not_active(tmp_path: Path) -> None:
    split = """[split]
withdraw = ["other name"]
aliases = { D1 = ["other name"] }
"""
    path = write(tmp_path, f'name = "n"\nout = "o"\n{split}{RUN}{SECOND_RUN}')
    config = read_curate_config(path)
    assert [run.id for run in config.runs] == ["a", "b"]
    assert [run.id for run in config.active_runs] == ["b"]


def test_when_all_donors_are_withdrawn_there_is_nothing_to_do(tmp_path: Path) -> None:
    split = '[split]\nwithdraw = ["D1", "D2"]\n'
    path = write(tmp_path, f'name = "n"\nout = "o"\n{split}{RUN}{SECOND_RUN}')
    assert "split.withdraw leaves no run" in str(faults(path))
