"""What people use instead, at their best: SIFT + RANSAC, ECC and ICP, each an affine.

ECC and ICP need a start: they get this project's own best candidate of the coarse search.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.spatial import cKDTree

from benchmarks.registration.pairs import Pair
from pairing.geometry import Affine, Points
from pairing.registration.coarse import find_candidates
from pairing.registration.he_nuclei import find_he_nuclei

Grey = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

# SIFT takes some 100 bytes a pixel, so that large slides are seen coarser.
SIFT_MPPS, SIFT_MAX_PX = (0.5, 1.0, 2.0, 4.0), 12e6
N_FEATURES, RATIO, RANSAC_UM = 20_000, 0.8, 5.0
ECC_MPPS, ECC_ROUNDS = (8.0, 4.0, 2.0), 100
ICP_RADII_UM, ICP_ROUNDS = (40.0, 20.0, 10.0, 5.0), 20


def sift(pair: Pair) -> Affine | None:
    """Features of both images, Lowe's ratio, RANSAC; the mirror image with more inliers."""
    with pair.open() as slide:
        area_um2 = slide.size_px[0] * slide.size_px[1] * slide.mpp**2
    mpp = next(m for m in SIFT_MPPS if area_um2 / m**2 <= SIFT_MAX_PX or m == SIFT_MPPS[-1])
    he, nuclei = _equalised(slide_picture(pair, mpp)), _equalised(instrument_picture(pair, mpp))
    # Without the precise upscale every point lies a quarter of a pixel off.
    finder = cv2.SIFT.create(
        nfeatures=N_FEATURES, contrastThreshold=0.02, enable_precise_upscale=True
    )
    to_points, to_words = finder.detectAndCompute(he, None)
    best: tuple[int, Affine] | None = None
    for mirror in (False, True):
        seen = np.ascontiguousarray(nuclei[:, ::-1]) if mirror else nuclei
        from_points, from_words = finder.detectAndCompute(seen, None)
        # FLANN's trees are drawn at random.
        cv2.setRNGSeed(0)
        pairs = cv2.FlannBasedMatcher({"algorithm": 1, "trees": 4}, {"checks": 64}).knnMatch(
            from_words, to_words, k=2
        )
        good = [a for a, b in pairs if a.distance < RATIO * b.distance]
        if len(good) < 3:
            continue
        found, inliers = cv2.estimateAffine2D(
            np.array([from_points[m.queryIdx].pt for m in good]) + 0.5,
            np.array([to_points[m.trainIdx].pt for m in good]) + 0.5,
            method=cv2.RANSAC, ransacReprojThreshold=RANSAC_UM / mpp,
            maxIters=20_000, confidence=0.999,
        )  # fmt: skip
        if found is None or (best is not None and int(inliers.sum()) <= best[0]):
            continue
        flip = np.diag([-1.0 if mirror else 1.0, 1.0, 1.0])
        flip[0, 2] = seen.shape[1] if mirror else 0.0
        affine = np.vstack([found, [0, 0, 1]]) @ flip
        best = int(inliers.sum()), Affine.of(affine)
    if best is None:
        return None
    return Affine.scale(mpp / pair.mpp) @ best[1] @ Affine.scale(1 / mpp)


def ecc(pair: Pair) -> Affine | None:
    """Enhanced correlation of the two pictures, from coarse to fine (Evangelidis, PAMI 2008)."""
    he_um_from_um = _start(pair)
    if he_um_from_um is None:
        return None
    for mpp in ECC_MPPS:
        template, picture = instrument_picture(pair, mpp), slide_picture(pair, mpp)
        # Positions of cv2 count from the middle of the first pixel.
        middle = Affine.similarity(1.0, 0.0, (0.5, 0.5))
        to_px = middle.inverse @ Affine.scale(1 / mpp)
        start = (to_px @ he_um_from_um @ to_px.inverse).array[:2].astype(np.float32)
        stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, ECC_ROUNDS, 1e-6)
        try:
            _, found = cv2.findTransformECC(
                template, picture, start, cv2.MOTION_AFFINE, stop, np.empty(0, np.uint8), 5
            )
        except cv2.error:  # it did not converge
            return _in_px(pair, he_um_from_um)
        he_um_from_um = to_px.inverse @ Affine.of(np.vstack([found, [0, 0, 1]])) @ to_px
    return _in_px(pair, he_um_from_um)


def icp(pair: Pair) -> Affine | None:
    """Nearest nuclei, an affine by least squares, again; the radius shrinks."""
    he_um_from_um = _start(pair)
    if he_um_from_um is None:
        return None
    tree = cKDTree(_he_um(pair))
    design = np.column_stack([pair.um, np.ones(len(pair.um))])
    for radius_um in ICP_RADII_UM:
        for _ in range(ICP_ROUNDS):
            away, nearest = tree.query(he_um_from_um(pair.um), distance_upper_bound=radius_um)
            near = np.isfinite(away)
            if near.sum() < 10:
                return _in_px(pair, he_um_from_um)
            to = tree.data[nearest[near]]
            solved = np.linalg.lstsq(design[near], to, rcond=None)[0]
            he_um_from_um = Affine.of(np.vstack([solved.T, [0, 0, 1]]))
    return _in_px(pair, he_um_from_um)


BASELINES: dict[str, Callable[[Pair], Affine | None]] = {"SIFT": sift, "ECC": ecc, "ICP": icp}


def best_affine(pair: Pair) -> Affine:
    """What no affine can beat: least squares on the truth."""
    there = pair.take(~pair.missing)
    design = np.column_stack([there.um, np.ones(len(there.um))])
    solved = np.linalg.lstsq(design, there.px, rcond=None)[0]
    return Affine.of(np.vstack([solved.T, [0, 0, 1]]))


def slide_picture(pair: Pair, mpp: float) -> Grey:
    """The slide at `mpp`, nuclei bright: the density of red light, which eosin lets through."""
    with pair.open() as slide:
        width, height = (int(n * slide.mpp / mpp) for n in slide.size_px)
        red = slide.read_at((0, 0, width, height), mpp)[..., 0]
    return _bright(-np.log10((red.astype(np.float32) + 1) / 256))


def instrument_picture(pair: Pair, mpp: float) -> Grey:
    """The pair's picture of nuclei at `mpp`; discs of their areas where it has none."""
    if pair.picture is not None:
        whole = np.asarray(Image.open(pair.picture))
        share = pair.mpp / mpp
        small = cv2.resize(whole, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
        return np.asarray(small, np.uint8)
    width, height = (np.ceil((pair.um.max(axis=0) + 30) / mpp)).astype(int).tolist()
    picture = np.zeros((height, width), np.uint8)
    bits = 4
    centres = np.rint((pair.um / mpp - 0.5) * 2**bits).astype(int)
    radii = np.rint(np.sqrt(pair.area_um2 / np.pi) / mpp * 2**bits).astype(int)
    for (x, y), radius in zip(centres.tolist(), radii.tolist(), strict=True):
        cv2.circle(picture, (x, y), radius, 255, -1, cv2.LINE_AA, bits)
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), 0.8), np.uint8)


def _he_um(pair: Pair) -> Points:
    return find_he_nuclei(pair.open).px * pair.mpp


def _start(pair: Pair) -> Affine | None:
    with pair.open() as slide:
        slide_um = slide.size_px[0] * slide.mpp, slide.size_px[1] * slide.mpp
    candidates = find_candidates(pair.um, _he_um(pair), slide_um, 1.0, 1)
    return candidates[0].he_um_from_xenium_um if candidates else None


def _in_px(pair: Pair, he_um_from_um: Affine) -> Affine:
    return Affine.scale(1 / pair.mpp) @ he_um_from_um


def _bright(picture: F32) -> Grey:
    low, high = np.percentile(picture, (1, 99.8))
    return np.asarray(np.clip((picture - low) / (high - low), 0, 1) * 255, np.uint8)


def _equalised(picture: Grey) -> Grey:
    return np.asarray(cv2.createCLAHE(2.0, (16, 16)).apply(picture), np.uint8)
