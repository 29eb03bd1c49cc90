"""Random small bundles in random layouts: what is read is what a loop over the rows makes of it."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import given, settings
from hypothesis import strategies as st

from pairing.xenium import open_xenium
from pairing.xenium.tables import cell_id_text
from tests.pairing.handmade import CONTROLS, LURES, SQUARE, TEXTS, Bundle, count_by_cell, rings

FEATURES = [*LURES, *CONTROLS]
OPTIONAL = ["fov_name", "nucleus_distance", "overlaps_nucleus", "codeword_category", "is_gene"]


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """How the bundle of `made` is written."""
    return {
        "text": draw(st.sampled_from(list(TEXTS))),
        "as_csv": draw(st.booleans()),
        "as_mex": draw(st.booleans()),
        "row_group": draw(st.integers(1, 30)),
        "matrix": draw(st.booleans()),
        "panel": draw(st.booleans()),
        "absent": draw(st.sets(st.sampled_from(OPTIONAL))),
        "nucleus_count": draw(st.booleans()),
        "label_id": draw(st.booleans()),
        "proteins": draw(st.sampled_from([(), ("NANOG", "PCNA")])),
    }


def made(folder: Path, layout: dict[str, Any], rng: np.random.Generator) -> Bundle:
    bundle = Bundle(folder)
    for name in ("text", "as_csv", "as_mex", "row_group", "proteins"):
        setattr(bundle, name, layout[name])
    n_cells, n = int(rng.integers(1, 7)), int(rng.integers(1, 60))
    prefix = np.sort(rng.choice(2**32, n_cells, replace=False)).astype(np.uint32)
    ids = cell_id_text(np.stack([prefix, np.ones(n_cells, np.uint32)], axis=1))
    n_nuclei = rng.integers(0, 4, n_cells)
    bundle.cells = pd.DataFrame(
        {
            "cell_id": ids,
            "x_centroid": rng.uniform(0, 100, n_cells),
            "y_centroid": rng.uniform(0, 100, n_cells),
            "cell_area": rng.uniform(10, 300, n_cells),
            "nucleus_area": np.where(n_nuclei > 0, 16.0 * n_nuclei, np.nan),
            "nucleus_count": n_nuclei,
        }
    )
    feature = rng.integers(0, len(FEATURES), n)
    categories = ["custom_gene"] * len(LURES) + [
        "genomic_control_probe" if category == "genomic_control" else category
        for category, _ in CONTROLS.values()
    ]
    bundle.transcripts = pd.DataFrame(
        {
            "cell_id": np.append(ids, "UNASSIGNED")[rng.integers(0, n_cells + 1, n)],
            "overlaps_nucleus": rng.integers(0, 2, n).astype(np.uint8),
            "feature_name": np.array(FEATURES, object)[feature],
            "x_location": rng.uniform(0, 100, n).astype(np.float32),
            "y_location": rng.uniform(0, 100, n).astype(np.float32),
            "qv": rng.choice([3.0, 19.75, 20.0, 40.0], n).astype(np.float32),
            "fov_name": "B2",
            "nucleus_distance": rng.uniform(0, 9, n).astype(np.float32),
            "codeword_category": np.array(categories, object)[feature],
            "is_gene": feature < len(LURES),
        }
    )
    bundle.counted = bundle.transcripts.copy()
    bundle.transcripts = bundle.transcripts.drop(columns=sorted(layout["absent"]))
    owner = np.repeat(np.arange(n_cells), n_nuclei)
    corners = rng.uniform(0, 90, (len(owner), 2)).astype(np.float32)
    described = [
        (i + 1, ids[o], SQUARE + c) for i, (o, c) in enumerate(zip(owner, corners, strict=True))
    ]
    bundle.nuclei = rings(*described, (len(owner) + 1, "UNASSIGNED", SQUARE))
    if not layout["matrix"]:
        bundle.features = None
    if layout["panel"]:
        bundle.panel = dict.fromkeys(LURES, "gene") | dict.fromkeys(CONTROLS, "control")
    if not layout["nucleus_count"]:
        del bundle.cells["nucleus_count"]
    if not layout["label_id"]:
        del bundle.nuclei["label_id"]
    return bundle


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 70))
def test_a_random_bundle(layout: dict[str, Any], seed: int, rows: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bundle = made(Path(folder) / "outs", layout, np.random.default_rng(seed))
        with open_xenium(bundle.write()) as run:
            counts = count_by_cell(run, 20)
            symbols = [gene.symbol for gene in run.genes()]
            cells, nuclei = run.read_cells(), run.read_nuclei()
            batches = list(run.iter_transcripts(rows))
    made_of = bundle.counted.to_dict("records")
    ids = bundle.cells["cell_id"].tolist()
    expected: Counter[tuple[int, str]] = Counter()
    categories: Counter[str] = Counter()
    for t in made_of:
        if t["qv"] >= 20 and t["cell_id"] in ids:
            name = t["feature_name"]
            categories["gene" if name in LURES else CONTROLS[name][0]] += 1
            if name in LURES:
                expected[ids.index(t["cell_id"]), name] += 1
    cell, gene = counts.matrix.nonzero()
    found = zip(cell.tolist(), (symbols[g] for g in gene), strict=True)
    assert dict(zip(found, counts.matrix.data.tolist(), strict=True)) == expected
    known = layout["matrix"] or layout["panel"]
    assert symbols == (LURES if known else sorted({t["feature_name"] for t in made_of} & {*LURES}))
    qc = counts.qc
    assert qc.matrix_mismatches == (0 if layout["matrix"] else None)
    assert (qc.n_transcripts, qc.by_category) == (len(made_of), dict(sorted(categories.items())))
    assert qc.n_low_quality == sum(t["qv"] < 20 for t in made_of)
    assert qc.n_unassigned == sum(t["qv"] >= 20 and t["cell_id"] not in ids for t in made_of)

    assert max(len(batch.qv) for batch in batches) <= rows
    x_um = np.concatenate([batch.x_um for batch in batches])
    np.testing.assert_array_equal(x_um, bundle.counted["x_location"])
    assert cells["cell_id"].tolist() == bundle.cell_ids
    np.testing.assert_array_equal(cells["x_um"], bundle.cells["x_centroid"])
    of_ring = bundle.nuclei["cell_id"].to_numpy()[:: len(SQUARE)].tolist()
    expected_owner = [ids.index(c) if c in ids else -1 for c in of_ring]
    assert nuclei["cell_index"].tolist() == expected_owner
    np.testing.assert_array_equal(
        cells["n_nuclei"], np.bincount(expected_owner[:-1], minlength=len(ids))
    )
    np.testing.assert_allclose(nuclei["area_um2"], 16, rtol=1e-4)
