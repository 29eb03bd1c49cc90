"""Donors as the pages list them: their cells, their pairs, their split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shards.schema import Manifest, Split


@dataclass(frozen=True, slots=True)
class DonorRow:
    """One donor: its runs, its cells and its pairs.

    `split` is None where no dataset was published, or where the donor has no pair in it.
    """

    donor: str
    split: Split | None
    runs: list[str]
    n_cells: int
    n_pairs: int


def donor_rows(
    manifest: Manifest, n_cells_of_donor: Mapping[str, int], splits: Mapping[str, Split]
) -> list[DonorRow]:
    """The donors of one run, those without a pair too; `n_cells_of_donor` names all of them."""
    return [
        DonorRow(
            donor=donor,
            split=splits.get(donor),
            runs=[manifest.run],
            n_cells=n_cells,
            n_pairs=sum(s.n_samples for s in manifest.shards if s.donor == donor),
        )
        for donor, n_cells in sorted(n_cells_of_donor.items())
    ]


def over_all_runs(rows: Sequence[DonorRow]) -> list[DonorRow]:
    """One row a donor, of the rows of several runs."""
    return [
        DonorRow(
            donor=donor,
            split=next(row.split for row in rows if row.donor == donor),
            runs=[run for row in rows if row.donor == donor for run in row.runs],
            n_cells=sum(row.n_cells for row in rows if row.donor == donor),
            n_pairs=sum(row.n_pairs for row in rows if row.donor == donor),
        )
        for donor in sorted({row.donor for row in rows})
    ]
