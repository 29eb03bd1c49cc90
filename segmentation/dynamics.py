"""Flows to labels, the same in any block: whole-number steps, a limit to travel, a local check.

The method is Cellpose's (Stringer et al., Nat Methods 2021;18:100, and its 4.2 release): pixels
follow the flow, those that end together are one nucleus, and a nucleus whose own flow differs from
the network's is dropped. What makes Cellpose's result depend on the size of the image is replaced:
positions are whole numbers, ties are broken by place, the check of a nucleus looks at it alone, and
no pixel travels further than a stated way. So the labels at a place depend on nothing further
away than `reach_px`, on any device.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

Flow = npt.NDArray[np.float32]  # (2, Y, X): y, x; px a step
Labels = npt.NDArray[np.int32]

# Cellpose's defaults.
N_STEPS: Final = 200
MAX_FLOW_ERROR: Final = 0.4
MIN_LOGIT: Final = 0.0
_MIN_ENDS_OF_SEED, _MIN_ENDS_OF_BIN = 11, 3
_SEED_RADIUS, _PEAK_RADIUS = 5, 2

# Positions and steps are whole numbers of 1/1024 px, weights between pixels of 1/256, so that every
# device and every block computes the same. The two parts of a step, made positive, share one number
# of 64 bits: two weights of 8 bits more leave both below 2 ** 28.
_SUB_BITS, _WEIGHT_BITS, _LANE_BITS = 10, 8, 32
_ONE = 1 << _SUB_BITS
_LANE_MASK = (1 << _LANE_BITS) - 1
_HALF_OF_BOTH = ((1 << _LANE_BITS) + 1) << (2 * _WEIGHT_BITS - 1)
# Every so many steps those are taken out that came back to where they were so many steps before:
# they stand still or run in a circle of 1, 2, 3, 4, 6 or 12 steps, and 12 divides what is left.
_CYCLE = 12
_FIRST_CHECK = N_STEPS % _CYCLE

# Crops of the check are worked on in groups of at most this many pixels, which fit into a cache.
_MAX_GROUP_PX = 1 << 16


def kind_of_device(device: str) -> str:
    """What "auto", "cpu" or "cuda" is on this machine: cpu or cuda."""
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def reach_px(max_travel_px: int) -> int:
    """How far from the centroid of a nucleus lie the pixels that may decide on it.

    From the centroid to the peak where its pixels end: `max_travel_px` + 5, for both lie among
    pixels that travel no further and end within 5 px of the peak. Peaks up to 10 px away compete
    with it for bins, by what ends within 5 px of them, which comes from `max_travel_px` away.
    """
    return 2 * max_travel_px + 4 * _SEED_RADIUS


def carry_px(max_travel_px: int) -> int:
    """How far from a pixel lies the flow that may move it: its way may exceed its limit by the
    steps until that is noticed, and flows are interpolated."""
    return max_travel_px + _CYCLE + 1


def label_flows(
    flow_2YX: Flow,
    inside_YX: npt.NDArray[np.bool_],
    *,
    max_travel_px: int,
    rim_px: int,
    device: str,
) -> Labels:
    """(Y, X) nuclei before the check, 0 outside; which number one has means nothing.

    `flow_2YX` moves a pixel in one step, by at most 1 px along an axis (more is cut off); pixels
    not `inside_YX` take part in nothing. A pixel that travels further than `max_travel_px` along
    an axis belongs to no nucleus. Within `rim_px` of the border pixels carry others but are not
    followed themselves.
    """
    torch.set_num_threads(1)  # the cores are shared by workers, a block each
    labels = np.zeros(inside_YX.shape, np.int32)
    followed = np.zeros_like(inside_YX)
    inner = tuple(slice(rim_px, n - rim_px) for n in inside_YX.shape)
    followed[inner] = inside_YX[inner]
    pixels = np.flatnonzero(followed)
    if not len(pixels):
        return labels
    whole = np.rint(np.clip(flow_2YX, -1, 1) * _ONE).astype(np.int64) * inside_YX
    packed_P = torch.from_numpy(((whole[0] + _ONE << _LANE_BITS) + whole[1] + _ONE).reshape(-1))
    start_N = torch.from_numpy(pixels).to(device)
    end_N, stays_N = _follow(packed_P.to(device), start_N, inside_YX.shape, max_travel_px)
    found = torch.zeros_like(end_N, dtype=torch.int32)
    found[stays_N] = _label_ends(end_N[stays_N], inside_YX.shape)
    labels.reshape(-1)[pixels] = found.cpu().numpy()
    return labels


def _follow(
    packed_P: torch.Tensor, start_N: torch.Tensor, shape: tuple[int, ...], max_travel_px: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixel (flat) where each start ends after N_STEPS, and whether it stayed within limits."""
    height, width = shape
    limit = max_travel_px * _ONE
    start_y, start_x = start_N // width * _ONE, start_N % width * _ONE
    end_N = start_N.clone()
    stays_N = torch.ones_like(start_N, dtype=torch.bool)
    active = torch.arange(len(start_N), device=start_N.device)
    y, x = start_y, start_x
    step = 0
    while step < N_STEPS and len(active):
        before_y, before_x = y, x
        for _ in range(_CYCLE if step else _FIRST_CHECK):
            dy, dx = _interpolated(packed_P, y, x, width)
            y = (y + dy).clamp_(0, (height - 1) * _ONE)
            x = (x + dx).clamp_(0, (width - 1) * _ONE)
            step += 1
        far = ((y - start_y[active]).abs() > limit) | ((x - start_x[active]).abs() > limit)
        stays_N[active[far]] = False
        end_N[active] = (y >> _SUB_BITS) * width + (x >> _SUB_BITS)
        # After the first check all go on: it is of fewer steps than a circle may take.
        going = ~far & ((y != before_y) | (x != before_x) | (step <= _FIRST_CHECK))
        active, y, x = active[going], y[going], x[going]
    return end_N, stays_N


def _interpolated(
    packed_P: torch.Tensor, y_N: torch.Tensor, x_N: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The flow between the four pixels around each position, rounded to 1/1024 px."""
    first = (y_N >> _SUB_BITS) * width + (x_N >> _SUB_BITS)
    # At the last row or column the weight of what would lie beyond is 0: any pixel will do.
    last = len(packed_P) - 1
    wy = (y_N & (_ONE - 1)) >> (_SUB_BITS - _WEIGHT_BITS)
    wx = (x_N & (_ONE - 1)) >> (_SUB_BITS - _WEIGHT_BITS)
    left = packed_P.index_select(0, first)
    top = (left << _WEIGHT_BITS) + wx * (
        packed_P.index_select(0, (first + 1).clamp_(max=last)) - left
    )
    below = (first + width).clamp_(max=last)
    left = packed_P.index_select(0, below)
    bottom = (left << _WEIGHT_BITS) + wx * (
        packed_P.index_select(0, (below + 1).clamp_(max=last)) - left
    )
    both = (top << _WEIGHT_BITS) + wy * (bottom - top) + _HALF_OF_BOTH
    shift = 2 * _WEIGHT_BITS
    return (both >> (_LANE_BITS + shift)) - _ONE, ((both & _LANE_MASK) >> shift) - _ONE


def _label_ends(end_N: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The nucleus of each end, 0 for none: bins around peaks of the histogram of ends."""
    height, width = shape
    rim = _SEED_RADIUS
    row, column = end_N // width + rim, end_N % width + rim
    wide = width + 2 * rim
    bins_N = row * wide + column
    n_ends = torch.bincount(bins_N, minlength=(height + 2 * rim) * wide).int()
    picture = n_ends.reshape(height + 2 * rim, wide)
    peak = (picture >= _MIN_ENDS_OF_SEED) & (picture == _largest_around(picture, _PEAK_RADIUS))
    seeds = torch.nonzero(peak.reshape(-1)).reshape(-1)
    # The peak with more ends takes what two want; of equals the later one, in reading order.
    seeds = seeds[torch.argsort(n_ends[seeds], stable=True)]
    reach = torch.arange(-rim, rim + 1, device=end_N.device)
    around = (reach[:, None] * wide + reach[None, :]).reshape(-1)
    bins_SB = seeds[:, None] + around
    side = 2 * rim + 1
    open_SYX = (n_ends[bins_SB] >= _MIN_ENDS_OF_BIN).reshape(-1, side, side)
    grown_SYX = torch.zeros_like(open_SYX, dtype=torch.int32)
    grown_SYX[:, rim, rim] = 1
    for _ in range(rim):
        grown_SYX = _largest_around(grown_SYX, 1) * open_SYX
    taken = grown_SYX.reshape(-1, side * side) > 0
    number = torch.arange(1, len(seeds) + 1, device=end_N.device, dtype=torch.int32)
    owner = torch.zeros_like(n_ends)
    owner.scatter_reduce_(
        0, bins_SB[taken], number[:, None].expand_as(bins_SB)[taken], reduce="amax"
    )
    return owner[bins_N]


def _largest_around(image: torch.Tensor, radius: int) -> torch.Tensor:
    """Maximum over squares of the last two axes; outside counts as nothing."""
    for axis in (-2, -1):
        n = image.shape[axis]
        out = image.clone()
        for shift in range(1, radius + 1):
            a, b = out.narrow(axis, shift, n - shift), image.narrow(axis, 0, n - shift)
            torch.maximum(a, b, out=a)
            a, b = out.narrow(axis, 0, n - shift), image.narrow(axis, shift, n - shift)
            torch.maximum(a, b, out=a)
        image = out
    return image


def flow_errors(
    labels_YX: Labels, boxes_N4: npt.NDArray[np.int64], ids_N: npt.NDArray[np.int32],
    flow_2YX: Flow, device: str,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """Mean squared difference, for each nucleus, of the network's flow and that of its own mask.

    The mask's flow is the direction in which heat falls that its middle gives off, 2 (height +
    width + 2) steps of a 3 x 3 mean, as in Cellpose, but with the size of this nucleus alone.
    `boxes_N4` are half-open (x0, y0, x1, y1) around the nuclei `ids_N`.
    """
    errors = np.empty(len(ids_N))
    x0, y0, x1, y1 = boxes_N4.T
    height, width = y1 - y0, x1 - x0
    # Alike in the number of steps, and then in size, so that little of a group is padding.
    order = np.lexsort((width, height + width))
    n_steps = 2 * (height + width + 2)
    start = 0
    while start < len(order):
        stop = start + 1
        high, wide = height[order[start]], width[order[start]]
        while stop < len(order) and n_steps[order[stop]] == n_steps[order[start]]:
            high, wide = max(high, height[order[stop]]), max(wide, width[order[stop]])
            if (stop + 1 - start) * (high + 2) * (wide + 2) > _MAX_GROUP_PX:
                break
            stop += 1
        group = order[start:stop]
        high, wide = int(height[group].max()), int(width[group].max())
        errors[group] = _errors_of_alike(
            labels_YX, x0[group], y0[group], high, wide, ids_N[group], flow_2YX,
            int(n_steps[group[0]]), device,
        )  # fmt: skip
        start = stop
    return errors


def _errors_of_alike(
    labels_YX: Labels, x0_N: npt.NDArray[np.int64], y0_N: npt.NDArray[np.int64], high: int,
    wide: int, ids_N: npt.NDArray[np.int32], flow_2YX: Flow, n_steps: int, device: str,
) -> npt.NDArray[np.float64]:  # fmt: skip
    height, width = labels_YX.shape
    rows = y0_N[:, None, None] + np.arange(high)[:, None]
    columns = x0_N[:, None, None] + np.arange(wide)
    inside = (rows < height) & (columns < width)
    rows, columns = np.minimum(rows, height - 1), np.minimum(columns, width - 1)
    mask_NYX = (labels_YX[rows, columns] == ids_N[:, None, None]) & inside
    heat_NYX = _heat(mask_NYX, n_steps, device)
    own = np.stack(
        [
            heat_NYX[:, 2:, 1:-1] - heat_NYX[:, :-2, 1:-1],
            heat_NYX[:, 1:-1, 2:] - heat_NYX[:, 1:-1, :-2],
        ]
    ).astype(np.float64)
    own /= 1e-60 + np.sqrt((own**2).sum(axis=0))
    off = ((own - flow_2YX[:, rows, columns]) ** 2).sum(axis=0) * mask_NYX
    # In reading order, whatever the padding: adding zeros changes no sum.
    error: npt.NDArray[np.float64] = np.add.accumulate(
        off.sum(axis=2), axis=1
    )[:, -1] / mask_NYX.sum(axis=(1, 2))  # fmt: skip
    return error


def _heat(mask_NYX: npt.NDArray[np.bool_], n_steps: int, device: str) -> Flow:
    """(N, Y + 2, X + 2) heat after `n_steps` from the middle of each mask, none outside it."""
    n, high, wide = mask_NYX.shape
    middle = _middles(mask_NYX)
    heat = torch.zeros((n, high + 2, wide + 2), device=device)
    inner = heat[:, 1:-1, 1:-1]
    ninth = torch.from_numpy(mask_NYX).to(device, torch.float32) / 9
    y, x = (torch.from_numpy(m + 1).to(device) for m in middle)
    number = torch.arange(n, device=device)
    rows, summed = torch.empty_like(heat[:, 1:-1]), torch.empty_like(inner)
    for _ in range(n_steps):
        heat[number, y, x] += 1
        torch.add(heat[:, :-2], heat[:, 1:-1], out=rows)
        rows += heat[:, 2:]
        torch.add(rows[:, :, :-2], rows[:, :, 1:-1], out=summed)
        summed += rows[:, :, 2:]
        torch.mul(summed, ninth, out=inner)
    return heat.cpu().numpy()


def _middles(
    mask_NYX: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row and column of the pixel of each mask that is nearest to its rounded mean position."""
    n, high, wide = mask_NYX.shape
    n_px = mask_NYX.sum(axis=(1, 2))
    y = np.rint((mask_NYX.sum(axis=2) * np.arange(high)).sum(axis=1) / n_px)
    x = np.rint((mask_NYX.sum(axis=1) * np.arange(wide)).sum(axis=1) / n_px)
    away = (np.arange(high)[:, None] - y[:, None, None]) ** 2 + (
        np.arange(wide) - x[:, None, None]
    ) ** 2
    nearest = np.where(mask_NYX, away, np.inf).reshape(n, -1).argmin(axis=1)
    return nearest // wide, nearest % wide
