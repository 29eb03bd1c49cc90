"""`cellpair curate` on the real bundle and the real SpatialData store: what is known of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from flows.cli import main
from shards.check import validate
from shards.dataset import read_dataset, read_panels

CONFIG = """
name = "real"
out = "curated"
[filters]
min_counts = {min_counts}
[split]
assign = {{ M1 = "train" }}
[[runs]]
id = "ileum"
xenium = "{xenium}"
image = "morphology"
donor = "M1"
species = "mouse"
"""


def curate(folder: Path, xenium: Path, min_counts: int) -> Path:
    config = folder / "curate.toml"
    config.write_text(CONFIG.format(xenium=xenium, min_counts=min_counts))
    assert main(["curate", str(config), "--workers", "1"]) == 0
    return folder / "curated"


def read_samples(out: Path) -> list[dict[str, Any]]:
    dataset, root = read_dataset(out)
    urls = [str(root / f"{name}.tar") for name in dataset.shards["train"]]
    return list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))


@pytest.mark.parametrize(
    ("min_counts", "kept", "entries", "total"), [(0, 36, 29, 464), (10, 12, None, None)]
)
def test_mouse_ileum(
    shared_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    min_counts: int,
    kept: int,
    entries: int | None,
    total: int | None,
) -> None:
    out = curate(tmp_path, shared_data / "xenium" / "mouse_ileum_tiny", min_counts)
    assert validate(out) == []
    dataset, root = read_dataset(out)
    assert dataset.totals.seen == 36
    assert dataset.totals.kept == kept
    assert dataset.totals.dropped == {
        "flag_damaged_tile": 0,
        "low_counts": 36 - kept,
        "outside_slide": 0,
    }
    assert f"36 cells seen, {kept} kept" in capsys.readouterr().out
    samples = read_samples(out)
    assert len(samples) == kept
    if entries is not None:
        assert sum(s["counts.npy"].shape[1] for s in samples) == entries
        assert sum(int(s["counts.npy"][1].sum()) for s in samples) == total
        assert len({g for s in samples for g in s["counts.npy"][0].tolist()}) == 4
    (panel,) = read_panels(dataset, root).values()
    assert (panel.species, len(panel.genes)) == ("mouse", 5006)
    for sample in samples:  # DAPI: grey in all three channels
        np.testing.assert_array_equal(sample["jpg"][..., 0], sample["jpg"][..., 2])
        assert sample["jpg"].shape == (224, 224, 3)
    assert max(int(s["jpg"].max()) for s in samples) > 150
    assert main(["check", str(out)]) == 0
    assert main(["info", str(out), "--json"]) == 0
    facts = capsys.readouterr().out
    assert json.loads(facts[facts.index("{") :])["samples"]["train"] == kept


def test_nucleus_expansion_store(shared_data: Path, tmp_path: Path) -> None:
    store = shared_data / "xenium" / "mouse_ileum_tiny_nucleus_expansion.zarr"
    out = curate(tmp_path, store, 0)
    assert validate(out) == []
    dataset, _ = read_dataset(out)
    assert (dataset.totals.seen, dataset.totals.kept) == (23, 23)
    assert sum(int(s["counts.npy"][1].sum()) for s in read_samples(out)) == 433
