"""Several runs worked on at once: the dataset and the failures of one after the other."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.trust.harness import made_in
from flows import pipeline
from flows.built import Built
from flows.cluster import BlockMap, Runtime
from flows.config import read_curate_config
from flows.log import logged_to
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


def curated(raw: Path, name: str, runs_at_once: int, call: pipeline.Call) -> pipeline.Curated:
    path = raw / f"{name}.toml"
    path.write_text(CONFIG.format(out=name))
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
