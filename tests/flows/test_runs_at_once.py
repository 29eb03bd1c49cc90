"""Several runs worked on at once: the dataset and the failures of one after the other."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.trust.harness import made_in
from flows import pipeline
from flows.built import Built
from flows.cluster import BlockMap, Runtime
from flows.config import read_curate_config
from flows.log import logged_to
from shards.artifact import RECORD_FILE, files_under
from shards.cache import Cache
from shards.remote import remote_path
from tests.flows import ruined

CONFIG = """\
name = "several"
out = "{out}"
[segmentation]
model = "none"
[[runs]]
id = "a"
xenium = "a/outs"
image = "morphology"
donor = "D1"
[[runs]]
id = "bad"
xenium = "bad/outs"
image = "morphology"
donor = "D2"
[[runs]]
id = "c"
xenium = "c/outs"
slide = "c/he.ome.tif"
alignment = "c/he_imagealignment.csv"
donor = "D3"
"""


@pytest.fixture(scope="module")
def raw(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    for name in ("a", "bad", "c"):
        ruined.copy_by_links(simulated, folder / name)
    ruined.cut("outs/transcripts.parquet")(folder / "bad")
    return folder


def curated(
    raw: Path, name: str, runs_at_once: int, call: pipeline.Call, text: str = CONFIG
) -> pipeline.Curated:
    path = raw / f"{name}.toml"
    path.write_text(text.format(out=name))
    config = read_curate_config(path)
    with logged_to(config.out), BlockMap(Runtime(workers=1)) as blocks:
        return pipeline.curate(
            config, blocks, call=call, partial_dataset=True, runs_at_once=runs_at_once
        )


def test_runs_at_once_give_what_one_after_the_other_does(
    raw: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="cellpair")
    both_there = threading.Barrier(2, timeout=60)

    def call(name: str, make: Callable[[], Built]) -> Built:
        if name.endswith("/patches"):
            both_there.wait()
        return make()

    one = curated(raw, "one", 1, pipeline.direct)
    several = curated(raw, "several", 3, call)
    assert [run.config.id for run in several.runs] == ["a", "c"]
    assert list(several.failures) == list(one.failures) == ["bad"]
    assert several.dataset == one.dataset
    assert made_in(raw / "several") == made_in(raw / "one")
    # Lines of runs at work together are told apart.
    told = (raw / "several" / "logs" / "c.log").read_text()
    assert "[c patches] c patches: made" in told
    assert "[a " not in told


@pytest.mark.slow
def test_runs_behind_urls_are_worked_on_at_once_too(
    raw: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CELLPAIR_CACHE", str(tmp_path / "cache"))
    inputs = remote_path(f"{bucket}/raw")
    for path in sorted(p for p in raw.rglob("*") if p.is_file() and p.parts[-2] != "truth"):
        if path.relative_to(raw).parts[0] in ("a", "bad", "c"):
            (inputs / path.relative_to(raw).as_posix()).upload(path)
    text = CONFIG
    for key in ("xenium", "slide", "alignment"):
        text = re.sub(f'(?m)^{key} = "(.*)"$', rf'{key} = "{inputs.url}/\1"', text)
    text = text.replace("{out}", f"{bucket}/out")
    one = curated(raw, "here", 1, pipeline.direct)
    several = curated(raw, "there", 3, pipeline.direct, text)
    assert [run.config.id for run in several.runs] == ["a", "c"]
    assert list(several.failures) == list(one.failures) == ["bad"]
    assert several.dataset == one.dataset
    there = remote_path(f"{bucket}/out")
    for run in one.runs:
        for built in run.built.values():
            folder = built.folder.relative_to(raw / "here").as_posix()
            for path in files_under(built.folder):
                name = path.relative_to(built.folder).as_posix()
                if name != RECORD_FILE:
                    assert (there / folder / name).read_bytes() == path.read_bytes()
    # Nothing is held any more: all of it goes when room is needed.
    with closing(Cache.of_user().entry("other")) as other:
        other.make_room(Cache.of_user().limit_bytes, "other")
    assert [p.name for p in (tmp_path / "cache" / "copies").iterdir() if p.is_dir()] == ["other"]
