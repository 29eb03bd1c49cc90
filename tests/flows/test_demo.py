"""The demo: what it prints and leaves, and that its oracle is scored as the trainer scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flows.cli import main
from flows.demo import FIGURES_FILE, Figures, own_ranks
from shards.check import validate
from shards.dataset import read_dataset, read_record


def test_ranks_count_what_scores_higher_and_share_ties() -> None:
    score = np.array([[3.0, 1.0, 2.0], [5.0, 5.0, 5.0], [9.0, 8.0, 8.0]])
    np.testing.assert_array_equal(own_ranks(score), [1.0, 2.0, 2.5])


def test_too_few_cells_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(tmp_path / "demo"), "--cells", "50"]) == 2
    assert "at least 600" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_goes_through_and_is_not_done_twice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert main(["demo", str(out), "--cells", "600"]) == 0
    told = capfd.readouterr().out
    assert "R@5 on D3, in batches of 64" in told
    assert told.rstrip().splitlines()[-1].startswith(f"report: {out}/curated/report/index.html")
    figures = read_record(out / FIGURES_FILE, Figures)
    assert set(figures.r_at_5) == {"model", "oracle", "ridge", "shuffled_pairs", "chance"}
    # 400 pairs are too few for the demo's figures, but nothing beats the oracle.
    for direction, oracle in figures.r_at_5["oracle"].items():
        assert oracle > 0.5
        for method in ("model", "ridge", "shuffled_pairs", "chance"):
            assert figures.r_at_5[method][direction] < oracle
    dataset, _ = read_dataset(out / "curated")
    assert dataset.donors == {"D1": "train", "D2": "train", "D3": "test"}
    assert validate(out / "curated") == []
    pages = {p.name for p in (out / "curated" / "report").glob("*.html")}
    assert pages == {"index.html", "D1.html", "D2.html", "D3.html"}
    made = {p: p.stat().st_mtime_ns for p in out.rglob("artifact.json")}
    checkpoints = {p: p.stat().st_mtime_ns for p in out.rglob("meta.json")}
    assert main(["demo", str(out), "--cells", "600"]) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("artifact.json")} == made
    assert {p: p.stat().st_mtime_ns for p in out.rglob("meta.json")} == checkpoints
    assert read_record(out / FIGURES_FILE, Figures) == figures
