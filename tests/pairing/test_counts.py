"""Counts: the same from any spans, batches and workers; gone on with; equal to a loop over rows."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairing.cells import read_counts
from pairing.counts import COUNTS_FILES, CountsQc, write_counts
from pairing.xenium import open_xenium
from pairing.xenium.id_index import IdIndex
from tests.pairing.handmade import CONTROLS, LURES, TEXTS, Bundle

Mask = npt.NDArray[np.bool_]


def write(
    folder: Path, bundle: Path, stays: Mask, map_tasks: Any = map, kept: Path | None = None
) -> tuple[dict[str, bytes], CountsQc, npt.NDArray[np.int64]]:
    """The bytes of every file that is written, what is told of it, and the counts."""
    out, kept = folder / "out", kept or folder / "kept"
    out.mkdir(parents=True)
    kept.mkdir(exist_ok=True)
    with open_xenium(bundle) as run:
        n_counts, qc = write_counts(out, kept, run, 20, stays, map_tasks)
        counts = read_counts(out, len(run.genes())).toarray()
    np.testing.assert_array_equal(counts.sum(axis=1), n_counts)
    return {name: (out / name).read_bytes() for name in COUNTS_FILES}, qc, counts


def random_bundle(folder: Path, text: str, n: int, row_group: int, seed: int) -> Bundle:
    rng = np.random.default_rng(seed)
    bundle = Bundle(folder)
    bundle.text, bundle.row_group = text, row_group
    names = [*LURES, *CONTROLS]
    feature = rng.integers(0, len(names), n)
    ids = np.array([*bundle.cells["cell_id"], "UNASSIGNED"], object)
    cell = rng.integers(0, 4, n)
    cell[0] = 3  # so that something is there when every cell is left out
    bundle.transcripts = pd.DataFrame(
        {
            "cell_id": ids[cell],
            "feature_name": np.array(names, object)[feature],
            "x_location": np.float32(1),
            "y_location": np.float32(1),
            "qv": rng.choice(np.array([12, 20, 40], np.float32), n),
            "is_gene": feature < len(LURES),
        }
    )
    bundle.counted = bundle.transcripts.copy()
    return bundle


def backwards(fn: Callable[[Any], str], items: Any) -> Iterator[str]:
    """The last first, each as a task on another machine would have it."""
    for item in reversed(list(items)):
        yield pickle.loads(pickle.dumps(fn))(pickle.loads(pickle.dumps(item)))


@settings(max_examples=15, deadline=None)
@given(
    text=st.sampled_from(list(TEXTS)),
    n=st.integers(1, 120),
    row_group=st.integers(1, 40),
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 50), st.integers(1, 4), st.integers(1, 9)),
    stays=st.tuples(*[st.booleans()] * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_spans_batches_and_windows_change_nothing(
    text: str, n: int, row_group: int, sizes: tuple[int, int, int, int], stays: Any, seed: int
) -> None:
    kept_cells = np.array(stays)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        bundle = random_bundle(folder / "outs", text, n, row_group, seed)
        path = bundle.write()
        whole = write(folder / "whole", path, kept_cells)
        span_rows, batch_rows, window_cells, entries = sizes
        patch.setattr("pairing.xenium.transcripts.SPAN_ROWS", span_rows)
        patch.setattr("pairing.xenium.transcripts.BATCH_ROWS", batch_rows)
        patch.setattr("pairing.tally.WINDOW_CELLS", window_cells)
        patch.setattr("pairing.merge.WINDOW_CELLS", window_cells)
        patch.setattr("pairing.merge._ENTRIES", entries)
        parts = write(folder / "parts", path, kept_cells, backwards)
    assert parts[:2] == whole[:2]
    made = bundle.transcripts
    row = {cell: i for i, cell in enumerate(bundle.cells["cell_id"])}
    expected = np.zeros((3, len(LURES)), np.int64)
    good = made[made["qv"] >= 20]
    for cell, feature in zip(good["cell_id"], good["feature_name"], strict=True):
        if cell in row and feature in LURES:
            expected[row[cell], LURES.index(feature)] += 1
    np.testing.assert_array_equal(parts[2], expected[kept_cells])
    left = {cell for cell, i in row.items() if not kept_cells[i]}
    qc = whole[1]
    assert qc.n_transcripts == (~made["cell_id"].isin(left)).sum()
    assert qc.n_unassigned == (good["cell_id"] == "UNASSIGNED").sum()
    assert qc.n_counts == expected[kept_cells].sum() == qc.by_category.get("gene", 0)
    assert qc.matrix_mismatches == 0


def test_what_a_stopped_process_left_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pairing.xenium.transcripts.SPAN_ROWS", 20)
    monkeypatch.setattr("pairing.tally.WINDOW_CELLS", 1)
    monkeypatch.setattr("pairing.merge.WINDOW_CELLS", 1)
    monkeypatch.setattr("pairing.merge._ENTRIES", 1)
    path = random_bundle(tmp_path / "outs", "text", 100, 10, 0).write()
    everyone = np.ones(3, bool)
    spans = [f"span-00000-{first:05d}" for first in (0, 2, 4, 6, 8)]
    blocks = [f"cells-{first:09d}" for first in (0, 1, 2)]
    kept = tmp_path / "kept"
    made: list[str] = []

    def stopping_after(n: int) -> Any:
        def map_tasks(fn: Callable[[Any], str], items: Any) -> Iterator[str]:
            for item in items:
                if len(made) == n:
                    raise InterruptedError
                made.append(item.name)
                yield fn(item)

        return map_tasks

    for n_more, left in ((2, spans), (5, [*spans[2:], *blocks])):
        made.clear()
        with pytest.raises(InterruptedError):
            write(tmp_path / f"{n_more}", path, everyone, stopping_after(n_more), kept)
        assert made == left[:n_more]
    made.clear()
    done = write(tmp_path / "last", path, everyone, stopping_after(9), kept)
    assert made == blocks[2:]
    assert done[:2] == write(tmp_path / "quiet", path, everyone)[:2]


def test_a_csv_is_one_span(tmp_path: Path) -> None:
    bundle = random_bundle(tmp_path / "outs", "text", 50, 10, 1)
    as_parquet = write(tmp_path / "parquet", bundle.write(), np.ones(3, bool))
    copy = random_bundle(tmp_path / "csv" / "outs", "text", 50, 10, 1)
    copy.as_csv = True
    path = copy.write()
    with open_xenium(path) as run:
        assert len(run.transcripts.spans()) == 1
    as_csv = write(tmp_path / "of csv", path, np.ones(3, bool))
    assert as_csv[:2] == as_parquet[:2]


def test_positions_are_not_asked_for_where_the_instrument_tells_the_cell(tmp_path: Path) -> None:
    bundle = random_bundle(tmp_path / "outs", "text", 30, 10, 2)
    bundle.transcripts["x_location"] = np.float32(np.nan)
    _, qc, _ = write(tmp_path / "counted", bundle.write(), np.ones(3, bool))
    assert qc.n_transcripts == 30


@given(
    st.lists(
        st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=9), unique=True
    )
)
def test_identifiers_are_found_by_their_whole_text(ids: list[str]) -> None:
    known = ids[: len(ids) // 2]
    found = IdIndex.of(known).find(pa.array(ids, pa.string()))
    assert found.tolist() == [known.index(i) if i in known else -1 for i in ids]
