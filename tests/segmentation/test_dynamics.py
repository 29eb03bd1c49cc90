"""Flows to labels: exact cases, the check, and nothing that depends on where a block begins."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cellpose import dynamics as stock
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from segmentation.dynamics import (
    MAX_FLOW_ERROR,
    Labels,
    carry_px,
    flow_errors,
    label_flows,
    reach_px,
)
from segmentation.nuclei import find_nuclei, halo_px, max_travel_px
from segmentation.windows import Field

TRAVEL = 20
Flow = npt.NDArray[np.float32]
Disc = tuple[int, int, int]  # centre x, y and radius


def field_of(discs: list[Disc], size: int, turn: float = 0.0) -> tuple[Flow, npt.NDArray[np.bool_]]:
    """Unit flows to the centre of each disc, turned by an angle; where discs overlap, the later."""
    y, x = np.mgrid[:size, :size]
    flow, inside = np.zeros((2, size, size)), np.zeros((size, size), bool)
    for cx, cy, radius in discs:
        dy, dx = cy - y, cx - x
        disc = dy**2 + dx**2 <= radius**2
        away = np.maximum(np.hypot(dy, dx), 1)
        c, s = np.cos(turn), np.sin(turn)
        flow[:, disc] = np.stack([c * dy + s * dx, c * dx - s * dy])[:, disc] / away[disc]
        inside |= disc
    return flow.astype(np.float32), inside


def labelled(
    flow: Flow, inside: npt.NDArray[np.bool_], travel: int = TRAVEL, rim: int = 0
) -> Labels:
    return label_flows(flow, inside, max_travel_px=travel, rim_px=rim, device="cpu")


def same_partition(a: Labels, b: Labels) -> bool:
    """Whether two label images are the same but for their numbers."""
    if ((a > 0) != (b > 0)).any():
        return False
    pairs = np.unique(np.stack([a[a > 0], b[a > 0]]), axis=1)
    return len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


def test_a_disc_is_one_nucleus_and_two_that_touch_are_two() -> None:
    flow, inside = field_of([(30, 30, 9)], 64)
    labels = labelled(flow, inside)
    assert np.array_equal(labels > 0, inside)
    assert len(np.unique(labels)) == 2
    flow, inside = field_of([(24, 30, 9), (40, 31, 8)], 64)
    labels = labelled(flow, inside)
    assert np.array_equal(labels > 0, inside)
    assert labels[30, 24] != labels[31, 40]
    assert len(np.unique(labels)) == 3


def test_nothing_inside_is_nothing_found() -> None:
    flow, inside = field_of([], 40)
    assert not labelled(flow, inside).any()


def test_what_travels_too_far_belongs_to_no_nucleus() -> None:
    """A long bar that flows to its left end, where all of it would gather."""
    flow, inside = np.zeros((2, 32, 128), np.float32), np.zeros((32, 128), bool)
    inside[12:18, 10:110] = True
    flow[1, inside] = -1
    flow[1, :, :12] = 0
    labels = labelled(flow, inside, travel=30)
    # All stop in column 11, but those of column 10, who are too few.
    assert np.flatnonzero(labels.any(axis=0)).tolist() == list(range(11, 42))


def test_edges_of_the_picture_end_a_way() -> None:
    flow, inside = np.zeros((2, 24, 24), np.float32), np.ones((24, 24), bool)
    flow[0], flow[1] = -1, -1
    labels = labelled(flow, inside, travel=30)
    assert (labels == labels[0, 0]).all()
    assert labels[0, 0] > 0


def test_a_flow_that_turns_is_dropped_by_the_check() -> None:
    boxes, ids = np.array([[21, 21, 40, 40]]), np.array([1], np.int32)
    errors = []
    for degrees in (0, 20, 45, 90):
        flow, inside = field_of([(30, 30, 9)], 64, np.radians(degrees))
        errors.append(flow_errors(inside.astype(np.int32), boxes, ids, flow, "cpu")[0])
    # The mask's own flow runs to its middle: turned by a, the squared difference is 2 - 2 cos a.
    expected = [2 - 2 * np.cos(np.radians(a)) for a in (0, 20, 45, 90)]
    assert errors == pytest.approx(expected, abs=0.08)
    assert errors[1] < MAX_FLOW_ERROR < errors[2]


def some_discs(rng: np.random.Generator, n: int, size: int) -> list[Disc]:
    return [(*rng.integers(0, size, 2).tolist(), int(rng.integers(3, 14))) for _ in range(n)]


def noisy_field(seed: int, n: int, size: int) -> tuple[Flow, npt.NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    flow, inside = field_of(some_discs(rng, n, size), size)
    noise = ndimage.gaussian_filter(rng.standard_normal(flow.shape), (0, 2, 2)) * 2
    return (flow + noise).astype(np.float32) * inside, inside


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_cellpose_finds_the_same_nuclei(seed: int, n: int) -> None:
    """Its steps are off by up to half a pixel at the ends of an image: nearly all are alike."""
    flow, inside = noisy_field(seed, n, 160)
    boxes, ids = boxes_of(ours := labelled(flow, inside))
    errors = flow_errors(ours, boxes, ids, flow, "cpu")
    ours = np.where(np.isin(ours, ids[errors <= MAX_FLOW_ERROR]), ours, 0)
    # Cellpose builds sparse tensors; torch warns unless its checks of them are set, either way.
    torch.sparse.check_sparse_tensor_invariants.disable()  # type: ignore[no-untyped-call]  # torch's
    logging.getLogger("cellpose.dynamics").setLevel(logging.ERROR)
    logit = np.where(inside, 1.0, -1.0).astype(np.float32)
    theirs = stock.compute_masks(5 * flow, logit, max_size_fraction=1.0, device=torch.device("cpu"))
    n_theirs = len(np.unique(theirs)) - 1
    n_alike = 0
    for number in range(1, n_theirs + 1):
        mask = theirs == number
        best = np.bincount(ours[mask]).argmax()
        n_alike += best > 0 and (mask & (ours == best)).sum() / (mask | (ours == best)).sum() > 0.75
    assert n_alike >= 0.8 * n_theirs - 2
    assert abs(len(np.unique(ours)) - 1 - n_theirs) <= 0.1 * n_theirs + 2


def boxes_of(labels: Labels) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    found = [(i + 1, s) for i, s in enumerate(ndimage.find_objects(labels)) if s is not None]
    boxes = [(s[1].start, s[0].start, s[1].stop, s[0].stop) for _, s in found]
    return np.array(boxes, np.int64).reshape(-1, 4), np.array([i for i, _ in found], np.int32)


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 10_000), st.integers(5, 60))
def test_the_check_is_cellposes_for_each_nucleus_alone(seed: int, n: int) -> None:
    flow, inside = noisy_field(seed, n, 140)
    labels = labelled(flow, inside)
    boxes, ids = boxes_of(labels)
    ours = flow_errors(labels, boxes, ids, flow, "cpu")
    for error, box, number in zip(ours, boxes, ids, strict=True):
        x0, y0, x1, y1 = box
        alone = (labels[y0:y1, x0:x1] == number).astype(np.int32)
        theirs, _ = stock.flow_error(alone, 5.0 * flow[:, y0:y1, x0:x1], torch.device("cpu"))
        # Heat is float32 here, and 64 there; where it is level, as in the middle of what is
        # symmetric, its direction is that of the rounding, in either.
        assert error == pytest.approx(theirs[0], abs=0.02 + 4 / alone.sum())


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10_000), st.integers(20, 160), st.integers(0, 90), st.integers(0, 90))
def test_labels_depend_on_nothing_beyond_their_reach(seed: int, n: int, dx: int, dy: int) -> None:
    """A part of a field, cut off as far away as the halo says, gives what the whole gives."""
    travel = 12
    halo = reach_px(travel) + carry_px(travel)
    core = 40
    flow, inside = noisy_field(seed, n, 2 * halo + core + 90)
    whole = labelled(flow, inside, travel)
    side = 2 * halo + core
    cut = np.s_[dy : dy + side, dx : dx + side]
    part = labelled(flow[:, *cut], inside[cut], travel, rim=carry_px(travel))
    inner = np.s_[halo : halo + core, halo : halo + core]
    assert same_partition(part[inner], whole[cut][inner])


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 10_000), st.integers(20, 120), st.integers(2, 5))
def test_every_nucleus_is_owned_by_one_block(seed: int, n: int, n_blocks: int) -> None:
    mpp, side = 1.0, 110
    halo, size = halo_px(mpp), side * n_blocks
    flow, inside = noisy_field(seed, n * n_blocks, size)
    frame = ((halo, halo), (halo, halo))
    flow = np.stack([np.pad(part, frame) for part in flow])
    logit = np.pad(np.where(inside, 2.0, -2.0), frame, constant_values=-9.0).astype(np.float32)
    score = np.pad(np.random.default_rng(seed).random((size, size), np.float32), frame)

    def found(x0: int, y0: int, x1: int, y1: int) -> list[tuple[float, ...]]:
        cut = np.s_[y0 : y1 + 2 * halo, x0 : x1 + 2 * halo]
        field = Field(flow[:, *cut], logit[cut], score[cut])
        nuclei = find_nuclei(field, (x0 - halo, y0 - halo), (x0, y0, x1, y1), mpp, "cpu")
        columns = (nuclei.y_px, nuclei.x_px, nuclei.n_px, nuclei.eccentricity, nuclei.haematoxylin)
        masks = [mask.tobytes() for mask in nuclei.masks()]
        return list(zip(*(c.tolist() for c in columns), masks, strict=True))

    parts = [
        nucleus
        for x0 in range(0, size, side)
        for y0 in range(0, size, side)
        for nucleus in found(x0, y0, x0 + side, y0 + side)
    ]
    assert sorted(parts) == found(0, 0, size, size)


def test_a_nucleus_as_long_as_its_limit_allows_is_whole() -> None:
    """Pixels of its ends travel the whole way to the middle."""
    travel = max_travel_px(0.5)
    flow, inside = field_of([(100, 100, travel)], 200)
    labels = labelled(flow, inside, travel)
    assert np.array_equal(labels > 0, inside)
