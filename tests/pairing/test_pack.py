"""What is left out of the shards: every cell kept, or counted once, under the first reason."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pairing.flags import FLAGS, QUALITY_COLUMNS
from pairing.pack import Filters, select

NOT_ASSESSED = float("nan")


def frames(
    cells: list[tuple[str | None, int, float]], cut: dict[int, tuple[bool, bool]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells as (donor, counts, error in µm); patches as row -> (edge, damaged_tile)."""
    patches = pd.DataFrame(cut.values(), index=list(cut), columns=["edge", "damaged_tile"])
    others = {flag: False for flag in FLAGS if flag not in patches}
    patches = patches.assign(**others, **dict.fromkeys(QUALITY_COLUMNS, 0.5))
    table = pd.DataFrame(cells, columns=["donor", "n_counts", "registration_error_um"])
    return table.astype({"donor": object}), patches


def noted(**more: int) -> dict[str, int]:
    """What is noted of a run without flags in which all could be told."""
    flags = {f"flag_{flag}": 0 for flag in FLAGS}
    return flags | {f"{name}_not_assessed": 0 for name in QUALITY_COLUMNS} | more


def test_a_cell_counts_under_the_first_reason_that_it_fails() -> None:
    cells, patches = frames(
        [
            (None, 0, 9.0), ("A", 0, 9.0), ("A", 0, 1.0), ("A", 9, NOT_ASSESSED), ("A", 10, 5.0),
            ("B", 99, 0.1), ("B", 99, 9.0), ("B", 99, 5.0), ("B", 9, 5.1), ("B", 99, NOT_ASSESSED),
        ],
        {
            2: (True, True), 3: (True, True), 4: (True, True), 5: (False, True),
            7: (False, False), 8: (True, True), 9: (False, False),
        },
    )  # fmt: skip
    kept, totals = select(
        cells,
        patches,
        Filters(drop_flags=("edge", "damaged_tile")),
        registered=True,
        segmented=False,
    )
    assert kept.tolist() == [7, 9]
    assert totals.model_dump() == {
        "seen": 10,
        "kept": 2,
        "dropped": {
            "no_donor": 1,
            "outside_slide": 2,
            "registration_error": 1,
            "low_counts": 2,
            "flag_edge": 1,
            "flag_damaged_tile": 1,
        },
        "noted": noted(registration_error_not_assessed=1),
    }


def test_damaged_tiles_are_dropped_unless_told_otherwise() -> None:
    cells, patches = frames([("A", 10, 9.0), ("A", 10, 9.0)], {0: (False, True), 1: (True, False)})
    kept, totals = select(cells, patches, Filters(), registered=False, segmented=False)
    assert kept.tolist() == [1]
    assert totals.dropped == {"outside_slide": 0, "low_counts": 0, "flag_damaged_tile": 1}
    assert totals.noted == noted(flag_edge=1)
    kept, totals = select(cells, patches, Filters(drop_flags=()), registered=False, segmented=False)
    assert kept.tolist() == [0, 1]
    assert totals.dropped == {"outside_slide": 0, "low_counts": 0}
    assert totals.noted == noted(flag_edge=1, flag_damaged_tile=1)


def test_a_match_is_asked_for_only_where_nuclei_were_looked_for() -> None:
    cells, patches = frames([("A", 10, 0.0)] * 4, {i: (False, False) for i in range(4)})
    cells["he_iou"] = [0.09, 0.5, 0.51, float("nan")]
    for filters, kept_rows in ((Filters(), 4), (Filters(min_match_iou=0.5), 2)):
        kept, totals = select(cells, patches, filters, registered=True, segmented=True)
        assert len(kept) == kept_rows
        assert totals.dropped.get("low_match", 0) == 4 - kept_rows
        assert "match_not_assessed" not in totals.noted
    kept, totals = select(
        cells, patches, Filters(min_match_iou=0.5), registered=True, segmented=False
    )
    assert len(kept) == totals.noted["match_not_assessed"] == 4
    assert "low_match" not in totals.dropped


def test_scores_that_no_kept_patch_has_are_noted() -> None:
    cells, patches = frames(
        [("A", 10, 0.0)] * 3, {0: (False, False), 1: (False, False), 2: (False, True)}
    )
    patches["sharpness"] = [0.9, NOT_ASSESSED, NOT_ASSESSED]
    _, totals = select(cells, patches, Filters(), registered=False, segmented=False)
    assert totals.kept == 2
    assert totals.noted == noted(sharpness_not_assessed=1)


def test_a_flag_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValidationError):
        Filters.model_validate({"drop_flags": ["crooked"]})


rows = st.lists(
    st.tuples(
        st.sampled_from([None, "A", "B"]),
        st.integers(0, 20),
        st.sampled_from([0.0, 5.0, 5.5, NOT_ASSESSED]),
        st.sampled_from([None, (False, False), (True, False), (False, True), (True, True)]),
    ),
    max_size=30,
)
flags = st.lists(st.sampled_from(["edge", "damaged_tile"]), unique=True).map(tuple)


@given(rows, flags)
def test_the_reasons_add_up_and_every_kept_cell_passes_them_all(
    rows: list[tuple[str | None, int, float, tuple[bool, bool] | None]],
    drop_flags: tuple[Any, ...],
) -> None:
    cells, patches = frames(
        [(donor, n, error) for donor, n, error, _ in rows],
        {i: cut for i, (_, _, _, cut) in enumerate(rows) if cut is not None},
    )
    kept, totals = select(
        cells, patches, Filters(drop_flags=drop_flags), registered=True, segmented=False
    )

    def passes(donor: str | None, n: int, error: float, cut: tuple[bool, bool] | None) -> bool:
        if donor is None or n < 10 or error > 5 or cut is None:
            return False
        return not any(cut[("edge", "damaged_tile").index(flag)] for flag in drop_flags)

    assert kept.tolist() == [i for i, row in enumerate(rows) if passes(*row)]
    assert totals.noted["registration_error_not_assessed"] == sum(
        math.isnan(rows[i][2]) for i in kept
    )
    assert totals.seen == len(rows) == totals.kept + sum(totals.dropped.values())
