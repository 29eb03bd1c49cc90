"""Shards of a run: who writes them, in what order and after which stop changes no byte."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.cluster import BlockMap, Runtime
from pairing.cells import CELLS_FILE
from pairing.pack import Filters, PackConfig, write_shard_set
from pairing.pack_plan import plan_shards
from shards.artifact import sha256_of
from shards.errors import BadInput
from shards.schema import INDEX_SCHEMA, PatchSpec
from shards.write import MANIFEST_FILE
from tests.golden import inputs

SPEC = PatchSpec(image="he", fov_um=32, size_px=64, center="nucleus", jpeg_quality=95)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cells and patches of 100 cells, made by hand, and a file of their donors."""
    folder = tmp_path_factory.mktemp("run")
    inputs.write_cells_artifact(folder / "cells")
    inputs.write_patches_artifact(folder / "patches")
    inputs.write_donors(folder / "donors.geojson")
    return folder


def written(run: Path, out: Path, map_tasks: Any = map, **changed: Any) -> dict[str, Any]:
    kept = out.with_name(f"{out.name}-kept")
    out.mkdir(parents=True)
    kept.mkdir(exist_ok=True)
    config = PackConfig(
        run="r1", donor=None, source_id=None, tissue="breast", filters=Filters(min_counts=0),
        **{"max_samples": 12, **changed},
    )  # fmt: skip
    made = write_shard_set(
        out, kept, config, SPEC, run / "cells", run / "patches",
        inputs.HE_PX_FROM_XENIUM_UM, inputs.HE_MPP, map_tasks, donors=run / "donors.geojson",
    )  # fmt: skip
    told = [p for p in out.iterdir() if p.suffix in (".tar", ".parquet")]
    assert made.sha256s == {p.name: sha256_of(p) for p in told}
    return made.summary


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_can_be_written_elsewhere_and_in_any_order(run: Path, tmp_path: Path) -> None:
    def elsewhere(write: Any, tasks: Iterable[Any]) -> list[str]:
        posted = [pickle.dumps((write, task)) for task in tasks]
        return [write(task) for write, task in map(pickle.loads, posted[::-1])]

    figures = written(run, tmp_path / "here")
    assert written(run, tmp_path / "elsewhere", elsewhere) == figures
    assert len(contents(tmp_path / "here")) > 2 * 5
    assert contents(tmp_path / "here") == contents(tmp_path / "elsewhere")


@pytest.mark.slow  # workers take seconds to start
@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    run: Path, tmp_path: Path, workers: int
) -> None:
    figures = written(run, tmp_path / "one")
    with BlockMap(Runtime(workers=workers, device="cpu")) as blocks:
        assert written(run, tmp_path / "workers", blocks) == figures
    assert contents(tmp_path / "workers") == contents(tmp_path / "one")


def test_stopped_packing_goes_on_with_what_is_left(run: Path, tmp_path: Path) -> None:
    def stopped(write: Any, tasks: Iterable[Any]) -> Iterator[str]:
        for _, task in zip(range(3), tasks, strict=False):
            yield write(task)
        raise KeyboardInterrupt

    went_on: list[str] = []

    def watched(write: Any, tasks: Iterable[Any]) -> list[str]:
        went_on.extend(write(task) for task in tasks)
        return went_on

    written(run, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        written(run, tmp_path / "parts", stopped)
    assert contents(tmp_path / "parts") == {}
    (tmp_path / "parts").rmdir()
    # A shard without its record may be cut short.
    first = min((tmp_path / "parts-kept").glob("*.json"))
    first.unlink()
    first.with_suffix(".tar").write_bytes(b"short")
    written(run, tmp_path / "parts", watched)
    n_shards = len(json.loads((tmp_path / "whole" / MANIFEST_FILE).read_text())["shards"])
    assert first.stem in went_on
    assert len(went_on) == n_shards - 2
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_shard_ends_before_it_holds_too_many_bytes(run: Path, tmp_path: Path) -> None:
    written(run, tmp_path / "out", max_bytes=20_000, max_samples=1000)
    tars = sorted((tmp_path / "out").glob("*.tar"))
    donors = {tar.name[:-11] for tar in tars}
    assert len(tars) > 2 * len(donors)
    for tar in tars:
        with tarfile.open(tar) as members:
            n_bytes = sum(512 + -(-m.size // 512) * 512 for m in members)
        assert n_bytes <= 20_000
        assert n_bytes > 10_000 or tar == max(t for t in tars if t.name[:-11] == tar.name[:-11])


def test_members_and_rows_are_of_the_same_cell(run: Path, tmp_path: Path) -> None:
    written(run, tmp_path / "out")
    cells = pq.read_table(run / "cells" / CELLS_FILE).to_pandas().set_index("cell_id")
    seen = 0
    for table_path in (tmp_path / "out").glob("*.parquet"):
        table = pq.read_table(table_path)
        assert table.schema.equals(INDEX_SCHEMA)
        tar = table_path.with_suffix(".tar").read_bytes()
        for row in table.to_pylist():
            members = {
                name: tar[row[f"{name}_offset"] :][: row[f"{name}_size"]]
                for name in ("jpg", "counts", "neighbors")
            }
            counts = np.load(io.BytesIO(members["counts"]))
            assert counts[1].sum() == row["n_counts"] == cells.loc[row["cell_id"], "n_counts"]
            theirs = np.load(io.BytesIO(members["neighbors"]))
            for ordinal, near in enumerate(row["neighbors"]):
                n_counts = cells.loc[near["cell_id"], "n_counts"]
                assert theirs[2][theirs[0] == ordinal].sum() == n_counts
            seen += 1
    assert seen > 80


@pytest.mark.parametrize(("ids", "match"), [("a.b", "names members of a tar"), (None, "once")])
def test_cell_ids_that_make_no_keys_are_refused_before_anything_is_written(
    run: Path, tmp_path: Path, ids: str | None, match: str
) -> None:
    for name in ("cells", "patches"):
        (tmp_path / name).mkdir()
        for path in (run / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    (tmp_path / "donors.geojson").write_bytes((run / "donors.geojson").read_bytes())
    table = pq.read_table(run / "cells" / CELLS_FILE)
    names = table["cell_id"].to_pylist()
    names[6] = ids or names[5]
    table = table.set_column(table.schema.get_field_index("cell_id"), "cell_id", pa.array(names))
    pq.write_table(table, tmp_path / "cells" / CELLS_FILE)
    with pytest.raises(BadInput, match=match):
        written(tmp_path, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "out-kept") == {}


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 50)), min_size=1, max_size=60),
    st.integers(1, 12),
    st.integers(1, 200),
)
def test_shards_are_as_long_as_they_may_be(
    samples: list[tuple[int, int]], max_samples: int, max_bytes: int
) -> None:
    samples.sort(key=lambda s: s[0])
    donor, n_bytes = np.array(samples, np.int64).reshape(-1, 2).T
    cuts = plan_shards(
        donor.astype(np.int32), n_bytes, max_samples=max_samples, max_bytes=max_bytes
    )
    assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(len(samples)))
    for cut, after in zip(cuts, [*cuts[1:], None], strict=True):
        assert set(donor[cut.start : cut.stop]) == {cut.donor}
        n, size = cut.stop - cut.start, n_bytes[cut.start : cut.stop].sum()
        assert n == 1 or (n <= max_samples and size <= max_bytes)
        if after is not None and after.donor == cut.donor:
            assert after.number == cut.number + 1
            assert n == max_samples or size + n_bytes[cut.stop] > max_bytes
        elif after is not None:
            assert after.number == 0
