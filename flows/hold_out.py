"""`split.hold_out`: named lists of public samples, and whose donors go to test for them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flows.split import SplitSection

# Samples that public benchmarks are scored on, by the ids of their collection: a model that is
# scored there must have seen nothing of their donors.
LISTS: Mapping[str, tuple[str, ...]] = {
    # The Xenium samples of HEST-Benchmark (HEST-1k, Jaume et al., NeurIPS 2024).
    "hest-bench": (
        *("TENX95", "TENX99", "NCBI783", "NCBI785", "TENX116", "TENX126", "TENX140", "TENX115"),
        *("TENX117", "TENX111", "TENX147", "TENX148", "TENX149", "TENX118", "TENX141"),
    ),
}


def source_ids_of(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For each name of `split.hold_out` the source_ids that it stands for: itself, if no list."""
    return {name: LISTS.get(name, (name,)) for name in names}


def held_out_source_ids(split: SplitSection) -> frozenset[str]:
    """All that `split.hold_out` names."""
    return frozenset(s for ids in source_ids_of(split.hold_out).values() for s in ids)


def held_out_donors(
    samples: Iterable[tuple[str | None, Sequence[str]]], split: SplitSection
) -> dict[str, tuple[str, ...]]:
    """Canonical donors who go to test, and the source_ids because of which.

    `samples` are the source_id and all donors of every run. Withdrawn donors are left out.
    """
    wanted = held_out_source_ids(split)
    found: dict[str, set[str]] = {}
    for source_id, donors in samples:
        if source_id is None or source_id not in wanted:
            continue
        for donor in donors:
            if not split.is_withdrawn(donor):
                found.setdefault(split.canonical(donor), set()).add(source_id)
    return {donor: tuple(sorted(found[donor])) for donor in sorted(found)}


def contradictions(held_out: Mapping[str, tuple[str, ...]], split: SplitSection) -> Iterator[str]:
    """Donors that `assign` sends elsewhere than to test, in words."""
    for name, to in split.assign.items():
        source_ids = held_out.get(split.canonical(name))
        if source_ids and to != "test":
            yield (
                f"assign sends {name!r} to {to!r}, but split.hold_out holds out "
                f"{' and '.join(source_ids)} of that donor"
            )


def unknown_names(
    names: Iterable[str], source_ids: Iterable[str]
) -> tuple[dict[str, str], list[str]]:
    """Names of `split.hold_out` that are neither a list nor the source_id of a run.

    Those that look like one, by the name that they look like; and the others, which may be of runs
    that are yet to come.
    """
    known = {name.casefold(): name for name in (*source_ids, *LISTS)}
    misspelt, others = {}, []
    for name in names:
        if name in known.values():
            continue
        # Ids of one collection differ in digits: there only another case, or spaces, are a slip.
        digits = "".join(filter(str.isdigit, name))
        near = difflib.get_close_matches(name.strip().casefold(), known, n=3, cutoff=0.8)
        alike = [n for n in near if "".join(filter(str.isdigit, n)) == digits]
        if alike:
            misspelt[name] = known[alike[0]]
        else:
            others.append(name)
    return misspelt, others
